"""Rows to batches: every format to the exact token, mixtures in exact proportions, one order a seed; pictures."""

from .augment import Augmentation, augment, two_views
from .batches import GroupedBatches, TrainBatches, collate, eval_batches
from .columns import Reading, Texts, collate_texts, load_columns
from .formats import FORMATS, prompt_and_completion
from .images import ImageDataset, load_images
from .packing import PackedBatches, pack
from .pixels import ImageProcessor, read_processor
from .preference import Comparison, collate_comparisons, load_comparisons
from .prompts import Prompt, collate_prompts, load_prompts, numbered
from .regions import RegionDataset, load_regions, region_features
from .rows import read_rows
from .source import Dataset, load_dataset
from .templates import Template
from .tokens import Example

__all__ = [
    "FORMATS",
    "Augmentation",
    "Comparison",
    "Dataset",
    "Example",
    "GroupedBatches",
    "ImageDataset",
    "ImageProcessor",
    "PackedBatches",
    "Prompt",
    "Reading",
    "RegionDataset",
    "Template",
    "Texts",
    "TrainBatches",
    "augment",
    "collate",
    "collate_comparisons",
    "collate_prompts",
    "collate_texts",
    "eval_batches",
    "load_columns",
    "load_comparisons",
    "load_dataset",
    "load_images",
    "load_prompts",
    "load_regions",
    "numbered",
    "pack",
    "prompt_and_completion",
    "read_processor",
    "read_rows",
    "region_features",
    "two_views",
]
