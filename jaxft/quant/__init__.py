"""Quantised kernels: leaves of a model's tree that the seam `dot` understands."""

from .int8 import Int8, quantize_int8
from .leaf import Quantized, is_quantized
from .model import dequantize, quantize
from .nf4 import NF4, quantize_nf4
from .report import BitsReport, bits_report

__all__ = [
    "NF4",
    "BitsReport",
    "Int8",
    "Quantized",
    "bits_report",
    "dequantize",
    "is_quantized",
    "quantize",
    "quantize_int8",
    "quantize_nf4",
]
