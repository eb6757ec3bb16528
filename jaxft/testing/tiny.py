"""Tiny random models and a toy tokenizer, for tests."""

from typing import Any

import jax.numpy as jnp

from ..models import FAMILIES, BertModel, ViTModel
from ..models.bert import BertConfig
from ..models.gpt2 import GPT2Config, GPT2LMHeadModel
from ..models.hub import fresh_model
from ..models.llama import LlamaConfig, LlamaForCausalLM
from ..models.vit import ViTConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def tiny_llama(*, seed: int = 0, remat: str = "none", dtype: Any = jnp.float32, **raw: Any) -> LlamaForCausalLM:
    """Return a random Llama of two layers, with a vocabulary of 64; keywords go into its `config.json`.

    >>> tiny_llama(tie_word_embeddings=True).config.tie_word_embeddings
    True
    """
    config = LlamaConfig.from_raw({**LLAMA, **raw}, remat=remat, dtype=jnp.dtype(dtype))
    return fresh_model(config, seed)


def tiny_gpt2(*, seed: int = 0, remat: str = "none", dtype: Any = jnp.float32, **raw: Any) -> GPT2LMHeadModel:
    """Return a random GPT-2 of two layers, without dropout, with a vocabulary of 64; keywords as in `tiny_llama`.

    >>> tiny_gpt2(n_layer=3).transformer.h.stack_depth
    3
    """
    config = GPT2Config.from_raw({**GPT2, **raw}, remat=remat, dtype=jnp.dtype(dtype))
    return fresh_model(config, seed)


def tiny_bert(*, seed: int = 0, remat: str = "none", dtype: Any = jnp.float32, **raw: Any) -> BertModel:
    """Return a random BERT of two layers, without dropout, with a vocabulary of 64; keywords as in `tiny_llama`.

    >>> tiny_bert()([[5, 6, 7]]).shape
    (1, 3, 32)
    """
    config = BertConfig.from_raw({**BERT, **raw}, remat=remat, dtype=jnp.dtype(dtype))
    return fresh_model(config, seed)


def tiny_vit(*, seed: int = 0, remat: str = "none", dtype: Any = jnp.float32, **raw: Any) -> ViTModel:
    """Return a random ViT of two layers, for RGB pictures of 8 by 8 pixels in 4 patches; keywords as in `tiny_llama`.

    >>> tiny_vit(image_size=[8, 12]).config.grid
    (2, 3)
    """
    config = ViTConfig.from_raw({**VIT, **raw}, remat=remat, dtype=jnp.dtype(dtype))
    return fresh_model(config, seed)


def tiny_model(model_type: str, *, seed: int = 0, remat: str = "none", dtype: Any = jnp.float32, **raw: Any) -> Any:
    """Return a random model of any family that is a Llama with a difference; sizes and keywords as in `tiny_llama`.

    >>> tiny_model("mistral", sliding_window=4).config.windows
    (4, 4)
    """
    raw = {**LLAMA, "model_type": model_type, "head_dim": 8, **raw}
    config = FAMILIES[model_type].config_class.from_raw(raw, remat=remat, dtype=jnp.dtype(dtype))
    return fresh_model(config, seed)


class ToyTokenizer:
    """A tokenizer of letters: `a` is 1, `b` is 2, ...; 0 is the end token.

    >>> ToyTokenizer()("bad")["input_ids"], ToyTokenizer().decode([2, 1, 4, 0])
    ([2, 1, 4], 'bad')
    """

    eos_token_id = 0

    def __call__(
        self,
        text: str | list[str],
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, Any]:
        """Turn a text into ids, or two that follow each other, or a list of texts; there is no begin token to add."""
        del add_special_tokens
        if isinstance(text, list):
            return {"input_ids": [self(one, truncation=truncation, max_length=max_length)["input_ids"] for one in text]}
        parts = [[ord(letter) - 96 for letter in part] for part in (text, text_pair or "")]
        cut = max_length if truncation else None
        found = {"input_ids": [*parts[0], *parts[1]][:cut]}
        if text_pair is not None:
            found["token_type_ids"] = [n for n, part in enumerate(parts) for _ in part][:cut]
        return found

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Turn ids into a text."""
        return "".join(chr(i + 96) for i in ids if not (skip_special_tokens and i == 0))
