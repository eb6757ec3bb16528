"""What PPO is made of against numbers worked out by hand, and what must not count."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft import losses

close = partial(np.testing.assert_allclose, atol=2e-6)
LOG2 = 0.693147
RNG = np.random.default_rng(0)
X, Y, Z = RNG.standard_normal((3, 4, 6)).astype(np.float32)
MASK = jnp.arange(6)[None] < jnp.array([6, 3, 1, 0])[:, None]
GAE = partial(losses.generalized_advantage_estimation, gamma=0.9, lam=0.5)

# functions of two or three arrays [B, T] and a mask
MASKED = {
    "masked_mean": (lambda x, mask: losses.masked_mean(x, mask), (X,)),
    "whiten": (losses.whiten, (X,)),
    "whiten, scale only": (partial(losses.whiten, shift_mean=False), (X,)),
    **{
        f"kl {kind}": (lambda x, y, mask, kind=kind: losses.kl_penalty(x, y, kind=kind, mask=mask), (X, Y))
        for kind in ("k1", "k2", "k3")
    },
    "rewards": (lambda x, mask: losses.place_rewards(jnp.arange(4.0), x, mask, beta=0.1), (X,)),
    "advantages": (GAE, (X, Y)),
    "policy": (partial(losses.ppo_policy_loss, clip=0.2), (X, Y, Z)),
    "value": (partial(losses.ppo_value_loss, clip=0.2), (X, Y, Z)),
    "value, not clipped": (partial(losses.ppo_value_loss, clip=None), (X, Y, Z)),
    "clip fraction": (partial(losses.clip_fraction, clip=0.2), (X, Y, Z)),
    "approximate kl": (losses.approximate_kl, (X, Y)),
    "explained variance": (losses.explained_variance, (X, Y)),
}


def test_advantages_by_hand():
    """delta = 0.9 x 0.4 - 0.5, 0.9 x 0.6 - 0.4, 1 - 0.6 = -0.14, 0.14, 0.4; gamma lam = 0.45. Then a row of one."""
    rewards = jnp.array([[0.0, 0.0, 1.0], [2.0, 9.0, 9.0]])
    values = jnp.array([[0.5, 0.4, 0.6], [0.5, 9.0, 9.0]])
    advantages, returns = GAE(rewards, values, jnp.array([[1, 1, 1], [1, 0, 0]]))
    close(advantages, [[-0.14 + 0.45 * 0.32, 0.14 + 0.45 * 0.4, 0.4], [1.5, 0, 0]])
    close(returns, [[0.504, 0.72, 1.0], [2.0, 0, 0]])


def test_a_place_in_between_is_passed_over():
    """delta_0 = 0.9 x 0.6 - 0.5 = 0.04, as if the row had two places; a prompt before the answer is nothing."""
    rewards, values = jnp.array([[9.0, 0.0, 9.0, 1.0, 9.0]]), jnp.array([[9.0, 0.5, jnp.nan, 0.6, 9.0]])
    advantages, returns = GAE(rewards, values, jnp.array([[0, 1, 0, 1, 0]]))
    close(advantages, [[0, 0.04 + 0.45 * 0.4, 0, 0.4, 0]])
    close(returns, [[0, 0.72, 0, 1.0, 0]])


def test_the_ends_of_lam():
    """lam = 1: what is to come, less the value; lam = 0: one step."""
    rewards, values, ones = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0.5, 1.0, 3.0]]), jnp.ones((1, 3))
    advantages, returns = losses.generalized_advantage_estimation(rewards, values, ones, gamma=1.0, lam=1.0)
    close(advantages, [[6.5, 5, 1]])
    close(returns, [[7, 6, 4]])
    advantages, _ = losses.generalized_advantage_estimation(rewards, values, ones, gamma=1.0, lam=0.0)
    close(advantages, [[1.5, 4, 1]])


def test_whiten_by_hand():
    """Mean 2, squares 1 + 1 + 0 over 3 - 1: var 1."""
    x, mask = jnp.array([[1.0, 3.0], [2.0, 1e6]]), jnp.array([[1, 1], [1, 0]])
    close(losses.whiten(x, mask), [[-1, 1], [0, 0]])
    close(losses.whiten(3 * x, mask, shift_mean=False), [[5, 7], [6, 0]])
    close(losses.whiten(x, jnp.array([[0, 0], [1, 0]])), np.zeros((2, 2)))
    close(losses.whiten(jnp.full((2, 2), 0.1), mask), np.zeros((2, 2)), rtol=0)
    assert not losses.whiten(jnp.full(7, 1.7), jnp.ones(7)).any()  # the mean of seven is not 1.7 to the bit


def test_kl_by_hand():
    """Probabilities of 1 / 4 under the policy and 1 / 2 under the reference: r = log 2; and the other way round."""
    policy, ref = jnp.log(jnp.array([0.25, 0.5])), jnp.log(jnp.array([0.5, 0.25]))
    close(losses.kl_penalty(policy, ref), [-LOG2, LOG2])
    close(losses.kl_penalty(policy, ref, kind="k2"), [LOG2**2 / 2] * 2)
    close(losses.kl_penalty(policy, ref, kind="k3"), [1 - LOG2, LOG2 - 0.5])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_over_what_the_policy_draws_is_the_kl(kind):
    """0.5 log(0.5 / 0.2) + 0.3 log 1 + 0.2 log(0.2 / 0.5) = 0.3 log 2.5."""
    p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, 0.3, 0.5])
    close((p * losses.kl_penalty(jnp.log(p), jnp.log(q), kind=kind)).sum(), 0.274887)


@pytest.mark.parametrize(
    ("position", "want"),
    [
        ("end", [[-0.5, 9.0, 0, 0], [-0.5, -1, -1.5, 18.0], [29.5, 0, 0, 0], [0, 0, 0, 0], [0, -1, 48.5, 0]]),
        ("after_end", [[-0.5, -1, 10, 0], [-0.5, -1, -1.5, 18.0], [-0.5, 30, 0, 0], [0, 0, 0, 0], [0, -1, -1.5, 50]]),
    ],
)
def test_rewards_by_hand(position, want):
    """Answers of two, four, one and no tokens, and of two behind a prompt; beta kl = 0.5, 1, 1.5, 2."""
    kl = jnp.broadcast_to(jnp.arange(1.0, 5.0), (5, 4))
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]])
    scores = jnp.array([10.0, 20.0, 30.0, 40.0, 50.0])
    rewards = losses.place_rewards(scores, jnp.where(mask == 1, kl, jnp.nan), mask, beta=0.5, position=position)
    close(rewards, want)
    places = mask if position == "end" else losses.with_place_after(mask)
    assert not rewards[places == 0].any()


def test_the_policy_loss_by_hand():
    """Ratios of 2 and 1 / 2, advantages of 1 and -1: clipping binds where the ratio went the right way."""
    new = jnp.log(jnp.array([[2.0, 2.0], [0.5, 0.5]]))
    old, advantages, ones = jnp.zeros((2, 2)), jnp.array([[1.0, -1.0], [1.0, -1.0]]), jnp.ones((2, 2))
    f = partial(losses.ppo_policy_loss, clip=0.2)
    close(f(new, old, advantages, ones, reduction="none"), [[-1.2, 2], [-0.5, 0.8]])
    close(f(new, old, advantages, ones), 1.1 / 4)
    close(jax.grad(f)(new, old, advantages, ones), [[0, 0.5], [-0.125, 0]])  # -A ratio / 4
    close(losses.clip_fraction(new, old, advantages, ones, clip=0.2), 0.5)
    close(losses.clip_fraction(new, old, advantages, ones, clip=1.5), 0)
    close(losses.approximate_kl(new, old, ones), ((1 - LOG2) + (LOG2 - 0.5)) / 2)


def test_the_value_loss_by_hand():
    """Old values of 0, clip 0.2. (0.2 - 1)^2 where the value is right but went too far, else (1 - -1)^2; halves."""
    values, old, returns = jnp.array([[1.0, 1.0, 0.1]]), jnp.zeros((1, 3)), jnp.array([[1.0, -1.0, 0.3]])
    f = partial(losses.ppo_value_loss, clip=0.2)
    close(f(values, old, returns, jnp.ones((1, 3)), reduction="none"), [[0.32, 2, 0.02]])
    close(f(values, old, returns, jnp.ones((1, 3))), 2.34 / 3)
    close(jax.grad(f)(values, old, returns, jnp.ones((1, 3))), [[0, 2 / 3, -0.2 / 3]])
    plain = losses.ppo_value_loss(values, old, returns, jnp.ones((1, 3)), clip=None, reduction="none")
    close(plain, [[0, 2, 0.02]])


def test_explained_variance_by_hand():
    """Returns 1, 2, 3 have a variance of 2 / 3; errors of 0, 0, 1 one of 2 / 9."""
    returns, ones = jnp.array([[1.0, 2.0, 3.0]]), jnp.ones((1, 3))
    close(losses.explained_variance(jnp.array([[1.0, 2.0, 2.0]]), returns, ones), 2 / 3)
    close(losses.explained_variance(returns + 5, returns, ones), 1)  # an offset is no variance
    assert losses.explained_variance(returns, jnp.ones((1, 3)), ones) == 0


@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)
def test_junk_at_places_that_do_not_count_changes_nothing(case):
    f, arrays = case

    @jax.jit
    def results(*arrays):
        total = lambda *arrays: sum(x.sum() for x in jax.tree.leaves(f(*arrays, mask=MASK)))
        return jax.tree.leaves((f(*arrays, mask=MASK), jax.grad(total, tuple(range(len(arrays))))(*arrays)))

    want = results(*arrays)
    assert any(x.any() for x in want)
    for junk in (jnp.nan, jnp.inf, 300, 1e6):
        got = results(*(jnp.where(MASK, x, junk) for x in arrays))
        for x, clean in zip(got, want, strict=True):
            assert np.isfinite(x).all() and np.array_equal(x, clean) and x.dtype == jnp.float32
            assert not x.ndim or not x[~MASK].any()


@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)
def test_nothing_that_counts_is_zero_and_not_nan(case):
    f, arrays = case
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(f(*arrays, mask=jnp.zeros((4, 6)))))


@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)
def test_float32_inside_and_mapped(case):
    f, arrays = case
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    got, want = f(*low, mask=MASK), f(*(x.astype(jnp.float32) for x in low), mask=MASK)
    assert jax.tree.all(jax.tree.map(np.array_equal, got, want))
    both = jax.jit(jax.vmap(partial(f, mask=MASK)))(*(jnp.stack([x, x]) for x in arrays))
    some = f(*arrays, mask=0.5 * MASK)  # any float but 0 counts
    jax.tree.map(lambda a, b: close(a, jnp.stack([b, b]), rtol=1e-5), both, some)


@pytest.mark.parametrize("size", [300.0, -300.0, 1e30])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_log_ratios_beyond_float32_are_finite(size, advantage):
    """exp(300) is infinite, and infinite times a gradient of 0 is NaN."""
    ones = jnp.ones((1, 2))
    new, old, advantages = jnp.array([[size, 0.0]]), jnp.zeros((1, 2)), jnp.full((1, 2), advantage)
    value, grad = jax.value_and_grad(partial(losses.ppo_policy_loss, clip=0.2))(new, old, advantages, ones)
    assert np.isfinite(value) and np.isfinite(grad).all()
    for kl in (losses.kl_penalty(old, new, kind="k3"), losses.kl_penalty(new, old, kind="k3")):
        assert np.isfinite(kl).all() and (kl >= 0).all()


def test_what_cannot_be():
    with pytest.raises(jaxft.MethodError, match="kind='k4': choose"):
        losses.kl_penalty(X, Y, kind="k4")
    with pytest.raises(jaxft.MethodError, match="position='eos': choose"):
        losses.place_rewards(jnp.ones(4), X, MASK, beta=0.1, position="eos")
    with pytest.raises(jaxft.MethodError, match="clip=0: give a number above 0"):
        losses.ppo_policy_loss(X, Y, Z, MASK, clip=0)
    with pytest.raises(jaxft.MethodError, match="reduction='sum'"):
        losses.ppo_value_loss(X, Y, Z, MASK, clip=0.2, reduction="sum")
    with pytest.raises(jaxft.BatchError, match=r"rewards is \[4, 6\], values is \[4, 5\]"):
        GAE(X, Y[:, :5], MASK)
    with pytest.raises(jaxft.BatchError, match=r"scores \[B\] and kl \[B, T\]; these are \[3\], \[4, 6\]"):
        losses.place_rewards(jnp.ones(3), X, MASK, beta=0.1)
