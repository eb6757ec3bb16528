"""Attention as one function, behind which the kernel is chosen, and the masks it takes.

Shapes: B rows, H query heads, K key/value heads (H a multiple of K), T queries, S keys, E width of a head.
"""

import dataclasses
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from .layers import dropout
from .seams import Past

MASKED = -1e30  # finite, so that a query that sees nothing (a left pad) stays finite
BLOCKS = 4  # of queries in causal attention, each with the keys up to its own last
FEWEST = 64  # queries that are worth it


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    key: jax.Array | None = None,
    past: Past | None = None,
    causal: bool = False,
    platform: str | None = None,
) -> jax.Array:
    """Return `softmax(scale q k^T) v` over the keys that the mask allows, and over those that stand before them.

    Args:
        q: `[B, H, T, E]`.
        k: `[B, K, S, E]`; query head h reads key head h // (H / K).
        v: `[B, K, S, E]`.
        mask: `[B or 1, 1, T or 1, S]` bool.
        scale: Factor of the scores; by default `1 / sqrt(E)`.
        softcap: Bends the scaled scores to `softcap * tanh(scores / softcap)` (Gemma 2).
        rate: Dropout on the probabilities, where a key is given.
        key: Dropout key.
        past: One layer's virtual places: a place of weight w counts as w equal ones would. Where all weigh 0 the
            result is, to the bit, that without them.
        causal: Promise that the mask lets no query see a key after its own place, where there are as many keys as
            queries. What cannot be seen is then left out, most of it.
        platform: Kind of device that is compiled for; None: the default one.

    Returns:
        `[B, H, T, E]`, in the dtype of `q`.
    """
    drops = key is not None and rate > 0

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        kernel = in_blocks if causal and q.shape[2] == k.shape[2] >= FEWEST else heads_first
        return kernel(q, k, v, mask, scale=scale, softcap=softcap, rate=rate, key=key, past=past)

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale).swapaxes(1, 2)

    if (platform or jax.default_backend()) == "cpu" or drops or softcap is not None:
        return plain(q, k, v)
    if past is None:
        return fused(q, k, v)
    return jax.lax.cond((past.weight > 0).any(), plain, fused, q, k, v)


def heads_first(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    rate: float = 0.0,
    key: jax.Array | None = None,
    past: Past | None = None,
) -> jax.Array:
    """Attention as plain matrix products per head, the layout that XLA on a CPU multiplies fastest.

    The query heads that share a key head stand below each other, so that keys are never repeated, and the division
    by the sum comes after the product with `v`, on T x E numbers and not on T x S. All of it has four axes and the mask
    is added, not selected by: so XLA makes one kernel of the forward pass, and it is cheaper to run that kernel again
    in the backward pass than to keep T x S numbers for it.

    The virtual places have products and sums of their own, added at the end: the others are then rounded as they are
    without them, and keys that all rows share are not repeated for each.
    """
    b, h, t, e = q.shape
    groups = h // k.shape[1]
    scale = e**-0.5 if scale is None else scale

    def score(q: jax.Array, k: jax.Array) -> jax.Array:
        scores = (q @ k.swapaxes(2, 3)).astype(jnp.float32) * scale
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    def each_group(x: jax.Array) -> jax.Array:
        return x if x.shape[2] == 1 else jnp.tile(x, (1, 1, groups, 1))

    @partial(jax.checkpoint, prevent_cse=False)
    def attention(q: jax.Array, k: jax.Array, v: jax.Array, past: Past | None) -> jax.Array:
        q = q.reshape(b, -1, groups * t, e)
        scores = score(q, k) + each_group(jnp.where(mask, 0.0, MASKED))
        top = scores.max(-1, keepdims=True)
        if past is not None:
            before = score(q, past.k) + each_group(log_weight(past)[:, None])
            top = jnp.maximum(top, before.max(-1, keepdims=True))
        top = jax.lax.stop_gradient(top)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        mixed = dropout(weights, rate, key).astype(v.dtype) @ v
        if past is not None:
            weights = jnp.exp(before - top)
            total = total + weights.sum(-1, keepdims=True)
            further = None if key is None else jax.random.fold_in(key, 1)
            mixed = mixed + dropout(weights, rate, further).astype(v.dtype) @ past.v
        return (mixed / total.astype(v.dtype)).reshape(b, h, t, e)

    return attention(q, k, v, past)


def in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    key: jax.Array | None,
    past: Past | None,
    **options: Any,
) -> jax.Array:
    """Causal attention, block by block of queries over the keys up to the block's last: 5/8 of the scores, in four.

    The rest is masked, so the numbers are those of `heads_first`, whose arguments these are.
    """
    cuts = [round(i * q.shape[2] / BLOCKS) for i in range(BLOCKS + 1)]
    parts = []
    for n, (a, b) in enumerate(pairwise(cuts)):
        before, own = past, None if key is None else jax.random.fold_in(key, n)
        if before is not None and before.weight.shape[1] > 1:
            before = dataclasses.replace(before, weight=before.weight[:, a:b])
        seen = mask[:, :, a:b, :b] if mask.shape[2] > 1 else mask[..., :b]
        parts.append(heads_first(q[:, :, a:b], k[:, :, :b], v[:, :, :b], seen, key=own, past=before, **options))
    return jnp.concatenate(parts, 2)


def log_weight(past: Past) -> jax.Array:
    """Return the logarithm of the weights, -inf where a place is not there."""
    there = past.weight > 0
    return jnp.where(there, jnp.log(jnp.where(there, past.weight, 1)), -jnp.inf)


def causal_mask(
    length: int, attention_mask: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Return `[B or 1, 1, T, T]` bool: a token sees itself and what stands before it in its own segment.

    Args:
        length: T.
        attention_mask: `[B, T]`, zero at padding. Beside segments it narrows them, it never switches them off.
        segment_ids: `[B, T]`, one number for each packed row; 0 is padding.
    """
    mask = jnp.tril(jnp.ones((length, length), bool))[None]
    if attention_mask is not None:
        mask = mask & (attention_mask != 0)[:, None, :]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids != 0)[:, None, :]
    return mask[:, None]


def open_mask(
    shape: tuple[int, ...], attention_mask: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Return `[B or 1, 1, 1 or T, T]` bool: every token sees every other of its own segment.

    Args:
        shape: `(B, T)`.
        attention_mask: `[B, T]`, zero at padding. Beside segments it narrows them, it never switches them off.
        segment_ids: `[B, T]`, one number for each packed row; 0 is padding.
    """
    mask = jnp.ones((1, 1, shape[1]), bool) if attention_mask is None else (attention_mask != 0)[:, None, :]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids != 0)[:, None, :]
    return mask[:, None]


def slide(
    mask: jax.Array,
    windows: tuple[int, ...],
    layer: jax.Array,
    start: jax.Array | int = 0,
    places: jax.Array | None = None,
) -> jax.Array:
    """Narrow a mask to a layer's window: a query sees itself and the `window - 1` places before it, as in transformers.

    Args:
        mask: `[B or 1, 1, T, S]` bool.
        windows: The window of every layer. Looked up by the layer's index, it costs one program whatever the depth.
        layer: Index of the layer.
        start: Place of the first query among the keys.
        places: `[R, T]` of queries and keys alike, where some of them are not there and do not count.

    Returns:
        `[B or 1, 1, T, S]` bool.

    >>> slide(causal_mask(4), (9, 2), jnp.int32(1))[0, 0].astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    if places is None:
        queries, keys = (jnp.arange(length)[None] for length in mask.shape[-2:])
        queries = start + queries
    else:
        queries = keys = places
    distance = queries[:, :, None] - keys[:, None, :]
    return mask & (distance < jnp.asarray(windows, jnp.int32)[layer])[:, None]


def slide_past(past: Past, positions: jax.Array, windows: tuple[int, ...], layer: jax.Array) -> Past:
    """Narrow what stands before the sequence to a layer's window: each virtual place counts as a token's, as in peft.

    The distance is that of the positions, which by default count the real tokens of the query's own row or segment:
    what is padded or packed before them pushes nothing out of sight. (Between tokens, `slide` counts places.)

    Args:
        past: The virtual places.
        positions: `[B, T]` of the queries, shifted by `past.offset`.
        windows: The window of every layer.
        layer: Index of the layer.

    Returns:
        The same with weights `[B, T, P]`.
    """
    there = past.weight > 0
    ahead = jnp.cumsum(there[..., ::-1], -1)[
        ..., ::-1
    ]  # how many stand between a place and the first token, and itself
    distance = (positions - past.offset)[..., None] + ahead
    near = distance < jnp.asarray(windows, jnp.int32)[layer]
    return dataclasses.replace(past, weight=jnp.where(near, past.weight, 0))


def default_positions(
    shape: tuple[int, ...], attention_mask: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Return `[B, T]` positions: counted from each segment's start, else over real tokens, else from the left.

    >>> default_positions((1, 4), attention_mask=jnp.array([[0, 0, 1, 1]])).tolist()
    [[0, 0, 0, 1]]
    >>> default_positions((1, 5), segment_ids=jnp.array([[1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 0, 1, 0]]
    """
    if segment_ids is not None:
        place = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
        starts = jnp.concatenate([jnp.ones((shape[0], 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
        return place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
    if attention_mask is not None:
        return jnp.maximum(jnp.cumsum(attention_mask != 0, 1) - 1, 0)
    return jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
