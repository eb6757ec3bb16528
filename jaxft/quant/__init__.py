"""Quantised kernels: leaves of a model's tree that the seam `dot` understands."""

from .int8 import Int8, quantize_int8
from .leaf import Quantized, is_quantized
from .nf4 import NF4, quantize_nf4

__all__ = ["NF4", "Int8", "Quantized", "is_quantized", "quantize_int8", "quantize_nf4"]
