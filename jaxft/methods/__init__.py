"""Methods: what each attaches to a model, and which leaves it trains."""

from .bitfit import BitFit
from .full import Full
from .lora import LoRA
from .method import Method, Union

METHODS: dict[str, type[Method]] = {"full": Full, "bitfit": BitFit, "lora": LoRA}

__all__ = ["METHODS", "BitFit", "Full", "LoRA", "Method", "Union"]
