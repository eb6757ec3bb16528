"""Prefixes and prompts against what peft computed and saved: no torch is needed here."""

import json
from pathlib import Path

import pytest
import virtual
from safetensors.numpy import load_file

import jaxft

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted((GOLDEN / "virtual").iterdir())


def test_the_sweep_sees_every_case():
    assert [f.name for f in FOLDERS] == sorted(f"{b}-{c}" for b in ("llama", "gpt2") for c in virtual.CASES)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_case(folder):
    """Logits, continuations, loss, and the gradient of every trained leaf, encoders included."""
    base, _, case = folder.name.partition("-")
    virtual.check(jaxft.load(GOLDEN / base / "base")[0], case, folder, load_file(folder / "expected.safetensors"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_written_again(folder, tmp_path):
    """What peft wrote is written again to the bit, with no key that peft does not have."""
    base = jaxft.load(GOLDEN / folder.name.partition("-")[0] / "base")[0]
    jaxft.save_adapter(jaxft.load_adapter(base, folder), tmp_path)
    theirs, mine = (load_file(f / "adapter_model.safetensors")["prompt_embeddings"] for f in (folder, tmp_path))
    assert (theirs == mine).all() and theirs.any()
    was, config = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path))
    assert set(config) <= set(was)
    for key in ("num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"):
        assert config[key] == was[key], key
    assert (config["peft_type"], config["task_type"]) == (was["peft_type"], was["task_type"])
