"""The advantages and the loss of GRPO against numbers worked out by hand, and what must not count."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.losses import group_advantages, grpo_loss

close = partial(np.testing.assert_allclose, atol=2e-6)
LOG2, ROOT2 = 0.693147, 1.414214
RNG = np.random.default_rng(0)
X, Y, Z = RNG.standard_normal((3, 4, 6)).astype(np.float32)
A = RNG.standard_normal(4).astype(np.float32)
MASK = jnp.arange(6)[None] < jnp.array([6, 3, 1, 0])[:, None]

# two answers, of two tokens and of one, their ratios 2, 1 and 1 / 2
NEW = jnp.log(jnp.array([[2.0, 1.0, 1.0], [0.5, 1.0, 1.0]]))
OLD, SOME, SIGNS = jnp.zeros((2, 3)), jnp.array([[1, 1, 0], [1, 0, 0]]), jnp.array([1.0, -1.0])
hand = partial(grpo_loss, NEW, OLD, SIGNS, SOME, clip=0.2, clip_high=0.28)

OPTIONS = {
    **{reduction: {"reduction": reduction} for reduction in ("grpo", "bnpo", "dapo", "none")},
    "dr_grpo": {"reduction": "dr_grpo", "max_length": 6},
    "dapo, tokens": {"tokens": 20},
    "sequence": {"ratio": "sequence"},
    "kl": {"kl_coefficient": 0.1},
    "kl, corrected": {"kl_coefficient": 0.1, "correct_kl": True},
}


def test_advantages_by_hand():
    """Means 2 and 5; a std of sqrt 2 with Bessel's correction, over the batch sqrt(11 / 3)."""
    rewards = jnp.array([1.0, 3.0, 5.0, 5.0])
    close(group_advantages(rewards, group_size=2), [-1 / (ROOT2 + 1e-4), 1 / (ROOT2 + 1e-4), 0, 0])
    close(group_advantages(rewards, group_size=2, scale="none"), [-1, 1, 0, 0])
    spread = 1.914854 + 1e-4
    close(group_advantages(rewards, group_size=2, scale="batch"), [-1 / spread, 1 / spread, 0, 0])
    assert not group_advantages(rewards, group_size=1).any()


def test_equal_rewards_teach_nothing():
    """The mean of seven times 10000.1 is 0.001 beside it in float32, which 1e-4 in the place of a std would blow up."""
    for level in (0.1, 1e4 + 0.1):
        assert not group_advantages(jnp.full(14, level), group_size=7).any()


def test_an_answer_that_does_not_count():
    rewards, mask = jnp.array([1.0, jnp.nan, 3.0, 7.0, 1e6, jnp.inf]), jnp.array([1, 0, 1, 1, 0, 0])
    close(group_advantages(rewards, group_size=3, mask=mask), [-1 / (ROOT2 + 1e-4), 0, 1 / (ROOT2 + 1e-4), 0, 0, 0])
    close(group_advantages(rewards, group_size=3, mask=mask, scale="none"), [-1, 0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"reduction": "none"}, [[-1.28, -1, 0], [0.8, 0, 0]]),
        ({"reduction": "grpo"}, (-1.14 + 0.8) / 2),
        ({"reduction": "bnpo"}, -1.48 / 3),
        ({"reduction": "dapo"}, -1.48 / 3),
        ({"reduction": "dapo", "tokens": 6}, -1.48 / 6),
        ({"reduction": "dr_grpo", "max_length": 4}, -1.48 / 8),
        ({"reduction": "none", "clip_high": None}, [[-1.2, -1, 0], [0.8, 0, 0]]),
        ({"reduction": "none", "clip_high": 0.5, "ratio": "sequence"}, [[-ROOT2, -ROOT2, 0], [0.8, 0, 0]]),
    ],
)
def test_the_loss_by_hand(options, want):
    """min(2, 1.28), 1, and -max(1 / 2, 0.8); of a sequence exp((log 2 + 0) / 2)."""
    close(hand(**options), want)


def test_the_kl_by_hand():
    """The reference gives each token twice the probability: k3 = 2 - 1 - log 2; corrected times 2, 1 and 1 / 2."""
    k3, kl = 1 - LOG2, {"ref_log_probs": NEW + LOG2, "kl_coefficient": 0.5, "reduction": "none"}
    close(hand(**kl) - hand(reduction="none"), 0.5 * k3 * SOME)
    close(hand(**kl, correct_kl=True) - hand(reduction="none"), 0.5 * k3 * np.array([[2, 1, 0], [0.5, 0, 0]]))


def test_the_gradient_by_hand():
    """-A ratio / 3 where clipping does not bind; of a sequence half of -A ratio goes to each of two tokens."""
    grad = jax.grad(lambda x, **options: grpo_loss(x, OLD, SIGNS, SOME, clip=0.2, clip_high=0.28, **options))
    close(grad(NEW), [[0, -1 / 3, 0], [0, 0, 0]])
    close(grad(NEW, ratio="sequence"), np.zeros((2, 3)))
    wide = jax.grad(lambda x: grpo_loss(x, OLD, SIGNS, SOME, clip=0.9, ratio="sequence", reduction="grpo"))(NEW)
    close(wide, [[-ROOT2 / 4, -ROOT2 / 4, 0], [0.25, 0, 0]])


def test_advantages_of_each_token():
    each = jnp.broadcast_to(SIGNS[:, None], (2, 3))
    close(grpo_loss(NEW, OLD, each, SOME), grpo_loss(NEW, OLD, SIGNS, SOME))


@pytest.mark.parametrize("reduction", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_an_answer_without_tokens_does_not_count(reduction):
    f = partial(grpo_loss, reduction=reduction, max_length=6)
    close(f(X, Y, A, MASK), f(X[:3], Y[:3], A[:3], MASK[:3]))
    assert f(X, Y, A, jnp.zeros((4, 6))) == 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_junk_at_places_that_do_not_count_changes_nothing(options):
    """And log ratios whose exp is infinite, at places that count, have gradients; infinite times 0 would be NaN."""

    def f(new, old, ref, advantages):
        return grpo_loss(new, old, advantages, MASK, ref_log_probs=ref, **options).sum()

    results = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))
    want = jax.tree.leaves(results(X, Y, Z, A))
    for junk in (jnp.nan, jnp.inf, 300, 1e6):
        dirty = [*(jnp.where(MASK, x, junk) for x in (X, Y, Z)), jnp.where(MASK.any(1), A, junk)]
        for x, clean in zip(jax.tree.leaves(results(*dirty)), want, strict=True):
            assert np.isfinite(x).all() and np.array_equal(x, clean) and x.dtype == jnp.float32
    for size in (300.0, -300.0):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(results(X + size, Y, Z, A)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float32_inside_and_mapped(options):
    f = lambda x, y, z, a, mask: grpo_loss(x, y, a, mask, ref_log_probs=z, **options)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (X, Y, Z, A)]
    assert np.array_equal(f(*low, MASK), f(*(x.astype(jnp.float32) for x in low), MASK))
    both = jax.jit(jax.vmap(f, (0, 0, 0, 0, None)))(*(jnp.stack([x, x]) for x in (X, Y, Z, A)), MASK)
    close(both, jnp.stack([f(X, Y, Z, A, 0.5 * MASK)] * 2), rtol=1e-5)  # any float but 0 counts


def test_what_cannot_be():
    with pytest.raises(jaxft.MethodError, match="(?s)clip=0:.*ratio='word'.*reduction='mean'"):
        grpo_loss(X, Y, A, MASK, clip=0, clip_high=0.2, ratio="word", reduction="mean")
    with pytest.raises(jaxft.MethodError, match="dr_grpo divides by the longest answer"):
        grpo_loss(X, Y, A, MASK, reduction="dr_grpo")
    with pytest.raises(jaxft.BatchError, match="kl_coefficient=0.1 needs ref_log_probs"):
        grpo_loss(X, Y, A, MASK, kl_coefficient=0.1)
    with pytest.raises(jaxft.BatchError, match=r"advantages is \[3\]"):
        grpo_loss(X, Y, A[:3], MASK)
    with pytest.raises(jaxft.BatchError, match="groups of 4"):
        group_advantages(jnp.ones(6), group_size=4)
    with pytest.raises(jaxft.MethodError, match="scale=True: choose"):
        group_advantages(jnp.ones(6), group_size=3, scale=True)
