"""Families of models, each a file that mirrors its checkpoint; `FAMILIES` maps a config's `model_type` to it."""

from .causal import CausalLM
from .gpt2 import GPT2LMHeadModel
from .llama import LlamaForCausalLM

FAMILIES: dict[str, type[CausalLM]] = {family.model_type: family for family in (LlamaForCausalLM, GPT2LMHeadModel)}

__all__ = ["FAMILIES", "CausalLM", "GPT2LMHeadModel", "LlamaForCausalLM"]
