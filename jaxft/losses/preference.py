"""Losses of preferences: reward models, DPO, KTO. Shapes: B pairs, lists or answers, K answers of a list."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import BatchError, MethodError, refuse
from .vectors import counted_rows, reduced


def reward_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    *,
    margin: Any = 0.0,
    centering: float = 0.0,
    mask: jax.Array | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return `-log sigmoid(chosen - rejected - margin) + centering (chosen + rejected)^2` (Bradley and Terry 1952).

    The loss of reward models (Christiano et al. 2017, Ouyang et al. 2022), with the margin of Llama 2 (Touvron et al.
    2023) and the centering of Eisenstein et al. 2023, as trl's RewardTrainer.

    Args:
        chosen: `[B]`, scores of the better answers, any float dtype.
        rejected: `[B]`, scores of the worse ones.
        margin: By how much the better score should be higher: a number, or `[B]`.
        centering: Weight that keeps the two scores around zero.
        mask: `[B]`, zero at pairs that do not count, whatever they hold.
        reduction: `"mean"` over the pairs that count, or `"none"`: `[B]`, zeros at others.

    Returns:
        A float32 scalar, or `[B]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> f"{reward_loss(jnp.array([1.0]), jnp.array([1.0])):.4f}"  # log 2
    '0.6931'
    """
    _check("reward_loss", {"chosen": chosen, "rejected": rejected, "mask": mask}, reduction)
    margin = jnp.broadcast_to(jnp.asarray(margin), chosen.shape)
    counted, better, worse, margin = counted_rows(mask, *map(_float, (chosen, rejected, margin)))
    return reduced(jax.nn.softplus(worse - better + margin) + centering * (better + worse) ** 2, counted, reduction)


def ranking_loss(scores: jax.Array, mask: jax.Array, *, centering: float = 0.0, reduction: str = "mean") -> jax.Array:
    """Return `mean over i < k of -log sigmoid(score_i - score_k)`, of each ranked list (Ouyang et al. 2022, eq. 1).

    All `K (K - 1) / 2` pairs of a list count, and every list counts once, however long it is. A list of two is a pair
    of `reward_loss`.

    Args:
        scores: `[B, K]`, best answer first, any float dtype.
        mask: `[B, K]`, zero where a list has no answer, whatever stands there. A list of fewer than two does not count.
        centering: Weight of the mean over the pairs of `(score_i + score_k)^2`.
        reduction: `"mean"` over the lists that count, or `"none"`: `[B]`, zeros at others.

    Returns:
        A float32 scalar, or `[B]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> f"{ranking_loss(jnp.array([[1.0, 1.0, 1.0, 9.0]]), jnp.array([[1, 1, 1, 0]])):.4f}"  # log 2, three times
    '0.6931'
    """
    _check("ranking_loss", {"scores": scores, "mask": mask}, reduction, shape="[B, K]")
    real = mask != 0
    scores = jnp.where(real, _float(scores), 0)
    pairs = jnp.triu(jnp.ones((scores.shape[1],) * 2, bool), 1)[None] & real[:, :, None] & real[:, None]
    better, worse = scores[:, :, None], scores[:, None]
    losses = jax.nn.softplus(worse - better) + centering * (better + worse) ** 2
    number = pairs.sum((1, 2))
    return reduced(jnp.where(pairs, losses, 0).sum((1, 2)) / jnp.maximum(number, 1), number > 0, reduction)


def dpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    mask: jax.Array | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return `-log sigmoid(h)`, h = beta ((policy - ref)(chosen) - (policy - ref)(rejected)) (Rafailov et al. 2023).

    Kinds, e the label smoothing, the share of pairs that are taken to be labelled the wrong way round:

        sigmoid     -(1 - e) log sigmoid(h) - e log sigmoid(-h)                 e > 0: conservative DPO, Mitchell 2023
        robust      (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)   Chowdhury et al. 2024
        hinge       max(0, 1 - h)                                               SLiC, Zhao et al. 2023
        ipo         (h / beta - 1 / (2 beta))^2                                 Azar et al. 2023

    As trl's DPOTrainer, but that it gives `ipo` means over the tokens of an answer: here it takes what it is given.

    Args:
        policy_chosen: `[B]`, log-probabilities of the better answers under the policy, summed over their tokens.
        policy_rejected: `[B]`, of the worse answers.
        ref_chosen: `[B]`, of the better answers under the reference.
        ref_rejected: `[B]`, of the worse ones.
        beta: How strongly the policy is held to the reference.
        kind: One of those above.
        label_smoothing: e, at least 0 and below 0.5; of `sigmoid` and `robust`.
        mask: `[B]`, zero at pairs that do not count, whatever they hold.
        reduction: `"mean"` over the pairs that count, or `"none"`: `[B]`, zeros at others.

    Returns:
        A float32 scalar, or `[B]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: No such kind, or an option out of range.

    >>> x = jnp.array([-5.0])
    >>> f"{dpo_loss(x, x, x, x, beta=0.1):.4f}"  # a policy that is its reference: log 2
    '0.6931'
    """
    problems = []
    if kind not in ("sigmoid", "robust", "hinge", "ipo"):
        problems.append(f"kind={kind!r}: choose 'sigmoid', 'robust', 'hinge' or 'ipo'")
    if not 0 <= label_smoothing < 0.5:
        problems.append(f"label_smoothing={label_smoothing!r}: give a number of at least 0 and below 0.5")
    elif label_smoothing and kind in ("hinge", "ipo"):
        problems.append(f"label_smoothing={label_smoothing!r}: {kind} has none; choose 'sigmoid' or 'robust'")
    arrays = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
    arrays |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    _check("dpo_loss", {**arrays, "mask": mask}, reduction, beta=beta, problems=problems)
    counted, pc, pr, rc, rr = counted_rows(mask, *map(_float, arrays.values()))
    logits = (pc - pr) - (rc - rr)
    h, e = beta * logits, label_smoothing
    if kind == "hinge":
        losses = jax.nn.relu(1 - h)
    elif kind == "ipo":
        losses = (logits - 1 / (2 * beta)) ** 2
    elif kind == "robust":
        losses = ((1 - e) * jax.nn.softplus(-h) - e * jax.nn.softplus(h)) / (1 - 2 * e)
    else:
        losses = (1 - e) * jax.nn.softplus(-h) + e * jax.nn.softplus(h)
    return reduced(losses, counted, reduction)


def kto_loss(
    policy: jax.Array,
    ref: jax.Array,
    desirable: jax.Array,
    *,
    kl: Any,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mask: jax.Array | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return `w (1 - sigmoid(+-beta (policy - ref - max(kl, 0))))`, + for desirable answers (Ethayarajh et al. 2024).

    As trl's KTOTrainer: the mean is over the answers and not over their weights, and no gradient passes through kl.

    Args:
        policy: `[B]`, log-probabilities of the answers under the policy, summed over their tokens.
        ref: `[B]`, under the reference.
        desirable: `[B]`, nonzero where an answer is one to be given.
        kl: The reference point: `policy - ref` of answers that belong to other prompts, `[B]`, of which the mean is
            taken over the rows that count; or that mean.
        beta: How strongly the policy is held to the reference.
        desirable_weight: w of the desirable answers.
        undesirable_weight: w of the others.
        mask: `[B]`, zero at rows that do not count, whatever they hold.
        reduction: `"mean"` over the rows that count, or `"none"`: `[B]`, zeros at others.

    Returns:
        A float32 scalar, or `[B]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> x = jnp.array([-5.0, -7.0])
    >>> float(kto_loss(x, x, jnp.array([1, 0]), kl=0.0, beta=0.1))  # a policy that is its reference
    0.5
    """
    arrays = {"policy": policy, "ref": ref, "desirable": desirable, "mask": mask}
    _check("kto_loss", arrays, reduction, beta=beta)
    kl = jnp.broadcast_to(_float(jnp.asarray(kl)), policy.shape)
    counted, policy, ref, kl = counted_rows(mask, *map(_float, (policy, ref, kl)))
    point = jax.lax.stop_gradient(jax.nn.relu(reduced(kl, counted, "mean")))
    good = desirable != 0
    h = beta * (policy - ref - point)
    losses = jnp.where(good, desirable_weight, undesirable_weight) * jax.nn.sigmoid(jnp.where(good, -h, h))
    return reduced(losses, counted, reduction)


def _float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _check(
    loss: str,
    arrays: dict[str, jax.Array | None],
    reduction: str,
    *,
    shape: str = "[B]",
    beta: float = 1.0,
    problems: Sequence[str] = (),
) -> None:
    """Refuse options that cannot be, and arrays that are not all of one shape, with as many axes as `shape` names."""
    found = list(problems)
    if not beta > 0:
        found.append(f"beta={beta!r}: give a number above 0")
    if reduction not in ("mean", "none"):
        found.append(f"reduction={reduction!r}: choose 'mean' or 'none'")
    refuse(MethodError, f"{loss}: options that cannot be", found)
    shapes = {name: list(x.shape) for name, x in arrays.items() if x is not None}
    first = next(iter(shapes.values()))
    if any(s != first for s in shapes.values()) or len(first) != len(shape.split(",")):
        said = ", ".join(f"{name} is {s}" for name, s in shapes.items())
        raise BatchError(f"{loss} takes arrays {shape} of one shape; {said}")
