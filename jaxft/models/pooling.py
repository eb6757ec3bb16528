"""From the vectors of a row's tokens to one vector for the row."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..errors import MethodError, nearest


def _weighted(hidden: jax.Array, weights: jax.Array, power: float = 1.0) -> jax.Array:
    """Return `sum_t w_t h_t / (sum_t w_t)^power`; zeros where nothing counts."""
    total = weights.sum(1, keepdims=True)
    return (weights[..., None] * hidden).sum(1) / jnp.where(total > 0, total, 1) ** power


def _at(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """Return one token's vector of each row; index `[B]`."""
    return jnp.take_along_axis(hidden, index[:, None, None], 1)[:, 0]


def _cls(hidden: jax.Array, there: jax.Array) -> jax.Array:
    return _at(hidden, jnp.argmax(there, 1))


def _last(hidden: jax.Array, there: jax.Array) -> jax.Array:
    return _at(hidden, there.shape[1] - 1 - jnp.argmax(there[:, ::-1], 1))


def _mean(hidden: jax.Array, there: jax.Array) -> jax.Array:
    return _weighted(hidden, there.astype(jnp.float32))


def _root(hidden: jax.Array, there: jax.Array) -> jax.Array:
    return _weighted(hidden, there.astype(jnp.float32), 0.5)


def _rising(hidden: jax.Array, there: jax.Array) -> jax.Array:
    """Weigh the tokens 1, 2, 3, ... (Muennighoff 2022), counted over the real ones."""
    return _weighted(hidden, jnp.where(there, jnp.cumsum(there, 1), 0).astype(jnp.float32))


def _max(hidden: jax.Array, there: jax.Array) -> jax.Array:
    top = jnp.where(there[..., None], hidden, -jnp.inf).max(1)
    return jnp.where(there.any(1)[:, None], top, 0)


POOLINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cls": _cls,
    "mean": _mean,
    "max": _max,
    "last": _last,
    "mean_sqrt_len_tokens": _root,
    "weightedmean": _rising,
}


def pool(hidden: jax.Array, mask: jax.Array | None, mode: str) -> jax.Array:
    """Return one vector for each row; what stands at padding, NaN too, changes nothing.

    The modes are those of sentence-transformers: the first (`"cls"`) or `"last"` real token, the `"mean"` or `"max"`
    over all of them, `"mean_sqrt_len_tokens"` (the sum over the root of their number), and `"weightedmean"` (by their
    place, counted over the real ones). A row without a real token gives zeros.

    Args:
        hidden: `[B, T, D]`.
        mask: `[B, T]`, zero at padding, which may stand left or right; None: all are real.
        mode: One of the six.

    Returns:
        `[B, D]`, float32.

    Raises:
        MethodError: Another mode.

    >>> pool(jnp.array([[[9.0], [1.0], [2.0]]]), jnp.array([[0, 1, 1]]), "mean").tolist()
    [[1.5]]
    """
    if mode not in POOLINGS:
        raise MethodError(f"pooling {mode!r}: {nearest(mode, POOLINGS, n=6)}")
    there = jnp.ones(hidden.shape[:2], bool) if mask is None else mask != 0
    return POOLINGS[mode](jnp.where(there[..., None], hidden.astype(jnp.float32), 0), there)
