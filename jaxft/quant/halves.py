"""Products with NF4 for a TPU: the high and the low codes of the bytes apart, since there to interleave is dear.

The weights are never put in order: the other factor is taken apart instead, or put together again. For a v5e the
compiler estimates a product of 512 rows with a kernel of 2048 x 8192 at a fifth of the cycles of the one that makes
the kernel first, and needs no room for it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .tables import value_of

SHIFTS = np.array([4, 0], np.uint8)[:, None, None]


def halves(leaf: Any, dtype: Any) -> jax.Array:
    """Return the weights of a kernel without layers as `[2, R, C / 2]`: those of the high codes, and of the low ones.

    Args:
        leaf: An NF4 whose rows are whole blocks.
        dtype: What the product of value and scale is rounded to.
    """
    scales = leaf.scales()
    codes = (leaf.codes[None] >> SHIFTS) & 15
    weights = value_of(codes).reshape(2, *scales.shape, -1) * scales[None, :, :, None]
    return weights.astype(dtype).reshape(codes.shape)


def over_columns(x: jax.Array, leaf: Any) -> jax.Array:
    """Return the product of `[n, C]` with the kernel's rows, `[n, R]`.

    >>> from .nf4 import quantize_nf4
    >>> leaf = quantize_nf4(jax.random.normal(jax.random.key(0), (3, 64)))
    >>> over_columns(jnp.eye(64), leaf).shape
    (64, 3)
    """
    apart = x.reshape(x.shape[0], -1, 2)
    return jax.lax.dot_general(apart, halves(leaf, x.dtype), (((2, 1), (0, 2)), ((), ())))


def over_rows(x: jax.Array, leaf: Any) -> jax.Array:
    """Return the product of `[n, R]` with the kernel's columns, `[n, C]`.

    >>> from .nf4 import quantize_nf4
    >>> leaf = quantize_nf4(jax.random.normal(jax.random.key(0), (3, 64)))
    >>> bool(jnp.allclose(over_rows(jnp.eye(3), leaf), leaf.dequantize()))
    True
    """
    apart = jax.lax.dot_general(x, halves(leaf, x.dtype), (((1,), (1,)), ((), ())))  # [n, 2, C / 2]
    return jnp.swapaxes(apart, 1, 2).reshape(x.shape[0], -1)
