"""Texts and images to vectors: each row's own, whatever stands beside it, in its place."""

import numpy as np
import pytest

import jaxft
from jaxft.data.columns import pad
from jaxft.embedding import embed_images, embed_rows, pooled, shape_of
from jaxft.errors import DataError
from jaxft.loading import with_config

LENGTHS = [3, 1, 40, 9, 8, 17, 2, 33, 5, 5, 64, 12]
TOY = jaxft.testing.ToyTokenizer()


@pytest.fixture(scope="module")
def bert():
    return jaxft.testing.tiny_bert()


def rows():
    draw = np.random.default_rng(0)
    return [{"input_ids": draw.integers(1, 60, n)} for n in LENGTHS]


@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_row_gives_its_own_vector_in_its_place(bert, batch_size):
    """In batches of like length, or all in one as wide as the longest: the same to 1e-5; and alone, unpadded."""
    found = embed_rows(bert, rows(), batch_size)
    np.testing.assert_allclose(found, pooled(bert, pad(rows(), len(LENGTHS), width=64)), atol=1e-5)
    alone = pooled(bert, {"input_ids": rows()[-1]["input_ids"][None].astype(np.int32)})
    np.testing.assert_allclose(found[-1:], alone, atol=1e-5)


def test_shapes_are_few_and_close():
    """No width wastes more than a quarter past 16 tokens, and a thousand lengths have few of them."""
    widths = {length: shape_of(length, 32, 1 << 20)[0] for length in range(1, 1025)}
    assert len(set(widths.values())) == 27
    assert all(length <= width <= max(16, 1.25 * length) for length, width in widths.items())
    assert [shape_of(n, 32, 1 << 20)[1] for n in (5, 16, 30, 500)] == [64, 64, 64, 4]
    assert shape_of(5, 32, 3)[1] == 4


def test_few_programs(bert):
    embed_rows(bert, rows() * 40, 8)
    before = pooled._cache_size()
    embed_rows(bert, rows() * 40, 8)
    assert pooled._cache_size() == before


def test_longer_texts_are_cut_as_the_config_says(bert):
    said = with_config(bert, max_seq_length=3, normalize=True)
    long, short = jaxft.embed(said, TOY, ["abcdefg", "abc"])
    np.testing.assert_array_equal(long, short)
    np.testing.assert_allclose(np.linalg.norm(long), 1, atol=1e-6)
    plain = jaxft.embed(said, TOY, ["abc"], normalize=False)[0]
    assert abs(np.linalg.norm(plain) - 1) > 1e-2
    np.testing.assert_allclose(plain / np.linalg.norm(plain), short, atol=1e-6)
    assert np.abs(jaxft.embed(said, TOY, ["abcdefg"], max_length=7)[0] - long).max() > 1e-4


def test_texts_that_are_none():
    with pytest.raises(DataError, match=r"(?s)text 1: .*empty.*text 2: .*null"):
        jaxft.embed(jaxft.testing.tiny_llama(), TOY, ["a", " ", None])
    with pytest.raises(DataError, match="nothing to embed"):
        jaxft.embed(jaxft.testing.tiny_llama(), TOY, [])


def test_images():
    model = jaxft.testing.tiny_vit()
    images = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    found = embed_images(model, images, 2)
    np.testing.assert_allclose(found, model.pooled(pixel_values=images), atol=1e-5)
