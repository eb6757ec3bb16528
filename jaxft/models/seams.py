"""The seams at which a method meets a model, and the context that is passed down to them.

Modules of a model have empty slots, filled by `jaxft.methods` and keyed by the adapter's name:

    delta    {name: module}   at a linear layer or an embedding: what the adapter adds to its output
    saved    {name: Copies}   at any layer: the adapter's own copies of base leaves (`modules_to_save`, `bias`)
    join     {name: module}   where a part's output meets the residual stream: what the adapter adds there
    past     {name: module}   at the model: keys and values put before the sequence in every layer's attention
    prompt   {name: module}   at the model: vectors put before the embedded sequence
    temperature {name: module}  at the model: a contrastive loss's temperature, of which the model knows nothing

The base's own leaves keep their paths and values whatever hangs in the slots.
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

SLOTS = ("delta", "saved", "join", "past", "prompt", "temperature")


class Delta(nnx.Param[Any]):
    """A leaf that a method adds and trains."""


class Const(nnx.Variable[Any]):
    """An array that is neither trained nor a parameter of the base, such as a gate."""


class AdapterWeights(Const):
    """How much each named adapter counts: `[n]`, or `[B, n]` for a batch whose rows use different adapters.

    Its metadata `adapters` holds a pair (name, method) for each of the n.
    """


class Copies(nnx.Module):
    """An adapter's own copies of some leaves of one module, as attributes of the same names.

    Args:
        leaves: The copies, by name of the leaf.
        layers_held: The layers of a stack that they are for; None for all, or outside a stack.
        lead: Shape of the leading axes of every copy.
    """

    def __init__(self, leaves: dict[str, Delta], layers_held: tuple[int, ...] | None, lead: tuple[int, ...]):
        self.layers_held = layers_held
        self.gate = Const(jnp.ones(lead))  # scattered with the copies, it says in which layers they count
        for leaf, copy in leaves.items():
            setattr(self, leaf, copy)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """P virtual places that stand before the sequence in attention; R is 1, or B where rows differ.

    Attributes:
        k: `[L, R, K, P, E]` keys, not rotated any more; inside the stack one layer's, without L.
        v: Values, as `k`.
        weight: `[R, 1, P]` float32, how often a place counts in the softmax; 0: it is not there.
        offset: `[R, 1]` int32, by how much the positions of the sequence's tokens are shifted.
        room: The most that `offset` can be.
    """

    k: jax.Array
    v: jax.Array
    weight: jax.Array
    offset: jax.Array
    room: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every module of one forward pass may need to know.

    Attributes:
        key: Dropout key; None means no dropout, which is evaluation.
        weights: `[n]` or `[B, n]`, how much each adapter counts; None where the model carries none.
        mask: `[B or 1, 1, T, S]` bool, which of the S keys each of the T queries may see.
        positions: `[B, T]` int32.
        rope: Cosines and sines `[B, 1, T, head_dim / 2]`, float32, where the family rotates.
        layer: Index of the layer, inside the stack.
        past: What stands before the sequence in attention.
        token_types: `[B, T]`, which of two texts a token is of, where the family asks.
        virtual: `[R, 1, P]`, weights of the P virtual tokens that stand, in an encoder, at the end of the array.
        kernel: What the module was given for a kernel, which has none of its own (a tied output head).
        names: Names of the adapters, in the order of `weights`.
        mesh: The mesh that the model lies on; None: one device.
    """

    key: jax.Array | None = None
    weights: jax.Array | None = None
    mask: jax.Array | None = None
    positions: jax.Array | None = None
    rope: tuple[jax.Array, jax.Array] | None = None
    layer: jax.Array | None = None
    past: Past | None = None
    token_types: jax.Array | None = None
    virtual: jax.Array | None = None
    kernel: jax.Array | None = None
    names: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def platform(self) -> str:
        """The kind of device that the pass is compiled for."""
        return jax.default_backend() if self.mesh is None else str(self.mesh.devices.flat[0].platform)

    def replace(self, **changes: Any) -> "Context":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def at_layer(self, index: jax.Array) -> "Context":
        """Return the context of one layer: its index, and a dropout key of its own."""
        key = None if self.key is None else jax.random.fold_in(self.key, index)
        return self.replace(key=key, layer=index)

    def key_for(self, number: int) -> jax.Array | None:
        """Return the dropout key of the module with this static number; None where nothing is dropped."""
        return None if self.key is None else jax.random.fold_in(self.key, number)

    def weight(self, name: str) -> jax.Array:
        """Return how much an adapter counts: a scalar, or `[B, 1, 1]`."""
        assert self.weights is not None
        w = self.weights[..., self.names.index(name)]
        return w if w.ndim == 0 else w.reshape(-1, 1, 1)


def number(name: str) -> int:
    """Return a static number for a module's or adapter's name, stable across runs and machines.

    >>> number("embd_pdrop")
    1090817618
    """
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def lift(x: jax.Array, like: jax.Array) -> jax.Array:
    """Give `x` explicit leading ones up to the rank of `like`, since silent rank promotion is an error here."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


def mix(base: jax.Array | None, copy: jax.Array, weight: jax.Array) -> jax.Array:
    """Return `base + weight (copy - base)`: exactly `copy` at 1, exactly `base` at 0; None counts as zeros."""
    base = jnp.zeros_like(copy) if base is None else base.astype(copy.dtype)
    base, copy = lift(base, weight), lift(copy, weight)
    weight = lift(weight, copy)
    return jnp.where(weight == 1, copy, base + weight.astype(copy.dtype) * (copy - base))


def read(module: Any, leaf: str, ctx: Context, base: jax.Array | None = None) -> Any:
    """Return a leaf's value, or the copies of it that the active adapters bring.

    Args:
        module: A module with the slot `saved`.
        leaf: Name of the leaf, `"kernel"` say.
        ctx: Tells how much each adapter counts.
        base: Stands for the leaf where the module has none of its own (a tied output head).

    Returns:
        The value (a quantised kernel as it is); None where there is no such leaf and no copy.
    """
    own = getattr(module, leaf, None)
    value = base if own is None else own.get_value()
    for name, copies in (module.saved or {}).items():
        if hasattr(copies, leaf):
            value = mix(value, getattr(copies, leaf).get_value(), ctx.weight(name) * copies.gate.get_value())
    return value


def scale_input(module: Any, x: jax.Array, ctx: Context) -> jax.Array:
    """Return what a module reads: `x (1 + sum_n w_n (l_n - 1))` where adapters scale its input, else `x` itself.

    Args:
        module: A module with the slot `delta`.
        x: `[..., in]`.
        ctx: Weights and names.
    """
    deltas = (module.delta or {}).items()
    changes = [delta.of_input(x, ctx.weight(name)) for name, delta in deltas if hasattr(delta, "of_input")]
    return (x.astype(jnp.float32) * (1 + sum(changes))).astype(x.dtype) if changes else x


def add_deltas(module: Any, x: jax.Array, y: jax.Array, ctx: Context) -> jax.Array:
    """Add what the adapters contribute to a module's output: `y + sum_n w_n delta_n(x, y)`.

    Those of a kind that has a method `together` of its own (not one that it inherits) are computed by it at once.

    Args:
        module: A module with the slot `delta`.
        x: Its input `[..., in]`.
        y: Its own output `[..., out]`.
        ctx: Weights, names and dropout key.
    """
    base = y
    kinds: dict[type[Any], dict[str, Any]] = {}
    for name, delta in (module.delta or {}).items():
        kinds.setdefault(type(delta), {})[name] = delta
    for kind, deltas in kinds.items():
        if len(deltas) > 1 and "together" in vars(kind):
            y = y + kind.together(deltas, module, x, base, ctx)
            continue
        for name, delta in deltas.items():
            y = y + delta(module, x, base, ctx, ctx.weight(name))
    return y
