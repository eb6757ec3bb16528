"""IA3, DoRA, PiSSA, embeddings and token rows against what peft computed and saved."""

import json
from pathlib import Path

import numpy as np
import pytest
from agreement import SVD, check_gradients, check_logits, check_merged, part
from safetensors.numpy import load_file

import jaxft

GOLDEN = Path(__file__).parent / "golden"
CASES = [(f.parent.parent.name, f.parent.name) for f in sorted(GOLDEN.glob("lowrank/*/*/adapter_config.json"))]
KEYS = {
    "LORA": (
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "trainable_token_indices",
        "rank_pattern",
    ),
    "IA3": ("feedforward_modules", "target_modules", "modules_to_save"),
}


def test_the_sweep_sees_every_case():
    assert len(CASES) == 8


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_adapter(name, adapter, tmp_path):
    """What peft wrote loads, computes, learns and merges as in peft, and is written again as it was."""
    folder = GOLDEN / "lowrank" / name / adapter
    want = load_file(folder / "expected.safetensors")
    plain, _ = jaxft.load(GOLDEN / name / "base")
    base = load_file(GOLDEN / name / "expected.safetensors")["base"]
    model = jaxft.load_adapter(plain, folder)
    assert np.abs(want["logits"] - base).max() > 1e-3
    check_logits(model, want["logits"])
    check_logits(jaxft.set_adapter(model, None), base)
    gradients, merged = part(want, "gradient "), part(want, "merged ")
    assert gradients and merged
    check_gradients(model, gradients)
    check_merged(model, merged, tmp_path / "merged", SVD if adapter == "pissa" else 1e-6)
    check_logits(jaxft.load(tmp_path / "merged")[0], want["logits"])
    jaxft.save_adapter(model, tmp_path / "again")
    theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again"))
    assert set(ours) == {key for key in theirs if not key.endswith("base_layer.weight")}
    for key in ours:
        assert np.array_equal(ours[key], theirs[key]), key
    config, was = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "again", folder))
    assert set(config) <= set(was)
    for key in (*KEYS[was["peft_type"]], "peft_type", "fan_in_fan_out", "task_type"):
        same = (sorted(config[key]), sorted(was[key])) if isinstance(was[key], list) else (config[key], was[key])
        assert same[0] == same[1], key
