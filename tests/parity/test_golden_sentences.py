"""Folders of sentence-transformers against the vectors that it made: whole models and adapters, two families."""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxft

GOLDEN = Path(__file__).parent / "golden" / "sentences"
CASES = sorted(f.parent.name for f in GOLDEN.glob("*/modules.json"))
TEXTS = json.loads((GOLDEN / "texts.json").read_text())
SAID = {
    "bert": ("mean", True, 12),
    "bert-adapter": ("weightedmean", True, 12),
    "llama": ("last", False, 20),
    "llama-adapter": ("max", False, 12),
}


def test_the_sweep_sees_every_case():
    assert set(CASES) == set(SAID)


@pytest.mark.parametrize("name", CASES)
def test_vectors(name, monkeypatch):
    """What it wrote loads and embeds as there (1e-5); an adapter over the base that it names."""
    monkeypatch.chdir(GOLDEN / name)  # `../bert` is the base
    model, tokenizer = jaxft.load(".")
    assert (model.config.pooling, model.config.normalize, model.config.max_seq_length) == SAID[name]
    assert list(jaxft.adapters(model)) == (["default"] if name.endswith("adapter") else [])
    want = np.load("expected.npy")
    np.testing.assert_allclose(jaxft.embed(model, tokenizer, TEXTS), want, atol=1e-5)
    if "adapter" in name:
        off = jaxft.embed(jaxft.set_adapter(model, None), tokenizer, TEXTS)
        assert np.abs(off - want).max() > 1e-2
        merged = jaxft.embed(jaxft.merge(model), tokenizer, TEXTS)
        np.testing.assert_allclose(merged, want, atol=1e-5)


def test_a_decoder_without_its_head_embeds_and_writes_nothing(tmp_path):
    model, tokenizer = jaxft.load(GOLDEN / "llama")
    with pytest.raises(jaxft.MethodError, match="without its output head"):
        jaxft.generate(model, tokenizer, ["the cat"], max_new_tokens=2)
    jaxft.save_sentence_transformer(model, tmp_path / "out", tokenizer)
    again = jaxft.embed(*jaxft.load(tmp_path / "out"), TEXTS)
    np.testing.assert_array_equal(again, jaxft.embed(model, tokenizer, TEXTS))
