"""Qwen2, 2.5 and 3 (Yang et al. 2024, 2025): Llamas with biases on queries, keys and values, or with norms on them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from .config import layer_windows
from .layers import RMSNorm
from .llama import LlamaAttention, LlamaConfig, LlamaForCausalLM, LlamaLayer
from .seams import Context

DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """The fields of a Qwen2; with `use_sliding_window` the layers from `max_window_layers` on slide.

    >>> raw = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    ...        "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> config = Qwen2Config.from_raw({**raw, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1})
    >>> config.windows, Qwen2Config.from_raw(raw).windows
    ((1073741824, 4), ())
    """

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a Qwen2's `config.json`."""
        raw = {**DEFAULTS, **raw, "attention_bias": True, "mlp_bias": False}
        return {**super().parse(raw), "windows": windows(raw)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """The fields of a Qwen3.

    >>> raw = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    ...        "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> Qwen3Config.from_raw(raw).head_dim, Qwen3Config.from_raw(raw).attention_bias
    (128, False)
    """

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a Qwen3's `config.json`."""
        raw = {**DEFAULTS, "head_dim": 128, **raw, "mlp_bias": False}
        return {**super().parse(raw), "windows": windows(raw)}


def windows(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the window of each layer: by `layer_types`, else from `max_window_layers` on, where windows are on."""
    depth, window = raw["num_hidden_layers"], raw["sliding_window"] if raw.get("use_sliding_window") else None
    first = depth if window is None else raw["max_window_layers"]
    by_depth = ["sliding_attention" if layer >= first else "full_attention" for layer in range(depth)]
    return layer_windows({**raw, "sliding_window": window}, raw.get("layer_types") or by_depth)


class Qwen2Attention(LlamaAttention):
    """A Llama's attention with biases everywhere but on the output."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.o_proj.bias = nnx.data(None)


class Qwen3Attention(LlamaAttention):
    """A Llama's attention with each head's queries and keys normed before they are rotated."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map `[B, T, D]` to queries, keys and values `[B, T, heads * head_dim]`, not rotated yet."""
        q, k, v = super().project(x, ctx)
        return norm_heads(self.q_norm, q, ctx), norm_heads(self.k_norm, k, ctx), v


def norm_heads(norm: RMSNorm, x: jax.Array, ctx: Context) -> jax.Array:
    """Norm every head of `[B, T, heads * head_dim]` by itself."""
    return norm(x.reshape(len(x), -1, norm.scale.shape[-1]), ctx).reshape(x.shape)


class Qwen2Layer(LlamaLayer):
    """A Llama's layer with the attention of Qwen2."""

    attention = Qwen2Attention


class Qwen3Layer(LlamaLayer):
    """A Llama's layer with the attention of Qwen3."""

    attention = Qwen3Attention


class Qwen2ForCausalLM(LlamaForCausalLM):
    """A Qwen2 or 2.5 with its output head."""

    model_type = "qwen2"
    default_ia3 = (("q_proj", "v_proj", "down_proj"), ("down_proj",))
    config_class = Qwen2Config
    layer = Qwen2Layer
    biases = ()


class Qwen3ForCausalLM(LlamaForCausalLM):
    """A Qwen3 with its output head."""

    model_type = "qwen3"
    default_ia3 = (("q_proj", "v_proj", "down_proj"), ("down_proj",))
    config_class = Qwen3Config
    layer = Qwen3Layer
    biases = ("attention_bias",)
