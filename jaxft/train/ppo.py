"""One step of proximal policy optimisation on answers that have their rewards (Schulman et al. 2017)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..losses.log_probs import token_log_probs
from ..losses.ppo import approximate_kl, clip_fraction, ppo_policy_loss, ppo_value_loss
from ..methods.partition import combine, leaves
from ..models.placement import mesh_of, shardings
from ..parallel.rules import constrain
from .experience import Experience, PpoOptions, adapted, dealt, prepared
from .policy import PpoState, critic_of
from .scoring import values
from .state import with_leaves
from .step import Metrics, jitted, moved, over_micro_batches

ROLES = ("actor", "critic")
Moving = dict[str, tuple[Any, Any]]  # of each role its trained part and optimiser's state: what a step consumes


class PpoUpdate:
    """A compiled step, called as `state, metrics = update(state, experience)`: all updates in one program.

    It consumes the trained parts and optimiser's states of policy and critic; the base passes through. An update whose
    losses, gradients or new parameters are not finite leaves both as they were.

    Args:
        options: How it is done.
    """

    def __init__(self, options: PpoOptions):
        self.options = options
        self.programs: dict[Any, Any] = {}

    def program(self, state: PpoState) -> Any:
        """Return the jitted step for states like this one: one, whatever changes only in value."""
        mesh, moving = mesh_of(state.frozen), _moving(state)
        kind = None if mesh is None else jax.tree.structure(moving)
        if kind not in self.programs:
            self.programs[kind] = jitted(
                partial(ppo_step, self.options),
                (state.step, moving, state.kl_coefficient),
                mesh,
                static_argnames="txs",
                donate_argnames="moving",
            )
        return self.programs[kind]

    def trace(self, state: PpoState, experience: Experience) -> Any:
        """Return the traced step, to look at; both may be shapes for arrays."""
        return self.program(state).trace(**_arguments(state, experience))

    def __call__(self, state: PpoState, experience: Experience) -> tuple[PpoState, Metrics]:
        """Take one step."""
        step, moving, coefficient, metrics = self.program(state)(**_arguments(state, experience))
        (trainable, opt_state), (values, value_opt) = (moving[role] for role in ROLES)
        critic = state.critic.replace(step=step, trainable=values, opt_state=value_opt)
        changes = {"step": step, "trainable": trainable, "opt_state": opt_state, "critic": critic}
        return state.replace(**changes, kl_coefficient=coefficient), metrics


def _moving(state: PpoState) -> Moving:
    critic = state.critic
    return {"actor": (state.trainable, state.opt_state), "critic": (critic.trainable, critic.opt_state)}


def _arguments(state: PpoState, experience: Experience) -> dict[str, Any]:
    return {
        "moving": _moving(state),
        "frozen": state.frozen,
        "critic_frozen": state.critic.frozen,
        "step": state.step,
        "key": state.key,
        "kl_coefficient": state.kl_coefficient,
        "experience": experience,
        "txs": (state.tx, state.critic.tx),
    }


def ppo_step(
    options: PpoOptions,
    moving: Moving,
    frozen: Any,
    critic_frozen: Any,
    step: jax.Array,
    key: jax.Array,
    kl_coefficient: jax.Array,
    experience: Experience,
    txs: tuple[optax.GradientTransformation, optax.GradientTransformation],
) -> tuple[jax.Array, Moving, jax.Array, Metrics]:
    """The step as a pure function: `epochs` times over the answers, dealt out anew into `minibatches` each time."""
    batch, figures = prepared(options, experience, kl_coefficient)
    pair = Pair(options, {role: moving[role][0] for role in ROLES}, frozen, critic_frozen, txs, step, batch)
    params, opts = {role: leaves(moving[role][0]) for role in ROLES}, {role: moving[role][1] for role in ROLES}
    order = jax.random.fold_in(key, step)
    picked = dealt(order, len(experience.rewards), options.epochs, options.minibatches)
    (params, opts, _), said = jax.lax.scan(pair.unless_stopped, (params, opts, jnp.asarray(False)), picked)
    moving = {role: (with_leaves(pair.parts[role], params[role]), opts[role]) for role in ROLES}
    coefficient = adapted(options, kl_coefficient, figures["kl"], len(experience.rewards))
    return step + 1, moving, coefficient, {**figures, **summary(said)}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Actor and critic, who are updated together or not at all.

    Attributes:
        options: How it is done.
        parts: The trained part of each role, as the step began.
        frozen: The rest of the actor.
        critic_frozen: The rest of the critic that is its own.
        txs: The optimisers.
        step: Steps taken: what the learning rate goes by.
        batch: The rows that the updates pick from.
    """

    options: PpoOptions
    parts: dict[str, Any]
    frozen: Any
    critic_frozen: Any
    txs: tuple[optax.GradientTransformation, optax.GradientTransformation]
    step: jax.Array
    batch: dict[str, jax.Array]

    def unless_stopped(self, carry: Any, picked: jax.Array) -> tuple[Any, Metrics]:
        """Make one update of the scan, where none before it found the policy too far away."""
        params, opts, stopped = carry
        if self.options.max_kl is None:
            params, opts, said = self.updated(params, opts, picked)
            return (params, opts, stopped), said
        shapes = jax.eval_shape(self.updated, params, opts, picked)[2]
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        params, opts, said = jax.lax.cond(stopped, lambda p, o, _: (p, o, nothing), self.updated, params, opts, picked)
        return (params, opts, stopped | said["stopped"]), said

    def updated(self, params: Any, opts: Any, picked: jax.Array) -> tuple[Any, Any, Metrics]:
        """Return parameters and optimisers' states one update on, and what is said of it."""
        options, mesh = self.options, mesh_of(self.frozen)
        rows = jax.tree.map(lambda x: constrain(x[picked], mesh, "batch", *[None] * (x.ndim - 1)), self.batch)
        weights = {name: jnp.maximum(rows[name].sum(), 1) for name in ("mask", "value_mask")}
        loss = jax.value_and_grad(lambda p, rows, _: losses(options, *self.models(p), rows, weights), has_aux=True)
        (total, sums), grads = over_micro_batches(loss, params, rows, jax.random.key(0), options.accumulate, mesh)
        if mesh is not None:
            where = {role: shardings(part) for role, part in self.parts.items()}
            grads = jax.lax.with_sharding_constraint(grads, where)
        norms = {role: optax.tree.norm(grads[role]) for role in ROLES}
        good = jnp.isfinite(total) & jnp.isfinite(norms["actor"]) & jnp.isfinite(norms["critic"])
        far = jnp.asarray(False) if options.max_kl is None else sums["approx_kl"] > options.max_kl
        params, opts, taken = moved(self.update, grads, opts, params, good & ~far)
        said = {**sums, "loss": total, "grad_norm": norms["actor"], "critic_grad_norm": norms["critic"]}
        said = {name: jnp.where(good, x, 0) for name, x in said.items()}
        return params, opts, {**said, "counted": good, "taken": taken, "stopped": good & far}

    def models(self, params: dict[str, Any]) -> tuple[Any, Any]:
        """Return both models with these trained leaves."""
        if mesh_of(self.frozen) is not None:
            at_work = {role: shardings(part, at_work=True) for role, part in self.parts.items()}
            params = jax.lax.with_sharding_constraint(params, at_work)
        actor, critic = (with_leaves(self.parts[role], params[role]) for role in ROLES)
        return combine(actor, self.frozen), critic_of(critic, self.critic_frozen, self.frozen)

    def update(self, grads: Any, opts: Any, params: Any) -> tuple[Any, Any]:
        """Return what each role's optimiser makes of its gradients."""
        made = {}
        for role, tx in zip(ROLES, self.txs, strict=True):
            whole = optax.with_extra_args_support(tx)
            made[role] = whole.update(grads[role], opts[role], params[role], step=self.step)
        return {role: one[0] for role, one in made.items()}, {role: one[1] for role, one in made.items()}


def losses(
    options: PpoOptions, actor: Any, critic: Any, rows: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]
) -> tuple[jax.Array, Metrics]:
    """Return the loss of some rows, and what it is made of: sums over places, by the weights of the whole minibatch."""
    mask, old, advantages = rows["mask"], rows["log_probs"], rows["advantages"]
    inputs, places = {name: rows[name] for name in ("input_ids", "attention_mask")}, mask.shape[1]
    wanted = options.entropy_coefficient > 0
    found = token_log_probs(actor, inputs, temperature=options.temperature, entropy=wanted, last=places)
    log_probs, entropy = found if wanted else (found, jnp.zeros(mask.shape))
    policy = ppo_policy_loss(log_probs, old, advantages, mask, clip=options.clip, reduction="none")
    value = ppo_value_loss(
        values(critic, inputs, places),
        rows["values"],
        rows["returns"],
        rows["value_mask"],
        clip=options.value_clip,
        reduction="none",
    )
    sums = {"policy_loss": policy.sum() / weights["mask"], "value_loss": value.sum() / weights["value_mask"]}
    total = sums["policy_loss"] + options.value_coefficient * sums["value_loss"]
    total = total - options.entropy_coefficient * entropy.sum() / weights["mask"]
    share = mask.sum() / weights["mask"]
    sums["approx_kl"] = share * approximate_kl(log_probs, old, mask)
    sums["clip_fraction"] = share * clip_fraction(log_probs, old, advantages, mask, clip=options.clip)
    return total, sums


def summary(said: Metrics) -> Metrics:
    """Return the figures of the updates of a step: means over those that were finite, before max_kl left them out."""
    counts = {name: said[name].sum().astype(jnp.float32) for name in ("counted", "taken", "stopped")}
    means = {name: x.sum() / jnp.maximum(counts["counted"], 1) for name, x in said.items() if name not in counts}
    skipped = (counts["taken"] == 0) & (counts["stopped"] == 0)
    return {**means, "updates": counts["taken"], "stopped": counts["stopped"], "skipped": skipped.astype(jnp.int32)}
