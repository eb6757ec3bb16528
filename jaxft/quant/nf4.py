"""NF4 (Dettmers et al. 2023): four bits a weight, scaled by blocks, and the scales themselves in eight bits."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import MethodError
from .halves import over_columns, over_rows
from .leaf import Quantized, check_finite, check_kernel, largest
from .tables import STEPS, dynamic_codes, dynamic_map, nf4_bounds, value_of

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # as the reference takes them
NESTED = 256  # scales that share a scale of their own
FUNCTION = "quantize_nf4"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Quantized):
    """A kernel in NF4, its bytes those of bitsandbytes for the same tensor (the offset to rounding).

    Flattened, in its own order or in the checkpoint's `(out, in)`, it is cut into blocks, and a weight is
    `value[code] * scale` with its block's scale. Where a row of that order is a number of whole blocks, the
    components keep its two axes, R rows of C weights, so that they can be split over a mesh as the kernel is; else
    they are flat: `[*lead, N]`, the last block and the last byte filled up.

    Attributes:
        codes: uint8, `[*lead, R, C / 2]`: two codes to a byte, the first in the high half.
        absmax: The blocks' scales, `[*lead, R, C / block]`: float32; with double quantisation their uint8 codes.
        nested: With double quantisation the scales of these, `[*lead, n]` float32, one for 256; else None.
        offset: With double quantisation the mean that was taken off the scales first, `[*lead]` float32; else None.
        matrix: `(in, out)`, without the layers.
        block: Weights that share a scale.
        transposed: Whether the flat order is that of `(out, in)`.
    """

    codes: jax.Array
    absmax: jax.Array
    nested: jax.Array | None
    offset: jax.Array | None
    matrix: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(default=64, metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def rows(self) -> tuple[int, int]:
        """The two axes of the kernel in the order of its bytes, R and C."""
        return self.matrix[::-1] if self.transposed else self.matrix

    @property
    def flat(self) -> bool:
        """Whether the components are flat, since a row is no number of whole blocks."""
        return self.rows[1] % self.block != 0

    @property
    def double(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested is not None

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes, of layers."""
        return tuple(self.codes.shape[: -1 if self.flat else -2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel, `(*lead, in, out)`."""
        return (*self.lead, *self.matrix)

    def axes_of(self, field: str) -> tuple[int | None, ...]:
        """Return the axis of the kernel that each dimension of a component runs along."""
        n = len(self.lead)
        inner = (n + 1, n) if self.transposed else (n, n + 1)
        if field in ("codes", "absmax"):
            return (*range(n), *((None,) if self.flat else inner))
        return (*range(n), *((None,) if field == "nested" else ()))

    def scales(self) -> jax.Array:
        """Return the blocks' scales in float32, in the shape of `absmax`."""
        if self.nested is None or self.offset is None:
            return self.absmax
        flat = self.absmax.reshape(*self.lead, -1)
        over = jnp.repeat(self.nested, NESTED, axis=-1)[..., : flat.shape[-1]]
        scaled = jnp.asarray(dynamic_map())[flat] * over
        # The selection, which selects all, keeps product and sum two roundings, as the reference has them: a compiler
        # would make them one, inside a program and not outside.
        scales = jnp.where(jnp.isnan(scaled), 0, scaled) + self.offset[..., None]
        return scales.reshape(self.absmax.shape)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the kernel `(*lead, in, out)`, `value[code] * scale` in float32, rounded to `dtype`.

        >>> quantize_nf4(jnp.array([[0.0, 0.5, -1.0, 1.0]])).dequantize(jnp.bfloat16)
        Array([[0, 0.441406, -1, 1]], dtype=bfloat16)
        """
        both = jnp.stack([self.codes >> 4, self.codes & 15], -1)
        weights = value_of(both.reshape(*self.codes.shape[:-1], -1))
        scales = self.scales()
        weights = _fill(weights, scales.shape[-1] * self.block).reshape(*scales.shape, self.block)
        weights = (weights * scales[..., None]).astype(dtype).reshape(*scales.shape[:-1], -1)
        if self.flat:
            weights = weights[..., : math.prod(self.matrix)].reshape(*self.lead, *self.rows)
        return jnp.swapaxes(weights, -1, -2) if self.transposed else weights

    def times(self, x: jax.Array) -> jax.Array:
        """Return `x kernel`, of `[n, in]` and one matrix; on a TPU without putting the kernel in order."""
        if self.flat:
            return super().times(x)
        apart = over_columns if self.transposed else over_rows
        return jax.lax.platform_dependent(x, self, tpu=apart, default=_times)

    def times_transposed(self, x: jax.Array) -> jax.Array:
        """Return `x kernel^T`, of `[n, out]` and one matrix; on a TPU without putting the kernel in order."""
        if self.flat:
            return super().times_transposed(x)
        apart = over_rows if self.transposed else over_columns
        return jax.lax.platform_dependent(x, self, tpu=apart, default=_times_transposed)


def _times(x: jax.Array, leaf: Quantized) -> jax.Array:
    return Quantized.times(leaf, x)


def _times_transposed(x: jax.Array, leaf: Quantized) -> jax.Array:
    return Quantized.times_transposed(leaf, x)


def quantize_nf4(array: Any, *, block: int = 64, double: bool = True, transposed: bool = False) -> NF4:
    """Quantise a kernel: `code = nearest(x / absmax)` over blocks of its flat order, an even distance to the lower.

    With double quantisation the absmax, less their mean, go to the 8-bit dynamic code in blocks of 256: 4.127 bits a
    weight instead of 4.5. Each matrix of a stack is quantised by itself.

    Args:
        array: `(*layers, in, out)`, floats, or their shapes alone.
        block: Weights that share a scale.
        double: Whether the scales are quantised too.
        transposed: Take the weights in the order of `(out, in)`, in which checkpoints have them.

    Returns:
        The leaf; of shapes, one of shapes.

    Raises:
        MethodError: Values that are NaN or infinite, no floats, or a block that there is not.

    >>> leaf = quantize_nf4(jnp.ones((128, 64)))
    >>> leaf.codes.shape, leaf.nbytes, float(leaf.dequantize().max())
    ((128, 32), 4232, 1.0)
    """
    check_kernel(array, FUNCTION)
    if block not in BLOCKS:
        raise MethodError(f"{FUNCTION}: block={block!r} is none of {', '.join(map(str, BLOCKS))}")
    pack = partial(_pack, block=block, transposed=transposed)
    if isinstance(array, jax.ShapeDtypeStruct):
        parts = jax.eval_shape(lambda x: _parts(x, pack, double), array)
    else:
        parts = _parts(jnp.asarray(array), pack, double)
    codes, absmax, nested, offset = parts
    rows, columns = array.shape[-2:]
    return NF4(codes, absmax, nested, offset, (rows, columns), block, transposed)


def _parts(array: jax.Array, pack: Any, double: bool) -> tuple[Any, Any, Any, Any]:
    codes, absmax = pack(array)
    check_finite(absmax, array, FUNCTION)
    return (codes, *_compress(absmax, array.ndim - 2)) if double else (codes, absmax, None, None)


@partial(jax.jit, static_argnames=("block", "transposed"))
def _pack(array: jax.Array, block: int, transposed: bool) -> tuple[jax.Array, jax.Array]:
    """Return codes, two to a byte, and the blocks' scales."""
    kernel = jnp.swapaxes(array, -1, -2) if transposed else array
    *lead, rows, columns = kernel.shape
    if columns % block:
        kernel, columns = kernel.reshape(*lead, -1), rows * columns
    weights = _fill(kernel.astype(jnp.float32), columns + -columns % block)
    blocks = weights.reshape(*weights.shape[:-1], -1, block)
    absmax = largest(blocks, -1)
    scaled = blocks / jnp.where(absmax == 0, 1, absmax)[..., None]
    codes = sum((scaled > bound).astype(jnp.uint8) for bound in nf4_bounds())
    codes = codes.reshape(weights.shape)[..., : columns + columns % 2]
    return (codes[..., ::2] << 4) | codes[..., 1::2], absmax


@partial(jax.jit, static_argnums=1)
def _compress(absmax: jax.Array, lead: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the codes of scales, the scales of these, and the mean that was taken off; over all but leading axes."""
    flat = absmax.reshape(*absmax.shape[:lead], -1)
    n = flat.shape[-1]
    offset = _fill(flat, n + -n % NESTED).reshape(*flat.shape[:-1], -1, NESTED).sum(-1).sum(-1) / n
    groups = _fill(flat - offset[..., None], n + -n % NESTED).reshape(*flat.shape[:-1], -1, NESTED)
    nested = jnp.abs(groups).max(-1)
    scaled = groups / jnp.where(nested == 0, 1, nested)[..., None]
    steps = ((scaled + 1) * (STEPS / 2) + 0.5).astype(jnp.int32)
    codes = jnp.where(nested[..., None] == 0, 0, jnp.asarray(dynamic_codes())[steps])
    return codes.reshape(*flat.shape[:-1], -1)[..., :n].reshape(absmax.shape), nested, offset


def _fill(x: jax.Array, size: int) -> jax.Array:
    """Lengthen the last axis to a size with zeros, where it is shorter."""
    return x if size == x.shape[-1] else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
