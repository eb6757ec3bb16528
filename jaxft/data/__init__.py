"""Rows to batches: every format to the exact token, mixtures in exact proportions, one order a seed."""

from .batches import TrainBatches, collate, eval_batches
from .formats import FORMATS, prompt_and_completion
from .packing import PackedBatches, pack
from .rows import read_rows
from .source import Dataset, load_dataset
from .templates import Template
from .tokens import Example

__all__ = [
    "FORMATS",
    "Dataset",
    "Example",
    "PackedBatches",
    "Template",
    "TrainBatches",
    "collate",
    "eval_batches",
    "load_dataset",
    "pack",
    "prompt_and_completion",
    "read_rows",
]
