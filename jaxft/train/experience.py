"""What a step of proximal policy optimisation makes of answers and their rewards before it learns from them."""

import dataclasses

import jax
import jax.numpy as jnp

from ..generation.rollout import Rollout
from ..losses.ppo import (
    explained_variance,
    generalized_advantage_estimation,
    kl_penalty,
    masked_mean,
    place_rewards,
    whiten,
    with_place_after,
)
from .step import Metrics


@dataclasses.dataclass(frozen=True)
class PpoOptions:
    """How it is done.

    Attributes:
        temperature: That the answers were drawn at.
        missing_end_penalty: Taken off the reward of an answer without an end.
        kl_kind: Estimate of the KL to the reference, as of `kl_penalty`.
        kl_target: KL of an answer that the coefficient is adapted towards; None: it is fixed.
        kl_horizon: Answers over which it is.
        max_kl: No further update of the step once the policy is so far from the one that drew (nats a token).
        epochs: How often each answer is seen.
        minibatches: Parts that the answers are dealt into, one update each.
        accumulate: Micro-batches of a minibatch.
        clip: Of the ratio.
        value_clip: Of the values.
        value_coefficient: Weight of the value loss.
        entropy_coefficient: Weight of the entropy.
        gamma: Discount.
        lam: Of the advantages.
        whiten_rewards: Whether rewards are scaled to variance 1 first.
        score_position: Where the reward of an answer is placed, as of `place_rewards`.
    """

    temperature: float = 1.0
    missing_end_penalty: float | None = None
    kl_kind: str = "k1"
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    max_kl: float | None = None
    epochs: int = 4
    minibatches: int = 1
    accumulate: int = 1
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    score_position: str = "end"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """Answers, and what was said of them before the step. B rows, R places of answers.

    Attributes:
        rollout: The answers.
        log_probs: `[B, R]`, under the policy that drew them.
        ref_log_probs: `[B, R]`, under the reference.
        entropy: `[B, R]`, of the policy.
        values: `[B, R]`, the critic's, of the state before each token.
        rewards: `[B]`, of the answers.
    """

    rollout: Rollout
    log_probs: jax.Array
    ref_log_probs: jax.Array
    entropy: jax.Array
    values: jax.Array
    rewards: jax.Array


def prepared(
    options: PpoOptions, experience: Experience, kl_coefficient: jax.Array
) -> tuple[dict[str, jax.Array], Metrics]:
    """Return the rows that the updates learn from, with advantages and returns, and the figures of the answers.

    Where all answers come to the same (the discounted sum of their rewards), there is nothing to choose between them,
    and the advantages are 0: whitening would blow up what the critic is wrong by.
    """
    e, mask = experience, experience.rollout.answer_mask
    kl = kl_penalty(e.log_probs, e.ref_log_probs, kind=options.kl_kind, mask=mask)
    scores = e.rewards - (options.missing_end_penalty or 0) * ~e.rollout.ended
    rewards = place_rewards(scores, kl, mask, beta=kl_coefficient, position=options.score_position)
    value_mask = with_place_after(mask) if options.score_position == "after_end" else mask
    if options.whiten_rewards:
        rewards = whiten(rewards, value_mask, shift_mean=False)
    advantages, returns = generalized_advantage_estimation(
        rewards, e.values, value_mask, gamma=options.gamma, lam=options.lam
    )
    sums = generalized_advantage_estimation(rewards, jnp.zeros_like(rewards), value_mask, gamma=options.gamma, lam=1.0)
    differ = (sums[0][:, 0] != sums[0][0, 0]).any()
    batch = {
        **e.rollout.inputs,
        "mask": mask,
        "value_mask": value_mask,
        "log_probs": e.log_probs,
        "values": e.values,
        "advantages": jnp.where(differ, whiten(advantages, mask), 0),
        "returns": returns,
    }
    each = kl.sum(1)
    figures = {
        "reward": e.rewards.mean(),
        "reward_std": e.rewards.std(),
        "kl": each.mean(),
        "kl_coefficient": kl_coefficient,
        "objective": (scores - kl_coefficient * each).mean(),
        "entropy": masked_mean(e.entropy, mask),
        "value_explained_variance": explained_variance(e.values, returns, value_mask),
        "response_length": e.rollout.lengths.mean(),
        "ended": e.rollout.ended.mean(),
        "trained_tokens": mask.sum().astype(jnp.float32),
        "drawn_tokens": mask.sum().astype(jnp.float32),
    }
    return batch, figures


def dealt(key: jax.Array, rows: int, epochs: int, minibatches: int) -> jax.Array:
    """Return which rows each update sees `[epochs * minibatches, rows / minibatches]`: each row once an epoch.

    >>> sorted(dealt(jax.random.key(0), 4, 1, 2).ravel().tolist())
    [0, 1, 2, 3]
    """

    def epoch(n: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, n), rows)

    orders = jax.vmap(epoch)(1 + jnp.arange(epochs))  # 0 is the draw's own
    return orders.reshape(epochs * minibatches, -1)


def adapted(options: PpoOptions, coefficient: jax.Array, kl: jax.Array, answers: int) -> jax.Array:
    """Return the next KL coefficient: `b (1 + clip(kl / target - 1, -0.2, 0.2) answers / horizon)` (Ziegler et al.).

    >>> float(adapted(PpoOptions(kl_target=6.0, kl_horizon=100.0), jnp.float32(0.5), jnp.float32(12.0), 50))
    0.550000011920929
    """
    if options.kl_target is None:
        return coefficient
    error = jnp.clip(kl / options.kl_target - 1, -0.2, 0.2)
    return jnp.where(jnp.isfinite(error), coefficient * (1 + error * answers / options.kl_horizon), coefficient)
