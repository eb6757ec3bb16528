"""Attention as one function, behind which the kernel is chosen, and the masks it takes.

Shapes: B rows, H query heads, K key/value heads (H a multiple of K), T queries, S keys, E width of a head.
"""

from functools import partial

import jax
import jax.numpy as jnp

from .layers import dropout

MASKED = -1e30  # finite, so that a query that sees nothing (a left pad) stays finite


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
    platform: str | None = None,
) -> jax.Array:
    """Return `softmax(scale q k^T) v` over the keys that the mask allows.

    Args:
        q: `[B, H, T, E]`.
        k: `[B, K, S, E]`; query head h reads key head h // (H / K).
        v: `[B, K, S, E]`.
        mask: `[B or 1, 1, T, S]` bool.
        scale: Factor of the scores; by default `1 / sqrt(E)`.
        softcap: Bends the scaled scores to `softcap * tanh(scores / softcap)` (Gemma 2).
        rate: Dropout on the probabilities, where a key is given.
        key: Dropout key.
        platform: Kind of device that is compiled for; None: the default one.

    Returns:
        `[B, H, T, E]`, in the dtype of `q`.
    """
    drops = key is not None and rate > 0
    if (platform or jax.default_backend()) == "cpu" or drops or softcap is not None:
        return heads_first(q, k, v, mask, scale=scale, softcap=softcap, rate=rate, key=key)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale).swapaxes(1, 2)


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
) -> jax.Array:
    """Attention as plain matrix products per head, the layout that XLA on a CPU multiplies fastest.

    The query heads that share a key head stand below each other, so that keys are never repeated, and the division
    by the sum comes after the product with `v`, on T x E numbers and not on T x S. All of it has four axes and the mask
    is added, not selected by: so XLA makes one kernel of the forward pass, and it is cheaper to run that kernel again
    in the backward pass than to keep T x S numbers for it.
    """
    b, h, t, e = q.shape
    groups = h // k.shape[1]
    scale = e**-0.5 if scale is None else scale

    @partial(jax.checkpoint, prevent_cse=False)
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = (q.reshape(b, -1, groups * t, e) @ k.swapaxes(2, 3)).astype(jnp.float32) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = scores + jnp.tile(jnp.where(mask, 0.0, MASKED), (1, 1, groups, 1))
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        weights = dropout(weights, rate, key).astype(v.dtype)
        return ((weights @ v) / total.astype(v.dtype)).reshape(b, h, t, e)

    return attention(q, k, v)


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


def slide(mask: jax.Array, windows: tuple[int, ...], layer: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """Narrow a mask to a layer's window: a query sees itself and the `window - 1` places before it, as in transformers.

    Args:
        mask: `[B or 1, 1, T, S]` bool.
        windows: The window of every layer. Looked up by the layer's index, it costs one program whatever the depth.
        layer: Index of the layer.
        start: Place of the first query among the keys.

    Returns:
        `[B or 1, 1, T, S]` bool.

    >>> slide(causal_mask(4), (9, 2), jnp.int32(1))[0, 0].astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    queries, keys = (jnp.arange(length) for length in mask.shape[-2:])
    distance = (start + queries)[:, None] - keys[None, :]
    return mask & (distance < jnp.asarray(windows, jnp.int32)[layer])[None, None]


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
