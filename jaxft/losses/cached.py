"""Rows chunk by chunk, each chunk computed again in the backward pass: what a large batch of negatives needs.

A contrastive loss sees all rows of a batch at once, the encoder does not. So the encoder's activations are held for one
chunk at a time, as gradient caching does (GradCache, Gao et al. 2021); here the loop is a scan over rematerialised
chunks, and the chain rule does the rest: values and gradients are those of the whole batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..parallel.rules import batch_devices, constrain


def embed_in_chunks(
    embed: Callable[..., Any], rows: Any, *, chunk: int | None, key: jax.Array | None = None, mesh: Mesh | None = None
) -> Any:
    """Return `embed(rows, key=key)`, the embeddings of B rows, in the memory of one chunk.

    Every chunk has a dropout key of its own, and its recomputation draws the same masks. Costs one forward pass more.

    Args:
        embed: Maps rows, each by itself, to `[b, D]`; what it closes over (a model's parameters) is differentiated.
        rows: A pytree of arrays `[B, ...]`.
        chunk: Rows of a chunk at most, over all devices; None: all of them, and nothing is computed again.
        key: Dropout key; None: no dropout.
        mesh: The model's mesh: each chunk then lies over all its devices.

    Returns:
        `[B, D]`, in the order of the rows.

    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> bool((embed_in_chunks(lambda x, key: 2 * x, x, chunk=2) == 2 * x).all())
    True
    """

    def one(rows: Any, index: Any) -> Any:
        return embed(rows, key=None if key is None else jax.random.fold_in(key, index))

    return in_chunks(one, rows, chunk=chunk, mesh=mesh)


def in_chunks(f: Callable[[Any, Any], Any], rows: Any, *, chunk: int | None, mesh: Mesh | None = None) -> Any:
    """Return `f(rows, 0)` of B rows, computed as `f(some of the rows, index of the chunk)`.

    Chunk c of n holds the rows c, c + n, c + 2 n, ...: so each device of a mesh has its part of every chunk already.

    Args:
        f: Maps rows, each by itself, to a pytree of arrays `[b, ...]`.
        rows: A pytree of arrays `[B, ...]`.
        chunk: As for `embed_in_chunks`.
        mesh: As there.

    >>> in_chunks(lambda x, index: x + index, jnp.zeros(5), chunk=2).tolist()  # the sixth row is filled up
    [0.0, 1.0, 2.0, 0.0, 1.0]
    """

    def lies(x: jax.Array, *lead: None) -> jax.Array:
        return constrain(x, mesh, *lead, "batch", *[None] * (x.ndim - 1 - len(lead)))

    total = len(jax.tree.leaves(rows)[0])
    if chunk is None or total <= chunk:
        return jax.tree.map(lies, f(jax.tree.map(lies, rows), 0))
    number, devices = -(-total // chunk), batch_devices(mesh)
    width = -(-total // (number * devices)) * devices

    def split(x: jax.Array) -> jax.Array:
        spare = [(0, number * width - total)] + [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, spare, mode="edge")  # real rows once more: what is finite for them stays so
        return lies(x.reshape(width, number, *x.shape[1:]).swapaxes(0, 1), None)

    def join(x: jax.Array) -> jax.Array:
        return lies(x.swapaxes(0, 1).reshape(number * width, *x.shape[2:])[:total])

    body = jax.checkpoint(lambda chunk: f(*chunk), prevent_cse=False)
    made = jax.lax.map(body, (jax.tree.map(split, rows), jnp.arange(number)))
    return jax.tree.map(join, made)
