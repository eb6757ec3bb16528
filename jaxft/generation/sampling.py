"""Choosing the next token. Shapes: B rows, V tokens."""

import jax
import jax.numpy as jnp


def filter_logits(logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Divide by the temperature, keep the k likeliest, then the smallest set that holds probability p.

    Each step works on what the one before left, renormalised; the likeliest token always stays.

    Args:
        logits: `[B, V]` float32.
        temperature: Scalar above 0.
        top_k: Scalar int; 0 or V and more keep all.
        top_p: Scalar; 1 keeps all.

    Returns:
        `[B, V]`: logits with what was dropped at -inf.

    >>> kept = filter_logits(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.float32(1), jnp.int32(0), jnp.float32(0.7))
    >>> jnp.isfinite(kept).tolist()
    [[True, True, False]]
    """
    logits = logits / temperature
    vocabulary = logits.shape[-1]
    order = jnp.argsort(-logits, -1)
    rank = jnp.argsort(order, -1)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
    logits = jnp.where(rank < k, logits, -jnp.inf)
    descending = jnp.take_along_axis(jax.nn.softmax(logits, -1), order, -1)
    before = jnp.cumsum(descending, -1) - descending  # the probability of all that are likelier
    kept = (before < top_p) | (jnp.arange(vocabulary) == 0)[None]
    return jnp.where(jnp.take_along_axis(kept, rank, -1), logits, -jnp.inf)


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draw a token `[B]` for each row of `[B, V]` logits, row b with `fold_in(key, b)`; see `filter_logits`."""
    options = (logits, temperature, top_k, top_p)
    kept = jax.lax.cond((top_k > 0) | (top_p < 1), filter_logits, _unfiltered, *options)  # sorting is dear
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, kept)


def _unfiltered(logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    del top_k, top_p
    return logits / temperature
