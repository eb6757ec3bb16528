"""Losses of preferences against numbers worked out by hand, and what must not count."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.losses import dpo_loss, kto_loss, ranking_loss, reward_loss

# log(1 + e^-h), the loss of a difference h
L0, L1, L2 = 0.693147, 0.313262, 0.126928
close = partial(np.testing.assert_allclose, atol=2e-6)
RNG = np.random.default_rng(0)
A, B, C, D = RNG.standard_normal((4, 5)).astype(np.float32)
GOOD = jnp.array([1, 0, 0, 1, 1])
MASK = jnp.array([1, 0, 1, 1, 0])
LISTS = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
SCORES = RNG.standard_normal((5, 4)).astype(np.float32)

# a loss of the arrays that it takes, one number a row
PAIRS = {
    "reward": (reward_loss, (A, B)),
    "reward, centred": (partial(reward_loss, margin=0.3, centering=0.1), (A, B)),
    "reward, margins": (lambda a, b, m, **options: reward_loss(a, b, margin=m, **options), (A, B, C)),
    "dpo": (partial(dpo_loss, beta=0.7), (A, B, C, D)),
    "dpo, conservative": (partial(dpo_loss, beta=0.7, label_smoothing=0.1), (A, B, C, D)),
    "robust": (partial(dpo_loss, beta=0.7, kind="robust", label_smoothing=0.1), (A, B, C, D)),
    "hinge": (partial(dpo_loss, beta=0.7, kind="hinge"), (A, B, C, D)),
    "ipo": (partial(dpo_loss, beta=0.7, kind="ipo"), (A, B, C, D)),
    "kto": (lambda a, b, kl, **options: kto_loss(a, b, GOOD, kl=kl, beta=0.7, **options), (A, B, C)),
}


def test_reward_by_hand():
    chosen, rejected = jnp.array([2.0, 1.0]), jnp.array([0.0, 1.0])
    close(reward_loss(chosen, rejected), (L2 + L0) / 2)
    close(reward_loss(chosen, rejected, reduction="none"), [L2, L0])
    close(reward_loss(chosen, rejected, margin=2.0, reduction="none")[0], L0)
    close(reward_loss(chosen, rejected, margin=jnp.array([1.0, -1.0]), reduction="none"), [L1, L1])
    centred = reward_loss(chosen, rejected, centering=0.1, reduction="none")
    close(centred, [L2 + 0.1 * 2**2, L0 + 0.1 * 2**2])


def test_the_gradient_is_what_the_model_had_wrong():
    """d loss / d chosen = sigmoid(chosen - rejected) - 1."""
    chosen, rejected = jax.grad(reward_loss, (0, 1))(jnp.array([2.0]), jnp.array([0.0]))
    close(chosen, -0.119203)
    close(rejected, 0.119203)


def test_ranking_by_hand():
    """Differences of 1, 2, 1, and of 0: each list counts once, and not each pair."""
    scores, mask = jnp.array([[2.0, 1.0, 0.0], [5.0, 5.0, jnp.nan]]), jnp.array([[1, 1, 1], [1, 1, 0]])
    first = (L1 + L2 + L1) / 3
    close(ranking_loss(scores, mask, reduction="none"), [first, L0])
    close(ranking_loss(scores, mask), (first + L0) / 2)
    close(ranking_loss(scores, mask, centering=0.1, reduction="none")[1], L0 + 0.1 * 10**2)


def test_a_list_of_two_is_a_pair():
    scores = jnp.stack([A, B], 1)
    for centering in (0.0, 0.1):
        pair = reward_loss(A, B, centering=centering)
        close(ranking_loss(scores, jnp.ones((5, 2)), centering=centering), pair)


def test_a_list_of_one_does_not_count():
    some, all_ = ranking_loss(SCORES[:3], LISTS[:3]), ranking_loss(SCORES, LISTS)
    close(some, all_)
    assert not ranking_loss(SCORES, LISTS, reduction="none")[3:].any()


def test_an_answer_may_be_missing_anywhere():
    whole = ranking_loss(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[1, 1, 1]]))
    close(ranking_loss(jnp.array([[2.0, 7.0, 1.0, 0.0]]), jnp.array([[1.0, 0.0, 1.0, 1.0]])), whole)


@pytest.mark.parametrize(
    ("kind", "smoothing", "right", "wrong"),
    [
        ("sigmoid", 0.0, L1, L1 + 1),  # log(1 + e) = 1 + log(1 + 1 / e)
        ("sigmoid", 0.1, 0.9 * L1 + 0.1 * (L1 + 1), 0.9 * (L1 + 1) + 0.1 * L1),
        ("robust", 0.1, (0.9 * L1 - 0.1 * (L1 + 1)) / 0.8, (0.9 * (L1 + 1) - 0.1 * L1) / 0.8),
        ("robust", 0.0, L1, L1 + 1),
        ("hinge", 0.0, 0, 2),  # 1 - 1, 1 + 1
        ("ipo", 0.0, (2 - 1) ** 2, (-2 - 1) ** 2),  # 1 / (2 beta) = 1
    ],
)
def test_dpo_by_hand(kind, smoothing, right, wrong):
    """Log ratios of 1 and -1, and the other way round: h = 0.5 x 2 = 1, and -1."""
    up, down, ref = jnp.array([-1.0, -3.0]), jnp.array([-3.0, -1.0]), jnp.array([-2.0, -2.0])
    losses = dpo_loss(up, down, ref, ref, beta=0.5, kind=kind, label_smoothing=smoothing, reduction="none")
    close(losses, [right, wrong])
    moved = dpo_loss(up + 1, down, ref + 1, ref, beta=0.5, kind=kind, label_smoothing=smoothing, reduction="none")
    close(moved, losses)
    close(dpo_loss(up, down, ref, ref, beta=0.5, kind=kind, label_smoothing=smoothing), (right + wrong) / 2)


def test_kto_by_hand():
    """Log ratios of 1, desirable, and -1, undesirable; a reference point of 1: sigmoid of 0 and of 2."""
    policy, ref, good = jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]), jnp.array([True, False])
    losses = partial(kto_loss, policy, ref, good, beta=1.0, reduction="none")
    close(losses(kl=jnp.array([2.0, 0.0])), [0.5, 1 - 0.880797])
    close(losses(kl=1.0, desirable_weight=3.0, undesirable_weight=2.0), [1.5, 2 - 2 * 0.880797])
    close(losses(kl=jnp.array([-2.0, 0.0])), [1 - 0.731059, 1 - 0.731059])  # never below 0
    close(kto_loss(policy, ref, good, kl=1.0, beta=0.5), (0.5 + 1 - 0.731059) / 2)
    mask = jnp.array([1, 0])
    close(losses(kl=jnp.array([2.0, jnp.nan]), mask=mask), [0.731059, 0])  # a point of 2: sigmoid(2 - 1)


def test_no_gradient_through_the_reference_point():
    grad = jax.grad(lambda kl: kto_loss(A, B, GOOD, kl=kl, beta=0.7))(jnp.abs(C))
    assert not grad.any()


@pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS)
def test_junk_in_rows_that_do_not_count_changes_nothing(case):
    """And differences of 1e4 in those that do are finite, their gradients too."""
    loss, arrays = case
    f = jax.jit(jax.value_and_grad(partial(loss, mask=MASK), tuple(range(len(arrays)))))
    value, grads = f(*arrays)
    rows = partial(loss, reduction="none", mask=MASK)(*arrays)
    close(value, rows[MASK == 1].mean())
    assert not rows[MASK == 0].any() and not grads[0][MASK == 0].any() and grads[0][MASK == 1].any()
    for junk in (jnp.nan, jnp.inf, 1e6):
        got = f(*(jnp.where(MASK == 1, x, junk) for x in arrays))
        assert np.isfinite(got[0]) and jax.tree.all(jax.tree.map(np.array_equal, got, (value, grads)))
    for size in (1e4, -1e4):
        far = f(arrays[0] + size, arrays[1] - size, *arrays[2:])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(far))


def test_junk_in_lists_changes_nothing():
    f = jax.jit(jax.value_and_grad(partial(ranking_loss, centering=0.1)))
    want = f(SCORES, LISTS)
    assert not want[1][LISTS == 0].any() and want[1][:3][LISTS[:3] == 1].all()
    for junk in (jnp.nan, jnp.inf, 1e6):
        got = f(jnp.where(LISTS == 1, SCORES, junk), LISTS)
        assert np.isfinite(got[0]) and jax.tree.all(jax.tree.map(np.array_equal, got, want))


@pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS)
def test_nothing_that_counts_is_zero_and_not_nan(case):
    loss, arrays = case
    value, grads = jax.value_and_grad(partial(loss, mask=jnp.zeros(5)), (0, 1))(*arrays)
    assert value == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS)
def test_float32_inside_jitted_and_mapped(case):
    """Numbers of bfloat16 are computed as those numbers in float32; two at once as each alone."""
    loss, arrays = case
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    got = jax.jit(loss)(*low)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loss(*(x.astype(jnp.float32) for x in low)), rtol=1e-6)
    both = jax.jit(jax.vmap(loss))(*(jnp.stack([x, 2 * x]) for x in arrays))
    np.testing.assert_allclose(both, [loss(*arrays), loss(*(2 * x for x in arrays))], rtol=1e-6)


def test_what_cannot_be():
    with pytest.raises(jaxft.MethodError, match="(?s)kind='simpo'.*label_smoothing=0.5.*beta=0.*reduction='sum'"):
        dpo_loss(A, B, C, D, beta=0, kind="simpo", label_smoothing=0.5, reduction="sum")
    with pytest.raises(jaxft.MethodError, match="ipo has none"):
        dpo_loss(A, B, C, D, beta=0.1, kind="ipo", label_smoothing=0.1)
    with pytest.raises(jaxft.BatchError, match=r"chosen is \[5\], rejected is \[4\]"):
        reward_loss(A, B[:4])
    with pytest.raises(jaxft.BatchError, match=r"\[B, K\] of one shape; scores is \[5\]"):
        ranking_loss(A, A)
    with pytest.raises(jaxft.BatchError, match=r"takes arrays \[B\].*policy is \[5, 1\]"):
        kto_loss(A[:, None], B[:, None], GOOD[:, None], kl=0.0, beta=0.1)
