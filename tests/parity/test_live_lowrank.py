"""IA3, DoRA, PiSSA, embeddings and token rows beside peft: what one writes the other reads, with the same numbers."""

import numpy as np
import pytest
from agreement import SVD, check_gradients, check_logits, check_merged, part
from safetensors.numpy import load_file

import jaxft

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
variants = pytest.importorskip("variants", reason="needs the [parity] extra")
torch = pytest.importorskip("torch")
peers, peft, transformers = variants.peers, variants.peft, variants.peers.transformers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for base in variants.ADAPTERS:
        made[base] = tmp_path_factory.mktemp(base)
        peers.base_model(base).save_pretrained(made[base])
    return made


def read_by_peft(base, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize(("base", "name"), variants.CASES)
def test_both_ways(base, name, folders, tmp_path):
    """peft's folder here: logits, gradients, merged weights; trained on here and written: peft's logits."""
    variants.adapted(base, name).save_pretrained(tmp_path / "theirs")
    want = variants.everything(base, name)
    model = jaxft.load_adapter(jaxft.load(folders[base])[0], tmp_path / "theirs")
    check_logits(model, want["logits"])
    check_merged(model, part(want, "merged "), tmp_path / "merged", SVD if name == "pissa" else 1e-6)
    state = check_gradients(model, part(want, "gradient "))
    jaxft.save_adapter(state, tmp_path / "ours")
    again = read_by_peft(folders[base], tmp_path / "ours")
    written = set(load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    known = {k for k in peft.get_peft_model_state_dict(again) if not k.endswith("base_layer.weight")}
    assert written == known
    moved = peers.logits(again)
    check_logits(state.model, moved)
    assert np.abs(moved - want["logits"]).max() > 1e-3


@pytest.mark.parametrize(("base", "name"), [("llama", "pissa"), ("gpt2", "pissa")])
def test_served_as_a_plain_lora(base, name, folders, tmp_path):
    """The serving export in peft: PiSSA's logits, on the untouched base."""
    theirs = variants.adapted(base, name)
    theirs.save_pretrained(tmp_path / "theirs")
    model = jaxft.load_adapter(jaxft.load(folders[base])[0], tmp_path / "theirs")
    again = read_by_peft(folders[base], jaxft.save_serving(model, tmp_path / "served"))
    assert np.abs(peers.logits(again) - peers.logits(theirs)).max() < 1e-5
    assert again.peft_config["default"].r == 8
