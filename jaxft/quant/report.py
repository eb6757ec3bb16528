"""How many bits the parameters of a model take."""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from .leaf import is_quantized


@dataclasses.dataclass(frozen=True)
class BitsReport:
    """Parameters and their bytes, of the arrays that are there; print it for a line.

    Attributes:
        quantized: Parameters that stand in quantised kernels.
        quantized_bytes: Their bytes, scales included.
        total: All parameters, the adapters' included.
        total_bytes: Their bytes.
    """

    quantized: int
    quantized_bytes: int
    total: int
    total_bytes: int

    @property
    def quantized_bits(self) -> float:
        """Bits per quantised parameter; 0 where there is none."""
        return 8 * self.quantized_bytes / self.quantized if self.quantized else 0.0

    @property
    def bits(self) -> float:
        """Bits per parameter, in all."""
        return 8 * self.total_bytes / self.total

    def __str__(self) -> str:
        return (
            f"quantised params: {self.quantized:,} at {self.quantized_bits:.3f} bits || "
            f"all params: {self.total:,} at {self.bits:.3f} bits, {self.total_bytes / 2**30:.3f} GiB"
        )


def bits_report(model: Any) -> BitsReport:
    """Count the bits of a model's parameters.

    Args:
        model: A model, with arrays or with shapes alone.

    >>> import jaxft
    >>> print(bits_report(jaxft.quant.quantize(jaxft.testing.tiny_llama(dtype="bfloat16"), "int8")))
    quantised params: 15,360 at 8.933 bits || all params: 19,616 at 10.467 bits, 0.000 GiB
    """
    quantized = [0, 0]
    total = [0, 0]
    for variable in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        value = variable.get_value() if isinstance(variable, nnx.Param) else None
        if value is None:
            continue
        size = math.prod(value.shape)
        held = value.nbytes if is_quantized(value) else size * value.dtype.itemsize
        for counts in (total, quantized) if is_quantized(value) else (total,):
            counts[0] += size
            counts[1] += held
    return BitsReport(*quantized, *total)
