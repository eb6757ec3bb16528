"""Group relative policy optimisation. Shapes: B answers, G of them to each prompt, T places, one for each token."""

from typing import Any

import jax
import jax.numpy as jnp

from ..errors import BatchError, MethodError, refuse
from .ppo import check_places, kept, kl_penalty, log_ratios, masked_mean

REDUCTIONS = ("grpo", "bnpo", "dr_grpo", "dapo", "none")


def group_advantages(
    rewards: jax.Array, *, group_size: int, scale: str = "group", mask: jax.Array | None = None
) -> jax.Array:
    """Return `(r - mean) / (std + 1e-4)` over the answers to each prompt, std with Bessel's correction, as trl.

    Shao et al. 2024; without the scale Liu et al. 2025 (Dr. GRPO).

    Args:
        rewards: `[B]`, answers to one prompt one after the other, any float dtype.
        group_size: G.
        scale: `"group"`: the std of each group; `"batch"`: that of all rewards; `"none"`.
        mask: `[B]`, zero at answers that do not count, whatever they hold; None: all do.

    Returns:
        `[B]` float32; 0 at answers that do not count, and in a group whose rewards are all equal.

    Raises:
        BatchError: Groups that do not come out even, or shapes that do not fit.
        MethodError: No such scale.

    >>> group_advantages(jnp.array([1.0, 3.0, 5.0, 5.0]), group_size=2, scale="none").tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    if scale not in ("group", "batch", "none"):
        raise MethodError(f"group_advantages: scale={scale!r}: choose 'group', 'batch' or 'none'")
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise BatchError(f"group_advantages: rewards are {list(rewards.shape)}: give [B], groups of {group_size}")
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    check_places("group_advantages", rewards=rewards, mask=mask)
    real = (mask != 0).reshape(-1, group_size)
    rewards = kept(rewards, mask).reshape(real.shape)
    level = rewards.max(1, keepdims=True, where=real, initial=-jnp.inf)
    away = jnp.where(real, rewards - _mean(rewards, real, 1), 0)
    away = jnp.where(((rewards == level) | ~real).all(1, keepdims=True), 0, away)  # no rounding in equal rewards
    if scale == "none":
        return away.reshape(-1)
    axis = 1 if scale == "group" else None
    centred = jnp.where(real, rewards - _mean(rewards, real, axis), 0)
    number = real.sum(axis, keepdims=True)
    std = jnp.sqrt((centred**2).sum(axis, keepdims=True) / jnp.maximum(number - 1, 1))
    return (away / (std + 1e-4)).reshape(-1)


def grpo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    ref_log_probs: jax.Array | None = None,
    kl_coefficient: float = 0.0,
    correct_kl: bool = False,
    ratio: str = "token",
    reduction: str = "dapo",
    max_length: int | None = None,
    tokens: Any = None,
) -> jax.Array:
    """Return `-min(A ratio, A clip(ratio, 1 - clip, 1 + clip_high)) + kl_coefficient k3` (Shao et al. 2024), as trl.

    Reductions of the sum over the tokens:

        grpo        the mean over each answer's tokens, then over the answers that have some
        bnpo        by the number of tokens
        dapo        by `tokens`, that of a whole step, where it is taken in parts (Yu et al. 2025)
        dr_grpo     by the number of answers that have tokens, times `max_length` (Liu et al. 2025)
        none        not at all: `[B, T]`, zeros at places that do not count

    trl counts answers without tokens too. A log ratio beyond +-20 counts as that.

    Args:
        log_probs: `[B, T]`, of the drawn tokens under the policy, any float dtype.
        old_log_probs: `[B, T]`, under the policy that drew them.
        advantages: `[B]`, or `[B, T]`.
        mask: `[B, T]`, of the tokens.
        clip: How far below 1 the ratio may be and still be rewarded for going on.
        clip_high: How far above; None: as far as below.
        ref_log_probs: `[B, T]`, under the reference; only where `kl_coefficient` is not 0.
        kl_coefficient: Weight of the estimate k3 of the KL to the reference.
        correct_kl: Whether k3 is multiplied by the ratio, since the old policy drew the tokens (DeepSeek-V3.2, 2025):
            trl's `use_bias_correction_kl`, which is on there by default.
        ratio: Of each `"token"`, or of the `"sequence"`: `exp` of the mean log ratio of an answer (GSPO, Zheng et al.
            2025).
        reduction: One of those above.
        max_length: Of an answer, in tokens: for `dr_grpo`.
        tokens: Number of tokens, a number or a scalar array, for `dapo`; None: those of this batch.

    Returns:
        A float32 scalar, or `[B, T]`.

    Raises:
        BatchError: Shapes that do not fit, or no reference for the KL.
        MethodError: An option out of range.

    >>> new, old, mask = jnp.log(jnp.array([[2.0, 1.0]])), jnp.zeros((1, 2)), jnp.array([[1, 1]])
    >>> f"{grpo_loss(new, old, jnp.array([1.0]), mask, clip_high=0.28):.2f}"  # -(1.28 + 1) / 2
    '-1.14'
    """
    high = clip if clip_high is None else clip_high
    _check(clip, high, ratio, reduction, max_length)
    if advantages.shape == mask.shape[:1]:
        advantages = jnp.broadcast_to(advantages[:, None], mask.shape)
    arrays = {"log_probs": log_probs, "old_log_probs": old_log_probs, "advantages": advantages, "mask": mask}
    check_places("grpo_loss", **arrays)
    log_ratio = log_ratios(log_probs, old_log_probs, mask)
    if ratio == "sequence":
        log_ratio = jnp.broadcast_to(_mean(log_ratio, mask != 0, 1), mask.shape)
    weight, advantages = jnp.exp(log_ratio), kept(advantages, mask)
    losses = -jnp.minimum(weight * advantages, jnp.clip(weight, 1 - clip, 1 + high) * advantages)
    if kl_coefficient:
        if ref_log_probs is None:
            raise BatchError(f"grpo_loss: kl_coefficient={kl_coefficient} needs ref_log_probs [B, T]")
        kl = kl_penalty(log_probs, ref_log_probs, kind="k3", mask=mask)
        losses = losses + kl_coefficient * (kl * weight if correct_kl else kl)
    return _reduced(losses, mask, reduction, max_length, tokens)


def _reduced(losses: jax.Array, mask: jax.Array, reduction: str, max_length: int | None, tokens: Any) -> jax.Array:
    losses, real = kept(losses, mask), mask != 0
    answers = real.any(1)
    if reduction == "none":
        return losses
    if reduction == "grpo":
        return masked_mean(_mean(losses, real, 1)[:, 0], answers)
    if reduction == "dr_grpo":
        return losses.sum() / jnp.maximum(answers.sum() * jnp.float32(max_length or 0), 1)
    number = real.sum() if tokens is None or reduction == "bnpo" else tokens
    return losses.sum() / jnp.maximum(number, 1)


def _mean(x: jax.Array, real: jax.Array, axis: int | None) -> jax.Array:
    """Return the mean along an axis over what is real, which stays as an axis of one."""
    return jnp.where(real, x, 0).sum(axis, keepdims=True) / jnp.maximum(real.sum(axis, keepdims=True), 1)


def _check(clip: float, high: float, ratio: str, reduction: str, max_length: int | None) -> None:
    problems = [
        f"{name}={x!r}: give a number above 0" for name, x in (("clip", clip), ("clip_high", high)) if not x > 0
    ]
    if ratio not in ("token", "sequence"):
        problems.append(f"ratio={ratio!r}: choose 'token' or 'sequence'")
    if reduction not in REDUCTIONS:
        problems.append(f"reduction={reduction!r}: choose one of {', '.join(map(repr, REDUCTIONS))}")
    if reduction == "dr_grpo" and (max_length is None or max_length < 1):
        problems.append(f"max_length={max_length!r}: dr_grpo divides by the longest answer there may be: give it")
    refuse(MethodError, "grpo_loss: options that cannot be", problems)
