"""Families of models, each a file that mirrors its checkpoint.

Two tables go from a config's `model_type` to them: `FAMILIES`, and `CLASSIFIERS` with a classification head.
"""

from .base import Model
from .bert import BertForSequenceClassification, BertModel
from .causal import CausalLM
from .gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from .gpt2 import GPT2LMHeadModel
from .heads import (
    Gemma2ForSequenceClassification,
    Gemma3TextForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    MistralForSequenceClassification,
    Qwen2ForSequenceClassification,
    Qwen3ForSequenceClassification,
)
from .llama import LlamaForCausalLM
from .mistral import MistralForCausalLM
from .qwen import Qwen2ForCausalLM, Qwen3ForCausalLM
from .roberta import (
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)
from .vit import ViTForImageClassification, ViTModel

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
        RobertaModel,
        XLMRobertaModel,
        ViTModel,
    )
}
CLASSIFIERS: dict[str, type[Model]] = {
    family.model_type: family
    for family in (
        LlamaForSequenceClassification,
        MistralForSequenceClassification,
        Qwen2ForSequenceClassification,
        Qwen3ForSequenceClassification,
        Gemma2ForSequenceClassification,
        Gemma3TextForSequenceClassification,
        GPT2ForSequenceClassification,
        BertForSequenceClassification,
        RobertaForSequenceClassification,
        XLMRobertaForSequenceClassification,
        ViTForImageClassification,
    )
}

__all__ = [
    "CLASSIFIERS",
    "FAMILIES",
    "BertForSequenceClassification",
    "BertModel",
    "CausalLM",
    "GPT2ForSequenceClassification",
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    "Gemma3ForCausalLM",
    "Gemma3TextForSequenceClassification",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "MistralForCausalLM",
    "MistralForSequenceClassification",
    "Model",
    "Qwen2ForCausalLM",
    "Qwen2ForSequenceClassification",
    "Qwen3ForCausalLM",
    "Qwen3ForSequenceClassification",
    "RobertaForSequenceClassification",
    "RobertaModel",
    "ViTForImageClassification",
    "ViTModel",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaModel",
]
