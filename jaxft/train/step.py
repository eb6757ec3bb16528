"""One optimiser step: differentiate, divide once, update, keep the old state where anything is not finite."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ..errors import BatchError, MethodError
from ..methods.partition import combine, leaves
from ..models.placement import mesh_of, shardings
from ..parallel.rules import batch_devices, constrain, repeated, rows_sharding
from .batch import check_batch
from .state import TrainState, with_leaves

TINY = float(np.finfo(np.float32).tiny)  # 0 / TINY = 0 where nothing was trained
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class ModelLoss(Protocol):
    """The loss that a step takes and a person writes.

    It returns the sum over trained tokens (or rows), their number, and a dict of further (sum, weight) pairs.
    """

    def __call__(
        self, model: Any, batch: Batch, *, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """Return (total, weight, metrics)."""
        ...


class TrainStep:
    """A compiled step, called as `state, metrics = step(state, batch)`. See `make_train_step`."""

    def __init__(self, loss: ModelLoss, accumulate: int):
        self.loss, self.accumulate = loss, accumulate
        self.programs: dict[Any, Any] = {}

    def program(self, state: TrainState) -> Any:
        """Return the jitted step for states like this one: one, whatever changes only in value."""
        mesh = mesh_of(state.frozen)
        kind = None if mesh is None else jax.tree.structure((state.trainable, state.opt_state))
        if kind not in self.programs:
            self.programs[kind] = jitted(
                partial(train_step, self.loss, self.accumulate),
                (state.step, state.trainable, state.opt_state),
                mesh,
                static_argnames="tx",
                donate_argnames=("trainable", "opt_state"),
            )
        return self.programs[kind]

    def trace(self, state: TrainState, batch: Batch) -> Any:
        """Return the traced step, to look at (`.jaxpr`, `.lower().compile()`); both may be shapes for arrays."""
        return self.program(state).trace(**self._arguments(state, batch))

    def _arguments(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        return {
            "step": state.step,
            "trainable": state.trainable,
            "opt_state": state.opt_state,
            "frozen": state.frozen,
            "key": state.key,
            "batch": dict(batch),
            "tx": state.tx,
        }

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Take one step."""
        if isinstance(state.step, jax.ShapeDtypeStruct):
            raise MethodError("this model has shapes for arrays (abstract=True): load it whole to train it")
        vocabulary = getattr(getattr(state.frozen, "config", None), "vocab_size", None)
        mesh = mesh_of(state.frozen)
        classes = len(getattr(getattr(state.frozen, "config", None), "labels", ()))
        check_batch(batch, self.accumulate, vocabulary, batch_devices(mesh), classes if classes > 1 else None)
        if mesh is not None:
            batch = jax.device_put(dict(batch), rows_sharding(mesh))
        step, trainable, opt_state, metrics = self.program(state)(**self._arguments(state, batch))
        return state.replace(step=step, trainable=trainable, opt_state=opt_state), metrics


def make_train_step(loss: ModelLoss, *, accumulate: int = 1) -> TrainStep:
    """Make the step of a loss: compiled once for a structure and shape, and again for nothing that is only a value.

    The step consumes the trainable part and the optimiser's state of the state it is given; the base passes through.
    Where loss, gradient or new parameters are not finite, or nothing was trained, parameters and optimiser stay
    exactly as they were, and the step counts on.

    Args:
        loss: A model loss `loss(model, batch, *, key) -> (total, weight, metrics)`.
        accumulate: Micro-batches that the rows of a batch are split into, one after the other. Sums are added and
            divided once, so the update is the whole batch's however the trained tokens are spread.

    Returns:
        `step(state, batch) -> (state, metrics)`; metrics are scalars: `loss`, `grad_norm` (before any clipping),
        `trained_tokens` (the weight), `skipped` (1 where the old state was kept), and what the loss adds.

    Raises:
        BatchError: `accumulate` is no whole number of at least 1; when called, a batch that cannot be trained on.

    >>> import jaxft
    >>> state = jaxft.TrainState.create(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2), optax.adamw(1e-2))
    >>> step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    >>> ids = jnp.array([[3, 4, 5, 6], [5, 6, 7, 8]])
    >>> state, metrics = step(state, {"input_ids": ids, "labels": ids})
    >>> int(state.step), int(metrics["trained_tokens"]), int(metrics["skipped"])
    (1, 6, 0)
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise BatchError(f"accumulate={accumulate!r}: give a whole number of at least 1")
    return TrainStep(loss, accumulate)


def train_step(
    loss: ModelLoss,
    accumulate: int,
    step: jax.Array,
    trainable: Any,
    opt_state: Any,
    frozen: Any,
    key: jax.Array,
    batch: Batch,
    tx: optax.GradientTransformation,
) -> tuple[jax.Array, Any, Any, Metrics]:
    """The step as a pure function; see `make_train_step`."""
    params, mesh = leaves(trainable), mesh_of(trainable)
    key = jax.random.fold_in(key, step)

    def summed(params: dict[str, jax.Array], rows: Batch, key: jax.Array) -> Any:
        params = (
            params if mesh is None else jax.lax.with_sharding_constraint(params, shardings(trainable, at_work=True))
        )
        total, weight, extra = loss(combine(with_leaves(trainable, params), frozen), rows, key=key)
        return total, {"weight": weight, "extra": extra}

    value_and_grad = jax.value_and_grad(summed, has_aux=True)
    (total, sums), grads = over_micro_batches(value_and_grad, params, batch, key, accumulate, mesh)
    if mesh is not None:  # each device sums up its own part of a gradient
        grads = jax.lax.with_sharding_constraint(grads, shardings(trainable))
    weight = sums["weight"]
    some = jnp.maximum(weight, TINY)
    mean, grads = total / some, jax.tree.map(lambda g: g / some.astype(g.dtype), grads)
    norm = optax.tree.norm(grads)
    update = partial(optax.with_extra_args_support(tx).update, value=mean, step=step)
    good = (weight > 0) & jnp.isfinite(mean) & jnp.isfinite(norm)
    params, opt_state, good = moved(update, grads, opt_state, params, good)
    metrics = {name: a / jnp.maximum(b, TINY) for name, (a, b) in sums["extra"].items()}
    metrics |= {"loss": mean, "grad_norm": norm, "trained_tokens": weight, "skipped": 1 - good.astype(jnp.int32)}
    return step + 1, with_leaves(trainable, params), opt_state, metrics


def moved(
    update: Callable[..., Any], grads: Any, opt_state: Any, params: Any, good: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """Return parameters and optimiser's state one update on, and whether they are.

    They are exactly as they were where `good` is False, or where a new parameter is not finite.

    Args:
        update: Of the optimiser: `updates, opt_state = update(grads, opt_state, params)`.
        grads: A pytree, as `params`.
        opt_state: The optimiser's state.
        params: What is trained.
        good: Whether the update is to be taken.
    """
    updates, new_opt = update(grads, opt_state, params)
    new = optax.apply_updates(params, updates)
    good = good & finite(new)
    keep: Callable[[Any, Any], Any] = partial(jax.tree.map, partial(jnp.where, good))
    return keep(new, params), keep(new_opt, opt_state), good


def jitted(function: Callable[..., Any], results: tuple[Any, ...], mesh: Mesh | None, **options: Any) -> Any:
    """Return a jitted step. On a mesh what comes out lies as what went in, or the next would be compiled again.

    Args:
        function: It returns something like `results`, and metrics.
        results: Arrays, or their shapes, that lie where the results shall.
        mesh: The mesh, if there is one.
        options: Of `jax.jit`.
    """
    if mesh is not None:
        options["out_shardings"] = (*jax.tree.map(lambda x: x.sharding, results), repeated(mesh))
    return jax.jit(function, **options)


def over_micro_batches(
    value_and_grad: Callable[..., Any], params: Any, batch: Batch, key: jax.Array, accumulate: int, mesh: Mesh | None
) -> Any:
    """Add values and gradients over micro-batches of equal numbers of rows, each with a key of its own."""
    if accumulate == 1:
        return value_and_grad(params, batch, key)

    def split(x: jax.Array) -> jax.Array:  # each micro-batch over all devices, not each on some of them
        return constrain(x.reshape(accumulate, -1, *x.shape[1:]), mesh, None, "batch", *[None] * (x.ndim - 1))

    micro = jax.tree.map(split, batch)

    def add(sums: Any, xs: Any) -> tuple[Any, None]:
        rows, index = xs
        return jax.tree.map(jnp.add, sums, value_and_grad(params, rows, jax.random.fold_in(key, index))), None

    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value_and_grad, params, first, key))
    return jax.lax.scan(add, zeros, (micro, jnp.arange(accumulate)))[0]


def finite(tree: Any) -> jax.Array:
    """Tell whether every number in a tree is finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
