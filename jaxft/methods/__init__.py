"""Methods: what each attaches to a model, and which leaves it trains."""

from .adapter import Adapter
from .bitfit import BitFit
from .full import Full
from .ia3 import IA3
from .lora import LoRA
from .method import Method, Union
from .p_tuning import PTuning
from .p_tuning_v2 import PTuningV2
from .prefix_tuning import PrefixTuning
from .prompt_tuning import PromptTuning
from .temperature import LearnedTemperature

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "bitfit": BitFit,
    "lora": LoRA,
    "ia3": IA3,
    "adapter": Adapter,
    "prefix_tuning": PrefixTuning,
    "prompt_tuning": PromptTuning,
    "p_tuning": PTuning,
    "p_tuning_v2": PTuningV2,
}
ADDED: dict[str, type[Method]] = {"learned_temperature": LearnedTemperature}  # by a task; none of them stands alone

__all__ = [
    "ADDED",
    "IA3",
    "METHODS",
    "Adapter",
    "BitFit",
    "Full",
    "LearnedTemperature",
    "LoRA",
    "Method",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "Union",
]
