"""Attention against the library's own, and positions and masks worked out by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.flops import count_flops
from jaxft.models.attention import attend, causal_mask, default_positions, heads_first
from jaxft.models.seams import Past


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (6, 1)])
def test_against_jax(heads, kv):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, h, 7, 8)) for i, h in enumerate((heads, kv, kv)))
    mask = causal_mask(7, attention_mask=jnp.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1]]))

    def reference(q, k, v):
        return jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), mask=mask).swapaxes(1, 2)

    real = jnp.ones((2, 1, 7, 1)).at[1, :, :2].set(0)  # a query that sees nothing is defined by nobody

    def weighted(f):
        return lambda *x: (f(*x) * real * jnp.arange(8.0)[None, None, None]).sum()

    np.testing.assert_allclose(attend(q, k, v, mask) * real, reference(q, k, v) * real, atol=1e-6)
    ours = jax.grad(weighted(lambda *x: heads_first(*x, mask)), (0, 1, 2))(q, k, v)
    theirs = jax.grad(weighted(reference), (0, 1, 2))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def whole_scores(q, k, v, mask):
    """The formula in the plainest words, keys repeated."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = jnp.where(mask, q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5, -1e30)
    return jax.nn.softmax(scores, -1) @ v


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (6, 1)])
def test_values_and_gradients_are_the_formula_s(heads, kv, rows):
    """Masks of one row for all and of each row; a query that sees nothing is finite, and moves no key it cannot see."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, h, 7, 8)) for i, h in enumerate((heads, kv, kv)))
    mask = causal_mask(7, attention_mask=jnp.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])[:rows])
    cotangent = jax.random.normal(jax.random.key(3), q.shape)
    if rows == 2:
        cotangent = cotangent.at[1, :, :2].set(0)  # nothing reads the queries that see nothing
    ours, back = jax.vjp(lambda *x: heads_first(*x, mask), q, k, v)
    theirs, also = jax.vjp(lambda *x: whole_scores(*x, mask), q, k, v)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for a, b in zip(back(cotangent), also(cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_the_backward_pass_keeps_no_scores():
    q, k, v = (jnp.ones((2, 2, 32, 4)) for _ in range(3))
    _, back = jax.vjp(lambda *x: heads_first(*x, causal_mask(32)), q, k, v)
    kept = [x.size for x in jax.tree.leaves(back) if hasattr(x, "size")]
    assert kept and max(kept) < 2 * 2 * 32 * 32


def drawn(t, past):
    """Queries, keys, values, a causal mask with holes, and virtual places that some queries see less of."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, h, t, 8)) for i, h in enumerate((4, 2, 2)))
    mask = causal_mask(t, jnp.ones((2, t), int).at[0, 20:30].set(0)) & ~jnp.eye(t, k=-3, dtype=bool)[None, None]
    if past is None:
        return q, k, v, mask, None
    pk, pv = (jax.random.normal(jax.random.key(i), (1, 2, 3, 8)) for i in (7, 8))
    weight = jax.random.uniform(jax.random.key(9), (2, {"each": t, "one": 1}[past], 3))
    return q, k, v, mask, Past(pk, pv, weight, jnp.zeros((2, 1), int), 3)


@pytest.mark.parametrize("past", [None, "one", "each"])
@pytest.mark.parametrize("t", [64, 71])
def test_causal_attention_in_blocks_is_the_whole_one(t, past):
    q, k, v, mask, past = drawn(t, past)
    cotangent = jax.random.normal(jax.random.key(3), q.shape)
    blocks, back = jax.vjp(lambda *x: attend(*x, mask, past=past, causal=True, platform="cpu"), q, k, v)
    whole, also = jax.vjp(lambda *x: heads_first(*x, mask, past=past), q, k, v)
    np.testing.assert_allclose(blocks, whole, atol=1e-6)
    for a, b in zip(back(cotangent), also(cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("t", "part"), [(64, 5 / 8), (63, 1)])
def test_blocks_leave_out_what_is_not_seen(t, part):
    q, k, v, mask, _ = drawn(t, None)
    whole, causal = (
        count_flops(jax.make_jaxpr(partial(attend, causal=c, platform="cpu"))(q, k, v, mask)) for c in (False, True)
    )
    assert causal == part * whole > 0


def test_blocks_drop_each_their_own():
    v = jnp.broadcast_to(jnp.eye(64), (1, 1, 64, 64))
    dropped = attend(0 * v, 0 * v, v, causal_mask(64), rate=0.5, key=jax.random.key(0), causal=True)[0, 0]
    kept = np.asarray(dropped != 0)
    assert not np.triu(kept, 1).any() and abs(kept.sum() / (64 * 65 / 2) - 0.5) < 0.05
    first = [kept[row, :16].tolist() for row in (16, 32, 48)]  # of one key the first numbers are equal in any shape
    assert first[0] != first[1] != first[2] != first[0]


def test_dropout_of_the_probabilities():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 2, 4, 8)) for i in range(3))
    mask = causal_mask(4)
    dropped = attend(q, k, v, mask, rate=0.5, key=jax.random.key(0))
    mean = jnp.stack([attend(q, k, v, mask, rate=0.5, key=jax.random.key(i)) for i in range(400)]).mean(0)
    assert (dropped != attend(q, k, v, mask)).any()
    np.testing.assert_allclose(mean, attend(q, k, v, mask), atol=0.35)
    np.testing.assert_array_equal(attend(q, k, v, mask, rate=0.5), attend(q, k, v, mask))


def test_masks():
    mask = causal_mask(4, jnp.array([[1, 1, 1, 0]]), jnp.array([[1, 2, 2, 2]]))[0, 0]
    assert mask.astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    assert causal_mask(3).shape == (1, 1, 3, 3)


def test_positions():
    assert default_positions((1, 3)).tolist() == [[0, 1, 2]]
    assert default_positions((2, 4), jnp.array([[0, 1, 1, 0], [1, 1, 0, 1]])).tolist() == [[0, 0, 1, 1], [0, 1, 1, 2]]
    assert default_positions((1, 6), None, jnp.array([[0, 3, 3, 1, 1, 1]])).tolist() == [[0, 0, 1, 0, 1, 2]]
