"""Methods: what each attaches to a model, and which leaves it trains."""

from .adapter import Adapter
from .bitfit import BitFit
from .full import Full
from .lora import LoRA
from .method import Method, Union

METHODS: dict[str, type[Method]] = {"full": Full, "bitfit": BitFit, "lora": LoRA, "adapter": Adapter}

__all__ = ["METHODS", "Adapter", "BitFit", "Full", "LoRA", "Method", "Union"]
