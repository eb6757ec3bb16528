"""Symmetric int8: one scale for each output of a kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .leaf import Quantized, check_finite, check_kernel, largest

FUNCTION = "quantize_int8"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Quantized):
    """A kernel in int8: a weight is `code * scale`, with the scale of its output.

    Attributes:
        codes: `(*lead, in, out)` int8, from -127 to 127.
        scale: `(*lead, out)` float32: the largest magnitude of an output's weights / 127.
    """

    codes: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel, `(*lead, in, out)`."""
        return tuple(self.codes.shape)

    def axes_of(self, field: str) -> tuple[int | None, ...]:
        """Return the axis of the kernel that each dimension of a component runs along."""
        axes = range(self.ndim)
        return tuple(axes) if field == "codes" else (*axes[:-2], axes[-1])

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the kernel `(*lead, in, out)`, `code * scale` in float32, rounded to `dtype`.

        >>> quantize_int8(jnp.array([[1.0, 0.0], [0.5, -2.0]])).dequantize()
        Array([[ 1.      ,  0.      ],
               [ 0.503937, -2.      ]], dtype=float32)
        """
        return (self.codes.astype(jnp.float32) * self.scale[..., None, :]).astype(dtype)


def quantize_int8(array: Any) -> Int8:
    """Quantise a kernel: `code = round(x / scale)` with `scale = max |x| / 127` over each output's weights.

    Args:
        array: `(*layers, in, out)`, floats, or their shapes alone.

    Returns:
        The leaf; of shapes, one of shapes.

    Raises:
        MethodError: Values that are NaN or infinite, or no floats.

    >>> quantize_int8(jnp.array([[1.0, 0.0], [0.5, -2.0]])).codes
    Array([[ 127,    0],
           [  64, -127]], dtype=int8)
    """
    check_kernel(array, FUNCTION)
    if isinstance(array, jax.ShapeDtypeStruct):
        return Int8(*jax.eval_shape(_pack, array))
    array = jnp.asarray(array)
    codes, scale = _pack(array)
    check_finite(scale, array, FUNCTION)
    return Int8(codes, scale)


@jax.jit
def _pack(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = array.astype(jnp.float32)
    scale = largest(wide, -2) / 127
    return jnp.rint(wide / jnp.where(scale == 0, 1, scale)[..., None, :]).astype(jnp.int8), scale
