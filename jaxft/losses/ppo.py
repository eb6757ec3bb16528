"""What proximal policy optimisation is made of. Shapes: B answers, T places, one for each token of an answer.

A mask is nonzero at the places that count; what stands at others, NaN included, changes nothing. Where the masks of
trl 1.12's PPOTrainer, the last there is, go by the pad id, these go by what they are given.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..errors import BatchError, MethodError

STEEPEST = 20.0  # a log ratio beyond counts as this: its exp, 5e8, and all gradients are finite


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean over the places that count, float32; 0 where there are none.

    Args:
        x: `[...]`, any dtype.
        mask: `[...]`.

    >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1, 1, 0])))
    2.0
    """
    check_places("masked_mean", x=x, mask=mask)
    return kept(x, mask).sum() / jnp.maximum((mask != 0).sum(), 1)


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True) -> jax.Array:
    """Return `(x - mean) / sqrt(var + 1e-8)` over the places that count, var with Bessel's correction: as trl.

    Args:
        x: `[...]`, any float dtype.
        mask: `[...]`.
        shift_mean: False: the mean is added again, and only the scale changes.

    Returns:
        `[...]` float32, 0 at places that do not count; 0 too, or the mean, where all are equal.

    >>> [f"{x:.4f}" for x in whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0]))]  # var 2
    ['-0.7071', '0.7071', '0.0000']
    """
    check_places("whiten", x=x, mask=mask)
    mean, real = masked_mean(x, mask), kept(x, mask)
    level = real.max(where=mask != 0, initial=-jnp.inf)
    away = jnp.where(((real == level) | (mask == 0)).all(), 0, kept(real - mean, mask))  # no rounding in equal numbers
    variance = (away**2).sum() / jnp.maximum((mask != 0).sum() - 1, 1)
    return kept(away * jax.lax.rsqrt(variance + 1e-8) + (0 if shift_mean else mean), mask)


def kl_penalty(
    log_probs: jax.Array, ref_log_probs: jax.Array, *, kind: str = "k1", mask: jax.Array | None = None
) -> jax.Array:
    """Return an estimate of KL(policy || reference) from tokens that the policy drew (Schulman 2020).

    With r = ref - policy: `k1` is -r, unbiased; `k2` r^2 / 2; `k3` exp(r) - 1 - r, unbiased and never negative, where
    r beyond 20 counts as 20.

    Args:
        log_probs: `[...]`, of the drawn tokens under the policy, any float dtype.
        ref_log_probs: `[...]`, under the reference.
        kind: One of those above.
        mask: `[...]`; None: all places count.

    Returns:
        `[...]` float32, 0 at places that do not count.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: No such kind.

    >>> [f"{kl_penalty(jnp.float32(-1), jnp.float32(-3), kind=kind):.4f}" for kind in ("k1", "k2", "k3")]
    ['2.0000', '2.0000', '1.1353']
    """
    if kind not in ("k1", "k2", "k3"):
        raise MethodError(f"kl_penalty: kind={kind!r}: choose 'k1', 'k2' or 'k3'")
    mask = jnp.ones(log_probs.shape, bool) if mask is None else mask
    check_places("kl_penalty", log_probs=log_probs, ref_log_probs=ref_log_probs, mask=mask)
    r = kept(ref_log_probs, mask) - kept(log_probs, mask)
    if kind == "k1":
        return -r
    if kind == "k2":
        return r**2 / 2
    r = jnp.clip(r, -STEEPEST, STEEPEST)
    return jnp.expm1(r) - r


def place_rewards(scores: jax.Array, kl: jax.Array, mask: jax.Array, *, beta: Any, position: str = "end") -> jax.Array:
    """Return `-beta kl` at every token, and the answer's score added at its last (Ziegler et al. 2019).

    Args:
        scores: `[B]`, of the answers, any float dtype. That of an answer without tokens is placed nowhere.
        kl: `[B, T]`, of `kl_penalty`.
        mask: `[B, T]`, of the tokens.
        beta: Coefficient of the penalty, a number or a scalar array.
        position: `"end"`: the last token, as OpenRLHF; `"after_end"`: the place after it, the last one where there is
            none, as trl. The advantages and the value loss then need the mask `with_place_after(mask)`.

    Returns:
        `[B, T]` float32, 0 at places that do not count.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: No such position.

    >>> place_rewards(jnp.array([1.0]), jnp.ones((1, 3)), jnp.array([[1, 1, 0]]), beta=0.5).tolist()
    [[-0.5, 0.5, 0.0]]
    """
    if position not in ("end", "after_end"):
        raise MethodError(f"place_rewards: position={position!r}: choose 'end' or 'after_end'")
    check_places("place_rewards", kl=kl, mask=mask)
    if kl.ndim != 2 or scores.shape != kl.shape[:1]:
        raise BatchError(
            f"place_rewards takes scores [B] and kl [B, T]; these are {list(scores.shape)}, {list(kl.shape)}"
        )
    there = mask != 0 if position == "end" else with_place_after(mask)
    last = there & (jnp.cumsum(there[:, ::-1], 1)[:, ::-1] == 1)  # the only one from here on
    return -beta * kept(kl, mask) + kept(jnp.broadcast_to(scores[:, None], kl.shape), last)


def with_place_after(mask: jax.Array) -> jax.Array:
    """Return `[B, T]` bool: the places of a mask `[B, T]`, and in each row the one after its last, where it fits.

    >>> with_place_after(jnp.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])).astype(int).tolist()
    [[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]
    """
    real = mask != 0
    return real | (jnp.pad(real, ((0, 0), (1, 0)))[:, :-1] & (jnp.cumsum(real[:, ::-1], 1)[:, ::-1] == 0))


def generalized_advantage_estimation(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Return advantages `A_t = d_t + gamma lam A_t+1`, `d_t = r_t + gamma V_t+1 - V_t`, and returns `A_t + V_t`.

    Schulman et al. 2016. After the last place there is nothing: V and A are 0 there. A place in between that does not
    count is passed over.

    Args:
        rewards: `[B, T]`, any float dtype.
        values: `[B, T]`, of the state before each token.
        mask: `[B, T]`.
        gamma: Discount of a place.
        lam: 0: one step, much bias; 1: the whole answer, much variance.

    Returns:
        Advantages and returns `[B, T]` float32, 0 at places that do not count.

    Raises:
        BatchError: Shapes that do not fit.

    >>> rewards, values, mask = jnp.array([[0.0, 1.0, 9.0]]), jnp.array([[0.5, 0.5, 9.0]]), jnp.array([[1, 1, 0]])
    >>> advantages, returns = generalized_advantage_estimation(rewards, values, mask, gamma=1.0, lam=0.5)
    >>> advantages.tolist(), returns.tolist()  # 0.5 - 0.5 + 0.5 x 0.5, 1 - 0.5
    ([[0.25, 0.5, 0.0]], [[0.75, 1.0, 0.0]])
    """
    check_places("generalized_advantage_estimation", rewards=rewards, values=values, mask=mask)
    real, values = mask != 0, kept(values, mask)

    def back(after: tuple[jax.Array, jax.Array], place: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        advantage, value = after
        r, v, real = place
        found = r + gamma * value - v + gamma * lam * advantage
        return (jnp.where(real, found, advantage), jnp.where(real, v, value)), jnp.where(real, found, 0)

    nothing = jnp.zeros(values.shape[:-1], jnp.float32)
    places = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (kept(rewards, mask), values, real))
    advantages = jnp.moveaxis(jax.lax.scan(back, (nothing, nothing), places, reverse=True)[1], 0, -1)
    return advantages, advantages + values


def ppo_policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: float,
    reduction: str = "mean",
) -> jax.Array:
    """Return `max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))`, `ratio = exp(log_probs - old_log_probs)`.

    Schulman et al. 2017, the mean over all tokens as trl. A log ratio beyond +-20 counts as that.

    Args:
        log_probs: `[B, T]`, of the drawn tokens under the policy, any float dtype.
        old_log_probs: `[B, T]`, under the policy that drew them.
        advantages: `[B, T]`, A.
        mask: `[B, T]`, of the tokens.
        clip: How far the ratio may be from 1 and still be rewarded for going on.
        reduction: `"mean"` over the places that count, or `"none"`: `[B, T]`, zeros at others.

    Returns:
        A float32 scalar, or `[B, T]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> new, old, mask = jnp.log(jnp.array([[2.0, 0.5]])), jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> f"{ppo_policy_loss(new, old, jnp.array([[1.0, 1.0]]), mask, clip=0.2):.2f}"  # -(1.2 + 0.5) / 2
    '-0.85'
    """
    plain, clipped = _policy_losses("ppo_policy_loss", log_probs, old_log_probs, advantages, mask, clip)
    return _over_places("ppo_policy_loss", jnp.maximum(plain, clipped), mask, reduction)


def ppo_value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip: float | None,
    reduction: str = "mean",
) -> jax.Array:
    """Return `max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2`, as trl.

    Args:
        values: `[B, T]`, v, any float dtype.
        old_values: `[B, T]`, those that the advantages were made of.
        returns: `[B, T]`, R.
        mask: `[B, T]`.
        clip: How far a value may go from the old one; None: any distance.
        reduction: As for `ppo_policy_loss`.

    Returns:
        A float32 scalar, or `[B, T]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> one, none = jnp.ones((1, 1)), jnp.zeros((1, 1))
    >>> f"{ppo_value_loss(one, none, one, one, clip=0.2):.2f}"  # (0.2 - 1)^2 / 2
    '0.32'
    """
    _check_clip("ppo_value_loss", 1 if clip is None else clip)
    check_places("ppo_value_loss", values=values, old_values=old_values, returns=returns, mask=mask)
    values, old, returns = (kept(x, mask) for x in (values, old_values, returns))
    errors = (values - returns) ** 2
    if clip is not None:
        errors = jnp.maximum(errors, (jnp.clip(values, old - clip, old + clip) - returns) ** 2)
    return _over_places("ppo_value_loss", errors / 2, mask, reduction)


def clip_fraction(
    log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, mask: jax.Array, *, clip: float
) -> jax.Array:
    """Return the share of tokens at which clipping binds, so that they have no gradient. Arguments as the loss has.

    >>> new, old, mask = jnp.log(jnp.array([[2.0, 0.5]])), jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> float(clip_fraction(new, old, jnp.array([[1.0, 1.0]]), mask, clip=0.2))
    0.5
    """
    plain, clipped = _policy_losses("clip_fraction", log_probs, old_log_probs, advantages, mask, clip)
    return masked_mean(clipped > plain, mask)


def approximate_kl(log_probs: jax.Array, old_log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean over the tokens of `ratio - 1 - log ratio`: KL(old policy || policy), k3 (Schulman 2020).

    Args:
        log_probs: `[B, T]`, of the drawn tokens under the policy.
        old_log_probs: `[B, T]`, under the policy that drew them.
        mask: `[B, T]`.

    >>> f"{approximate_kl(jnp.log(jnp.array([2.0])), jnp.zeros(1), jnp.ones(1)):.4f}"  # 2 - 1 - log 2
    '0.3069'
    """
    return masked_mean(kl_penalty(old_log_probs, log_probs, kind="k3", mask=mask), mask)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """Return `1 - var(returns - values) / var(returns)`: 1 for a perfect critic, 0 for one that says the mean.

    Args:
        values: `[B, T]`.
        returns: `[B, T]`.
        mask: `[B, T]`.

    Returns:
        A float32 scalar, at most 1; 0 where all returns are equal.

    >>> float(explained_variance(jnp.array([0.0, 0.0]), jnp.array([1.0, 3.0]), jnp.ones(2)))
    0.0
    """
    check_places("explained_variance", values=values, returns=returns, mask=mask)

    def variance(x: jax.Array) -> jax.Array:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    values, returns = kept(values, mask), kept(returns, mask)
    whole = variance(returns)
    return jnp.where(whole > 0, 1 - variance(returns - values) / jnp.where(whole > 0, whole, 1), 0)


def kept(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return an array in float32, 0 at places that do not count."""
    return jnp.where(mask != 0, x.astype(jnp.float32), 0)


def log_ratios(log_probs: jax.Array, old_log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """Return log ratios `[B, T]` float32 that exp can take: between -20 and 20, 0 at places that do not count."""
    return jnp.clip(kept(log_probs, mask) - kept(old_log_probs, mask), -STEEPEST, STEEPEST)


def _policy_losses(
    name: str, log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, mask: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array]:
    """Return the losses `[B, T]` without clipping and with it."""
    _check_clip(name, clip)
    check_places(name, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    ratio = jnp.exp(log_ratios(log_probs, old_log_probs, mask))
    advantages = kept(advantages, mask)
    return -advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)


def _over_places(name: str, losses: jax.Array, mask: jax.Array, reduction: str) -> jax.Array:
    if reduction not in ("mean", "none"):
        raise MethodError(f"{name}: reduction={reduction!r}: choose 'mean' or 'none'")
    return kept(losses, mask) if reduction == "none" else masked_mean(losses, mask)


def _check_clip(name: str, clip: float) -> None:
    if not clip > 0:
        raise MethodError(f"{name}: clip={clip!r}: give a number above 0")


def check_places(loss: str, **arrays: jax.Array) -> None:
    """Refuse arrays that are not all of one shape."""
    if len({x.shape for x in arrays.values()}) > 1:
        said = ", ".join(f"{name} is {list(x.shape)}" for name, x in arrays.items())
        raise BatchError(f"{loss} takes arrays of one shape, a number for each place; {said}")
