"""Families of models, each a file that mirrors its checkpoint; `FAMILIES` maps a config's `model_type` to it."""

from .base import Model
from .bert import BertModel
from .causal import CausalLM
from .gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from .gpt2 import GPT2LMHeadModel
from .llama import LlamaForCausalLM
from .mistral import MistralForCausalLM
from .qwen import Qwen2ForCausalLM, Qwen3ForCausalLM
from .vit import ViTModel

FAMILIES: dict[str, type[Model]] = {
    family.model_type: family
    for family in (
        LlamaForCausalLM,
        MistralForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
        GPT2LMHeadModel,
        BertModel,
        ViTModel,
    )
}

__all__ = [
    "FAMILIES",
    "BertModel",
    "CausalLM",
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Model",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "ViTModel",
]
