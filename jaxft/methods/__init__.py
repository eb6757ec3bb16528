"""Methods: what each attaches to a model, and which leaves it trains."""

from .bitfit import BitFit
from .full import Full
from .ia3 import IA3
from .lora import LoRA
from .method import Method, Union

METHODS: dict[str, type[Method]] = {"full": Full, "bitfit": BitFit, "lora": LoRA, "ia3": IA3}

__all__ = ["IA3", "METHODS", "BitFit", "Full", "LoRA", "Method", "Union"]
