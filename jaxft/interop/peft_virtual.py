"""`adapter_config.json` of peft's prefix tuning, prompt tuning and P-tuning.

peft's file holds what the virtual tokens are, not what makes them. Where an encoder does, our own words
(`jaxft_method`) and the encoder's tensors stand beside peft's, which ignores both.
"""

from collections.abc import Mapping
from typing import Any

from ..methods import PrefixTuning, PromptTuning, PTuning, PTuningV2

COMMON = {
    "modules_to_save",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "token_dim",
}
PREFIX = COMMON | {"encoder_hidden_size", "init_weights", "prefix_projection"}
PROMPT = COMMON | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
ENCODED = COMMON | {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
STARTS = {"vocab": "SAMPLE_VOCAB", "random": "RANDOM", "text": "RANDOM"}  # TEXT would ask peft for a tokenizer


def _common(method: Any, model: Any, heads: int, width: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "num_layers": model.config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": method.num_virtual_tokens,
        "token_dim": width,
    }


def prefix_config(method: PrefixTuning | PTuningV2, model: Any) -> dict[str, Any]:
    """Return the keys of a prefix: of the prefix itself, whatever makes it here."""
    c = model.config
    width = c.num_key_value_heads * c.head_dim
    config = _common(method, model, c.num_key_value_heads, width)
    return {**config, "encoder_hidden_size": width, "prefix_projection": False}


def prompt_config(method: PromptTuning, model: Any) -> dict[str, Any]:
    """Return the keys of a prompt."""
    config = _common(method, model, model.config.num_attention_heads, model.config.hidden_size)
    return {**config, "prompt_tuning_init": STARTS[method.init]}


def encoded_config(method: PTuning, model: Any) -> dict[str, Any]:
    """Return the keys of a prompt that an encoder makes."""
    config = _common(method, model, model.config.num_attention_heads, model.config.hidden_size)
    return {
        **config,
        "encoder_dropout": method.encoder_dropout,
        "encoder_hidden_size": method.encoder_hidden_size or model.config.hidden_size,
        "encoder_num_layers": method.encoder_num_layers,
        "encoder_reparameterization_type": "LSTM" if method.encoder == "lstm" else "MLP",
    }


def prefix_method(config: Mapping[str, Any], where: str) -> PrefixTuning:
    """Return the flat prefix that a folder of peft's holds, even where a projection made it."""
    del where
    return PrefixTuning(num_virtual_tokens=config["num_virtual_tokens"], init="random")


def prompt_method(config: Mapping[str, Any], where: str) -> PromptTuning:
    """Return the prompt that a folder of peft's holds, whatever it began with."""
    del where
    return PromptTuning(num_virtual_tokens=config["num_virtual_tokens"], init="random")


def encoded_method(config: Mapping[str, Any], where: str) -> PTuning:
    """Return the prompt that a folder of peft's holds, its encoder lost."""
    del where
    return PTuning(num_virtual_tokens=config["num_virtual_tokens"], encoder="none")


def shifts(method: Any) -> bool:
    """Tell whether peft counts positions as the method does."""
    return getattr(method, "position_offset", True)


def makes(method: Any) -> bool:
    """Tell whether peft's words lack what makes the virtual tokens, or how they are trained."""
    folded = isinstance(method, PTuning) and method.encoder != "none"
    return folded or isinstance(method, PTuningV2) or getattr(method, "prefix_projection", False)
