"""Every family against what transformers computed and saved: no torch is needed here."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxft
from jaxft.models import FAMILIES, CausalLM

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(f.parent.name for f in (GOLDEN / "families").glob("*/expected.safetensors"))
TOLERANCE = 2e-5


def padded():
    """The rows that the peer saw: whole, padded right, padded left."""
    ids = np.random.default_rng(0).integers(3, 40, (3, 16))
    mask = np.ones_like(ids)
    mask[1, 11:], mask[2, :5] = 0, 0
    return jnp.asarray(ids), jnp.asarray(mask)


def packed():
    """Three rows of 9, 3 and 12 tokens in one, with two places left over."""
    parts = [np.random.default_rng(1).integers(3, 40, n) for n in (9, 3, 12)]
    segments = np.repeat([1, 2, 3, 0], [9, 3, 12, 2])
    return jnp.asarray(np.concatenate([*parts, [7, 7]])[None]), jnp.asarray(segments[None])


def compare(model, want):
    ids, mask = padded()
    assert np.abs((model(ids, attention_mask=mask) - want["padded"]) * mask[..., None]).max() < TOLERANCE
    ids, segments = packed()
    assert np.abs(model(ids, segment_ids=segments)[0, :24] - want["packed"]).max() < TOLERANCE
    assert np.abs(want["packed"]).max() > 1


@pytest.mark.parametrize("name", CASES)
def test_family(name):
    compare(jaxft.load(GOLDEN / "families" / name)[0], load_file(GOLDEN / "families" / name / "expected.safetensors"))


@pytest.mark.parametrize("name", CASES)
def test_written_again(name, tmp_path):
    """The same tensors, and a config that says what the peer's said."""
    jaxft.save_model(jaxft.load(GOLDEN / "families" / name)[0], tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / "families" / name))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, GOLDEN / "families" / name))
    assert ours == theirs


def test_every_family_has_golden_files_tied_and_untied():
    seen = {}
    for config in [*(GOLDEN / "families").glob("*/config.json"), *GOLDEN.glob("*/base/config.json")]:
        raw = json.loads(config.read_text())
        model = jaxft.load(config.parent, abstract=True)[0]
        seen.setdefault(raw["model_type"], set()).add(model.config.tie_word_embeddings)
    assert seen == {
        model_type: {True, False} for model_type, family in FAMILIES.items() if issubclass(family, CausalLM)
    }
    assert len(CASES) == 10
