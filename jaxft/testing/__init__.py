"""Tools for tests: tiny models, and the laws that every method keeps."""

from .laws import LAWS, check_method, token_batch
from .tiny import ToyTokenizer, tiny_bert, tiny_gpt2, tiny_llama, tiny_model, tiny_vit

__all__ = [
    "LAWS",
    "ToyTokenizer",
    "check_method",
    "tiny_bert",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_model",
    "tiny_vit",
    "token_batch",
]
