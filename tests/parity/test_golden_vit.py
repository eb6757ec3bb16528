"""ViT and its pictures against what transformers computed and saved: no torch is needed here."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxft
from jaxft.data import read_processor
from jaxft.data.pixels import grey_levels

GOLDEN = Path(__file__).parent / "golden" / "vit"
CASES = sorted(f.parent.name for f in GOLDEN.glob("*/model.safetensors"))
TOLERANCE = 1e-5


def test_every_case_is_there():
    assert CASES == ["classifier", "plain", "wide"]


@pytest.mark.parametrize("name", CASES)
def test_hidden_states(name):
    model, want = jaxft.load(GOLDEN / name)[0], load_file(GOLDEN / name / "expected.safetensors")
    hidden = model.hidden(jnp.asarray(want["pixels"]))
    assert np.abs(hidden - want["hidden"]).max() < TOLERANCE < np.abs(want["hidden"]).max()


def test_logits():
    model, want = jaxft.load(GOLDEN / "classifier")[0], load_file(GOLDEN / "classifier" / "expected.safetensors")
    assert np.abs(model(want["pixels"]) - want["logits"]).max() < TOLERANCE < np.abs(want["logits"]).max()
    assert model.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("name", CASES)
def test_written_again(name, tmp_path):
    """The same tensors under the same names, and a config that says what the peer's said."""
    jaxft.save_model(jaxft.load(GOLDEN / name)[0], tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / name))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / name))
    ours.pop("problem_type", None)  # which transformers writes once it has trained
    assert ours == theirs


def test_pictures():
    """To the bit, since both resize with PIL."""
    want = load_file(GOLDEN / "processor" / "expected.safetensors")
    processor = read_processor(GOLDEN / "processor", size=12)
    images = np.stack([grey_levels(want[f"picture{i}"], processor) for i in range(4)])
    np.testing.assert_allclose(processor(images), want["pixel_values"], atol=1e-6)
    theirs = json.loads((GOLDEN / "processor" / "preprocessor_config.json").read_text())
    assert processor.to_json() == theirs
