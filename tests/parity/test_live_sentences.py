"""Folders both ways, live: ours in sentence-transformers, its folders here; whole, merged and with an adapter."""

import numpy as np
import pytest

import jaxft
from jaxft.loading import with_config
from jaxft.models.names import variables

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
sentences = pytest.importorskip("sentences", reason="needs the [parity] extra")
MODES = ("cls", "mean", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean")


def shaken(model, amount=0.1):
    """The model with every leaf of its adapters moved by a fixed draw."""
    draw = np.random.default_rng(0)
    for path, variable in variables(model).items():
        if path.endswith((".a", ".b")):
            value = variable.get_value()
            variable.set_value(value + amount * draw.standard_normal(value.shape).astype(np.float32))
    return model


@pytest.mark.parametrize("kind", sorted(sentences.CONFIGS))
def test_their_folder_here(kind, tmp_path):
    for n, mode in enumerate(MODES):
        root = tmp_path / mode
        sentences.folder_of(kind, root, mode=mode, normalize=n % 2 == 0, adapter=n > 3)
        found = jaxft.embed(*jaxft.load(root / "folder"), sentences.TEXTS)
        np.testing.assert_allclose(found, sentences.vectors(root / "folder"), atol=1e-5)
    assert n == 5


@pytest.mark.parametrize("kind", sorted(sentences.CONFIGS))
def test_our_folder_there(kind, tmp_path):
    """Every mode, whole; then trained on: merged, and with the adapter beside the name of its base."""
    sentences.base(kind, tmp_path / "base")
    model, tokenizer = jaxft.load(tmp_path / "base")
    for n, mode in enumerate(MODES):
        mode = "last" if mode == "lasttoken" else mode
        said = with_config(model, pooling=mode, normalize=n % 2 == 1, max_seq_length=None if n == 0 else 12)
        folder = jaxft.save_sentence_transformer(said, tmp_path / mode, tokenizer, prompts={"query": "q: "})
        np.testing.assert_allclose(jaxft.embed(said, tokenizer, sentences.TEXTS), sentences.vectors(folder), atol=1e-5)
    assert n == 5
    adapted = shaken(jaxft.attach(said, jaxft.LoRA(r=2)))
    want = jaxft.embed(adapted, tokenizer, sentences.TEXTS)
    assert np.abs(want - jaxft.embed(said, tokenizer, sentences.TEXTS)).max() > 1e-2
    for name, one in (("adapted", adapted), ("merged", jaxft.merge(adapted))):
        folder = jaxft.save_sentence_transformer(one, tmp_path / name, tokenizer)
        np.testing.assert_allclose(sentences.vectors(folder), want, atol=1e-5)
        np.testing.assert_allclose(jaxft.embed(*jaxft.load(folder), sentences.TEXTS), want, atol=1e-5)
    assert sentences.named(tmp_path / "adapted") == str((tmp_path / "base").resolve())
