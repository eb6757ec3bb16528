"""The state of a training run, as a pytree."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from ..errors import MethodError, OptimizerError
from ..methods.method import Method, adapters
from ..methods.partition import attached, combine, leaves, partition
from ..models.names import variables
from ..models.placement import mesh_of, move, place, shardings
from ..parallel.rules import repeated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A model as two parts, and what the step needs besides.

    Attributes:
        step: Optimiser steps taken, int32.
        trainable: The part that is trained, float32; a step consumes (donates) it.
        frozen: The rest, shared with the model that was given.
        opt_state: The optimiser's state over `{path: array}` of the trainable part; a step consumes it.
        key: Root of all randomness: step n uses `fold_in(key, n)`.
        tx: The optimiser. Make it once: another instance compiles another step. A learning rate that changes as a
            value comes from `optax.inject_hyperparams`.
        method: What was attached and is trained.
        name: The adapter's name.

    >>> import jaxft
    >>> state = TrainState.create(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2), optax.adamw(1e-3))
    >>> sorted(state.opt_state[0].mu)[0]
    'model.layers.self_attn.q_proj.delta.default.a'
    """

    step: jax.Array
    trainable: Any
    frozen: Any
    opt_state: Any
    key: jax.Array
    tx: optax.GradientTransformation = dataclasses.field(metadata={"static": True})
    method: Method = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="default", metadata={"static": True})

    @classmethod
    def create(
        cls,
        model: Any,
        method: Method | None,
        tx: optax.GradientTransformation,
        *,
        seed: int = 0,
        name: str = "default",
    ) -> Self:
        """Attach the method, split the model, copy what will be trained, and start the optimiser.

        Args:
            model: A model; it keeps its arrays whatever the steps do. It may carry adapters already. Of one with
                shapes for arrays (`abstract=True`) the state has shapes too, for plans and reports.
            method: What to attach and train; None goes on with the adapter `name` that the model carries.
            tx: Any optax optimiser. It sees the trained leaves alone, as a dict by path.
            seed: Of the adapter's initial values, and of the root key.
            name: The adapter's name.

        Returns:
            The state before step 0.

        Raises:
            OptimizerError: `tx` is no optimiser.
            MethodError: The method does not fit the model, or the adapter that it carries, or that has weight 0.

        >>> import jaxft
        >>> model = jaxft.testing.tiny_llama()
        >>> state = jaxft.TrainState.create(model, jaxft.LoRA(r=2), optax.adamw(1e-3))
        >>> int(state.step), type(state.model).__name__
        (0, 'LlamaForCausalLM')
        """
        if not isinstance(tx, optax.GradientTransformation):
            raise OptimizerError(
                f"{tx!r} is no optimiser: give an optax.GradientTransformation, such as optax.adamw(2e-4) "
                "(called, with a learning rate)"
            )
        model = attached(model, method, name=name, seed=seed)
        method = adapters(model)[name] if method is None else method
        names = list(adapters(model))
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model))
        if name in names and not abstract and not bool(model.adapter_weights.get_value()[..., names.index(name)].any()):
            raise MethodError(f"the adapter {name!r} has weight 0 and would not train; jaxft.set_adapter turns it on")
        trainable, frozen = partition(model, method, name=name)

        def first() -> tuple[jax.Array, jax.Array]:
            return jnp.int32(0), jax.random.key(seed)

        if abstract:
            shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
            trainable, counters = place(shaped), jax.eval_shape(first)
            opt_state = optimizer_shapes(tx, trainable)
        else:
            trainable = place(jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable))
            opt_state, counters = start(tx, trainable), first()
        mesh = mesh_of(trainable)
        step, key = counters if mesh is None else (move(x, repeated(mesh)) for x in counters)
        return cls(step, trainable, frozen, opt_state, key, tx, method, name)

    @property
    def model(self) -> Any:
        """The whole model, which can be called. Its trained arrays are the state's: the next step consumes them."""
        return combine(self.trainable, self.frozen)

    def changing(self) -> dict[str, Any]:
        """Return what steps change, as a checkpoint holds it: a tree of arrays."""
        return {
            "step": self.step,
            "trainable": leaves(self.trainable),
            "opt_state": self.opt_state,
            "key": jax.random.key_data(self.key),
        }

    def changed(self, saved: dict[str, Any]) -> Self:
        """Return this state with what a checkpoint held: the inverse of `changing`."""
        return self.replace(
            step=saved["step"],
            trainable=with_leaves(self.trainable, saved["trainable"]),
            opt_state=saved["opt_state"],
            key=jax.random.wrap_key_data(saved["key"]),
        )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def with_leaves(part: Any, values: dict[str, jax.Array]) -> Any:
    """Return a part with other values in its leaves, given by path."""
    fresh = jax.tree.map(lambda x: x, part)
    known = variables(fresh)
    for path, value in values.items():
        known[path].set_value(value)
    return fresh


def start(tx: optax.GradientTransformation, trainable: Any) -> Any:
    """Return the optimiser's first state, its arrays split as the parameters are that they belong to."""
    params = leaves(trainable)
    if mesh_of(trainable) is None:
        return jax.tree.map(jnp.copy, tx.init(params))  # some optimisers keep the parameters themselves
    where = jax.tree.map(lambda s: s.sharding, optimizer_shapes(tx, trainable))
    return jax.jit(lambda p: jax.tree.map(jnp.copy, tx.init(p)), out_shardings=where)(params)


def optimizer_shapes(tx: optax.GradientTransformation, trainable: Any) -> Any:
    """Return the optimiser's state as shapes; on a mesh what is as large as its parameter is split as that is."""
    params, mesh = leaves(trainable), mesh_of(trainable)
    shapes = jax.eval_shape(tx.init, params)
    if mesh is None:
        return shapes
    whole, where = repeated(mesh), shardings(trainable)

    def lies(keys: Any, x: Any) -> Any:
        path = next((key.key for key in keys if getattr(key, "key", None) in params), None)
        return move(x, where[path] if path is not None and x.shape == params[path].shape else whole)

    return jax.tree_util.tree_map_with_path(lies, shapes)
