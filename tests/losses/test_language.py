"""Cross-entropy against numbers worked out by hand, and what must not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.losses import cross_entropy, next_token_loss
from jaxft.testing import tiny_llama, token_batch


def test_by_hand():
    logits = jnp.log(jnp.array([[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]]]))
    labels = jnp.array([[0, -100, 2]])
    want = [-np.log(0.7), 0, -np.log(0.5)]
    np.testing.assert_allclose(cross_entropy(logits, labels, reduction="none")[0], want, rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, labels, reduction="sum"), sum(want), rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, labels), sum(want) / 2, rtol=1e-6)


@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, 1e30])
def test_junk_at_ignored_labels_changes_nothing(junk):
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    labels = jnp.array([[1, -100, 2], [-100, -100, 4]])
    dirty = jnp.where((labels == -100)[..., None], junk, logits)
    for f in (cross_entropy, jax.grad(cross_entropy)):
        np.testing.assert_array_equal(f(dirty, labels), f(logits, labels))


def test_no_trained_label_is_zero_and_not_nan():
    logits, labels = jnp.ones((2, 4)), jnp.full(2, -100)
    assert cross_entropy(logits, labels) == 0
    assert not jax.grad(cross_entropy)(logits, labels).any()


def test_float32_inside():
    logits = jnp.array([[60.0, 0.0]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.array([1]))
    assert loss.dtype == jnp.float32 and abs(float(loss) - 60) < 1e-3


def batch(ids, **more):
    return {"input_ids": jnp.array(ids), "labels": jnp.array(ids), **{k: jnp.array(v) for k, v in more.items()}}


def test_padding_predicts_nothing_and_is_not_predicted():
    model = tiny_llama()
    alone = next_token_loss(model, batch([[5, 6, 7]]))
    for ids, mask in (([[5, 6, 7, 9, 9]], [[1, 1, 1, 0, 0]]), ([[9, 9, 5, 6, 7]], [[0, 0, 1, 1, 1]])):
        padded = next_token_loss(model, batch(ids, attention_mask=mask))
        assert padded[1] == alone[1] == 2
        np.testing.assert_allclose(padded[0], alone[0], rtol=1e-6)


def test_packed_rows_are_the_rows_alone():
    model = tiny_llama()
    rows = [next_token_loss(model, batch([ids])) for ids in ([5, 6, 7], [8, 9])]
    packed = next_token_loss(model, batch([[5, 6, 7, 8, 9, 3]], segment_ids=[[1, 1, 1, 2, 2, 0]]))
    assert packed[1] == 3
    np.testing.assert_allclose(packed[0], rows[0][0] + rows[1][0], rtol=1e-6)


def test_an_attention_mask_narrows_the_segments():
    model = tiny_llama()
    segments = [[1, 1, 1, 2, 2, 2]]
    both = next_token_loss(
        model, batch([[5, 6, 7, 8, 9, 3]], segment_ids=segments, attention_mask=[[1, 1, 1, 1, 1, 0]])
    )
    short = next_token_loss(model, batch([[5, 6, 7, 8, 9]], segment_ids=[[1, 1, 1, 2, 2]]))
    assert both[1] == short[1] == 3
    np.testing.assert_allclose(both[0], short[0], rtol=1e-6)


def test_figures_count_the_likeliest_tokens():
    model, batch = tiny_llama(), token_batch()
    total, weight, metrics = jaxft.losses.next_token_figures(model, batch)
    hits, counted = metrics["token_accuracy"]
    assert (float(total), float(weight)) == tuple(map(float, jaxft.losses.next_token_loss(model, batch)[:2]))
    guesses, labels = (
        np.asarray(model(batch["input_ids"], batch["attention_mask"]).argmax(-1)),
        np.array(batch["labels"]),
    )
    said = [
        guess[t] == label[t + 1]
        for guess, label in zip(guesses, labels, strict=True)
        for t in range(11)
        if label[t + 1] >= 0
    ]
    assert (float(hits), float(counted)) == (
        sum(said),
        len(said) - 1,
    )  # the row padded left: its first predicts nothing
    right = {**batch, "labels": jnp.pad(jnp.asarray(guesses)[:, :-1], ((0, 0), (1, 0)))}
    hits, counted = jaxft.losses.next_token_figures(model, right)[2]["token_accuracy"]
    assert float(hits) == float(counted) > 20


def test_a_model_that_predicts_no_next_token():
    batch = {**token_batch(), "labels": token_batch()["input_ids"]}
    with pytest.raises(jaxft.BatchError, match="a BertModel predicts no next token"):
        next_token_loss(jaxft.testing.tiny_bert(), batch)
