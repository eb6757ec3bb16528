"""Mistral (Jiang et al. 2023): a Llama whose layers see a sliding window."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .config import layer_windows
from .llama import LlamaConfig, LlamaForCausalLM

DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """The fields of a Mistral; `sliding_window: null` sees everything.

    >>> raw = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    ...        "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> MistralConfig.from_raw(raw).windows, MistralConfig.from_raw({**raw, "sliding_window": None}).windows
    ((4096, 4096), ())
    """

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a Mistral's `config.json`."""
        raw = {**DEFAULTS, **raw, "attention_bias": False, "mlp_bias": False}
        kind = "full_attention" if raw["sliding_window"] is None else "sliding_attention"
        return {**super().parse(raw), "windows": layer_windows(raw, [kind] * raw["num_hidden_layers"])}


class MistralForCausalLM(LlamaForCausalLM):
    """A Mistral with its output head."""

    model_type = "mistral"
    config_class = MistralConfig
    biases = ()
