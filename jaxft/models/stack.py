"""Layers of one kind as one module with a leading layer axis, run by one scan: compile time does not grow with depth.

A delta that sits in some of the layers only holds leaves `[n, ...]` for those n, with their indices in its static
attribute `layers_held`; `spread` scatters them to `[L, ...]` before the scan. A layer that has none gets zeros, and
no leaf stands for it, so nothing outside the selection can drift.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..parallel.rules import constrain
from .cache import Kept
from .seams import Context


def stacked(make: Callable[[nnx.Rngs], Any], depth: int, rngs: nnx.Rngs) -> Any:
    """Make `depth` layers, each with values of its own, as one module whose leaves lead with the layer axis."""
    layers = nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)
    for variable in jax.tree.leaves(layers, is_leaf=lambda v: isinstance(v, nnx.Variable)):
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    layers.stack_depth = depth
    return layers


def spread(tree: Any, depth: int) -> Any:
    """Scatter the leaves of every module that sits in some layers only, zeros elsewhere, so that a scan can take them.

    Args:
        tree: Stacked layers, or one delta of theirs.
        depth: L, the number of layers of the stack.
    """

    def partial(module: Any) -> bool:
        return isinstance(module, nnx.Module) and getattr(module, "layers_held", None) is not None

    def scatter(module: Any) -> Any:
        if not partial(module):
            return module
        slot = np.full(depth, len(module.layers_held))  # one past the end: the zeros
        slot[list(module.layers_held)] = np.arange(len(module.layers_held))
        return jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1])])[slot], module)

    return jax.tree.map(scatter, tree, is_leaf=partial)


def run(layers: Any, x: jax.Array, ctx: Context, cache: Any, remat: str) -> tuple[jax.Array, Any]:
    """Apply the layers in order.

    Args:
        layers: A module made by `stacked`; called as `layer(x, ctx, cache) -> (x, cache)`.
        x: `[B, T, D]`.
        ctx: The context; each layer gets a dropout key of its own, and its part of `past`.
        cache: Carried along, in the scan's carry: as scanned input and output it would be held twice. A `Kept` comes
            back with the keys and values of every layer.
        remat: `"none"`, or `"full"`: keep only each layer's input for the backward pass.
    """
    rows = ("batch", None, None)

    def body(carry: Any, xs: Any) -> tuple[Any, Kept | None]:
        layer, index, past = xs
        here = ctx.at_layer(index)
        if ctx.past is not None:
            here = here.replace(past=dataclasses.replace(ctx.past, k=past[0], v=past[1]))
        x, cache = layer(constrain(carry[0], ctx.mesh, *rows), here, carry[1])
        kept = cache if isinstance(cache, Kept) else None
        return (constrain(x, ctx.mesh, *rows), cache if kept is None else Kept()), kept

    if remat == "full":
        body = jax.checkpoint(body, prevent_cse=False)
    depth = layers.stack_depth
    past = None if ctx.past is None else (ctx.past.k, ctx.past.v)
    (x, cache), kept = jax.lax.scan(body, (x, cache), (spread(layers, depth), jnp.arange(depth), past))
    return x, cache if kept is None else kept
