"""One step of group relative policy optimisation on answers that have their rewards (Shao et al. 2024)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..generation.rollout import Rollout
from ..losses.grpo import group_advantages, grpo_loss
from ..losses.log_probs import token_log_probs
from ..losses.ppo import kl_penalty
from ..models.placement import mesh_of
from ..parallel.rules import constrain
from .experience import dealt
from .state import TrainState
from .step import Metrics, ModelLoss, jitted, train_step

NEVER = 1e9  # a clip that nothing reaches


@dataclasses.dataclass(frozen=True)
class GrpoOptions:
    """How it is done.

    Attributes:
        group_size: Answers to one prompt.
        temperature: That the answers were drawn at.
        missing_end_penalty: Taken off the reward of an answer without an end.
        kl_coefficient: Weight of the KL to the reference.
        correct_kl: Whether it is multiplied by the ratio, as of `grpo_loss`.
        epochs: How often each answer is seen.
        minibatches: Parts that the answers are dealt into, one update each.
        accumulate: Micro-batches of a minibatch.
        clip: Of the ratio, downwards.
        clip_high: Upwards; None: as far.
        ratio: Of each `"token"`, or of the `"sequence"`.
        reduction: Of the loss over tokens, as of `grpo_loss`: `dapo` by the tokens of the whole step, `bnpo` by those
            of each minibatch.
        scale: Of the advantages, as of `group_advantages`.
        max_length: Tokens of an answer at most.
    """

    group_size: int
    temperature: float = 1.0
    missing_end_penalty: float | None = None
    kl_coefficient: float = 0.0
    correct_kl: bool = False
    epochs: int = 1
    minibatches: int = 1
    accumulate: int = 1
    clip: float = 0.2
    clip_high: float | None = None
    ratio: str = "token"
    reduction: str = "dapo"
    scale: str = "group"
    max_length: int | None = None

    @property
    def updates(self) -> int:
        """Updates of a step."""
        return self.epochs * self.minibatches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """Answers, and what was said of them before the step. B rows, those to one prompt one after the other.

    Attributes:
        rollout: The answers, of R places.
        rewards: `[B]`.
        log_probs: `[B, R]`, under the policy that drew them. None: the one that is updated, which does for one update.
        ref_log_probs: `[B, R]`, under the reference; None where there is no KL to it.
    """

    rollout: Rollout
    rewards: jax.Array
    log_probs: jax.Array | None = None
    ref_log_probs: jax.Array | None = None


class GrpoUpdate:
    """A compiled step, called as `state, metrics = update(state, drawn)`: all updates in one program.

    It consumes the trained part and the optimiser's state; the base passes through. The optimiser is told the step:
    see `by_step`.

    Args:
        options: How it is done.
    """

    def __init__(self, options: GrpoOptions):
        self.options, self.loss = options, make_loss(options)
        self.programs: dict[Any, Any] = {}

    def program(self, state: TrainState) -> Any:
        """Return the jitted step for states like this one: one, whatever changes only in value."""
        mesh, moving = mesh_of(state.frozen), (state.step, state.trainable, state.opt_state)
        kind = None if mesh is None else jax.tree.structure(moving)
        if kind not in self.programs:
            function = partial(grpo_step, self.options, self.loss)
            donated = ("trainable", "opt_state")
            self.programs[kind] = jitted(function, moving, mesh, static_argnames="tx", donate_argnames=donated)
        return self.programs[kind]

    def trace(self, state: TrainState, drawn: Drawn) -> Any:
        """Return the traced step, to look at; both may be shapes for arrays."""
        return self.program(state).trace(**_arguments(state), drawn=drawn)

    def __call__(self, state: TrainState, drawn: Drawn) -> tuple[TrainState, Metrics]:
        """Take one step."""
        step, trainable, opt_state, metrics = self.program(state)(**_arguments(state), drawn=drawn)
        return state.replace(step=step, trainable=trainable, opt_state=opt_state), metrics


def _arguments(state: TrainState) -> dict[str, Any]:
    names = ("step", "trainable", "opt_state", "frozen", "key", "tx")
    return {name: getattr(state, name) for name in names}


def grpo_step(
    options: GrpoOptions,
    loss: ModelLoss,
    step: jax.Array,
    trainable: Any,
    opt_state: Any,
    frozen: Any,
    key: jax.Array,
    drawn: Drawn,
    tx: optax.GradientTransformation,
) -> tuple[jax.Array, Any, Any, Metrics]:
    """The step as a pure function: `epochs` times over the answers, dealt out anew into `minibatches` each time."""
    batch, figures = prepared(options, drawn)
    rows, mesh = len(drawn.rewards), mesh_of(frozen)

    def update(moving: Any, picked: jax.Array) -> tuple[Any, Metrics]:
        some = jax.tree.map(lambda x: constrain(x[picked], mesh, "batch", *[None] * (x.ndim - 1)), batch)
        part, opt = moving
        _, part, opt, said = train_step(loss, options.accumulate, step, part, opt, frozen, key, some, tx)
        return (part, opt), said

    picked = dealt(jax.random.fold_in(key, step), rows, options.epochs, options.minibatches)
    (trainable, opt_state), said = jax.lax.scan(update, (trainable, opt_state), picked)
    return step + 1, trainable, opt_state, {**summary(said), **figures}


def prepared(options: GrpoOptions, drawn: Drawn) -> tuple[dict[str, Any], Metrics]:
    """Return the rows that the updates learn from, and the figures of the answers."""
    rollout, mask, rewards = drawn.rollout, drawn.rollout.answer_mask, drawn.rewards
    scores = rewards - (options.missing_end_penalty or 0) * ~rollout.ended
    groups, tokens = scores.reshape(-1, options.group_size), mask.sum().astype(jnp.float32)
    batch = {
        **rollout.inputs,
        "mask": mask,
        "advantages": group_advantages(scores, group_size=options.group_size, scale=options.scale),
        "log_probs": drawn.log_probs,
        "ref_log_probs": drawn.ref_log_probs,
        "mean_length": jnp.full(len(mask), tokens / len(mask)),
    }
    figures = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "equal_groups": (groups.max(1) == groups.min(1)).mean(),
        "response_length": rollout.lengths.mean(),
        "ended": rollout.ended.mean(),
        "trained_tokens": tokens,
        "drawn_tokens": tokens,
    }
    if drawn.log_probs is not None and drawn.ref_log_probs is not None:
        kl = kl_penalty(drawn.log_probs, drawn.ref_log_probs, kind="k3", mask=mask)
        figures["kl"] = kl.sum(1).mean()  # nats an answer
    return batch, figures


def make_loss(options: GrpoOptions) -> ModelLoss:
    """Return the model loss of some answers: dropout is off, since the policy that drew them had none.

    Its weight is the number of answers, or of tokens (`bnpo`); its metrics are `entropy` (nats per token) and
    `clip_fraction`, the share of tokens at which clipping binds.
    """

    def loss(model: Any, batch: Any, *, key: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        del key
        mask, inputs = batch["mask"], {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = token_log_probs(model, inputs, temperature=options.temperature, entropy=True, last=mask.shape[1])
        log_probs, entropy = found
        old = jax.lax.stop_gradient(log_probs) if batch["log_probs"] is None else batch["log_probs"]
        each = partial(grpo_loss, log_probs, old, batch["advantages"], mask, ratio=options.ratio)
        clips: dict[str, Any] = {"clip": options.clip, "clip_high": options.clip_high}
        mean = each(
            **clips,
            ref_log_probs=batch["ref_log_probs"],
            kl_coefficient=options.kl_coefficient,
            correct_kl=options.correct_kl,
            reduction=options.reduction,
            max_length=options.max_length,
            tokens=batch["mean_length"].sum(),
        )
        tokens = mask.sum().astype(jnp.float32)
        weight = tokens if options.reduction == "bnpo" else jnp.float32(len(mask))
        clipped = each(**clips, reduction="none") > each(clip=NEVER, reduction="none")
        return mean * weight, weight, {"entropy": (entropy.sum(), tokens), "clip_fraction": (clipped.sum(), tokens)}

    return loss


def summary(said: Metrics) -> Metrics:
    """Return the figures of the updates of a step: means over those that could be taken."""
    taken = said["skipped"] == 0
    names = [name for name in said if name not in ("skipped", "trained_tokens")]
    means = {name: jnp.where(taken, said[name], 0).sum() / jnp.maximum(taken.sum(), 1) for name in names}
    return {**means, "skipped": (~taken).all().astype(jnp.int32)}
