"""Gemma 2 and the text model of Gemma 3 (Gemma Team 2024, 2025): named as the modules of transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import CheckpointError
from .attention import attend
from .cache import Cache
from .config import ModelConfig, activation, layer_windows, refuse_unsupported
from .layers import Join, RMSNorm
from .llama import PROBABILITIES, LlamaAttention, LlamaConfig, LlamaForCausalLM, LlamaMLP, LlamaModel
from .qwen import norm_heads
from .rope import Rope
from .seams import Context, lift, read

DEFAULTS = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(LlamaConfig):
    """The fields of a Gemma 2; every second layer sees everything.

    Attributes:
        query_pre_attn_scalar: The scores are divided by its square root.
        attn_logit_softcapping: Cap of the scores; None for none.
        final_logit_softcapping: Cap of the logits; None for none.

    >>> raw = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    ...        "num_attention_heads": 4}
    >>> config = Gemma2Config.from_raw(raw)
    >>> config.windows, config.attn_logit_softcapping, config.final_logit_softcapping
    ((4096, 1073741824), 50.0, 30.0)
    """

    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a Gemma 2's `config.json`."""
        raw = {**DEFAULTS, **raw, "mlp_bias": False}
        raw["hidden_act"] = activation(raw, "hidden_activation", "gelu_pytorch_tanh")
        refuse_unsupported(raw, {"use_bidirectional_attention": False})
        return {
            **super().parse(raw),
            "windows": layer_windows(raw, raw.get("layer_types") or alternating(raw, 2)),
            "query_pre_attn_scalar": float(raw.get("query_pre_attn_scalar", 256)),
            "attn_logit_softcapping": cap(raw, "attn_logit_softcapping", 50.0),
            "final_logit_softcapping": cap(raw, "final_logit_softcapping", 30.0),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """The fields of a Gemma 3's text model; every sixth layer sees everything, and rotates by a base of its own.

    Attributes:
        local: For each layer, whether it slides.
        local_rope: How the layers that slide rotate.

    >>> raw = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 6,
    ...        "num_attention_heads": 4}
    >>> config = Gemma3Config.from_raw(raw)
    >>> sum(config.local), config.rope.theta, config.local_rope.theta, config.final_logit_softcapping
    (5, 1000000.0, 10000.0, None)
    """

    local: tuple[bool, ...]
    local_rope: Rope

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a Gemma 3 text model's `config.json`."""
        refuse_unsupported(raw, {"attn_logit_softcapping": None})  # transformers reads it, and caps nothing
        pattern = raw.get("sliding_window_pattern", 6)
        types = raw.get("layer_types") or alternating(raw, pattern)
        full, local = ropes(raw)
        caps = {"attn_logit_softcapping": None, "final_logit_softcapping": raw.get("final_logit_softcapping")}
        return {
            **super().parse({**raw, **caps, "layer_types": types, "rope_parameters": full, "rope_scaling": None}),
            "local": tuple(kind == "sliding_attention" for kind in types),
            "local_rope": Rope.parse({"rope_parameters": local}),
        }


def alternating(raw: Mapping[str, Any], pattern: int) -> list[str]:
    """Return the kinds of the layers, of which every `pattern`-th sees everything."""
    return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(raw["num_hidden_layers"])]


def cap(raw: Mapping[str, Any], key: str, default: float) -> float | None:
    """Return a cap of logits, which is positive, or None."""
    value = raw.get(key, default)
    if value is not None and not float(value) > 0:
        raise CheckpointError(f"config.json: {key} is {value!r}; give a number above 0, or null for no cap")
    return None if value is None else float(value)


def ropes(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `rope_parameters` of the full and of the sliding layers, from the keys of transformers 5 or from before.

    >>> ropes({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 500.0})
    ({'rope_theta': 1000000.0, 'rope_type': 'linear', 'factor': 8.0}, {'rope_theta': 500.0})
    """
    given = raw.get("rope_parameters") or {}
    flat = sorted(set(given) - {"full_attention", "sliding_attention"})
    if flat:
        raise CheckpointError(
            f"config.json: rope_parameters has {', '.join(flat)}; for model_type {raw.get('model_type')!r} they are "
            "given for full_attention and for sliding_attention"
        )
    full = {"rope_theta": raw.get("rope_theta", 1e6), **(raw.get("rope_scaling") or {})}
    local = {"rope_theta": raw.get("rope_local_base_freq", 1e4)}
    return {**full, **(given.get("full_attention") or {})}, {**local, **(given.get("sliding_attention") or {})}


class GemmaRMSNorm(RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * (1 + scale)`, all of it in float32."""

    def __init__(self, features: int, eps: float):
        super().__init__(features, eps)
        self.scale = nnx.Param(jnp.zeros((features,)), axes=("norm",))

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Normalise `[B, T, D]` over the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return (wide * (1 + lift(read(self, "scale", ctx).astype(jnp.float32), wide))).astype(x.dtype)


class Gemma2Attention(LlamaAttention):
    """A Llama's attention with a scale of its own and capped scores."""

    config: Gemma2Config

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, ctx: Context) -> jax.Array:
        """Mix the values, as the family scales the scores."""
        c, key = self.config, ctx.key_for(PROBABILITIES)
        scores: dict[str, Any] = {"scale": c.query_pre_attn_scalar**-0.5, "softcap": c.attn_logit_softcapping}
        drops: dict[str, Any] = {"rate": c.attention_dropout, "key": key}
        return attend(q, k, v, mask, **scores, **drops, past=ctx.past, causal=True, platform=ctx.platform)


class Gemma3Attention(Gemma2Attention):
    """Queries and keys are normed in each head, then rotated by the base of the layer's kind."""

    config: Gemma3Config

    def __init__(self, config: Gemma3Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.q_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, x: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Map `[B, T, D]` to `[B, T, D]`, reading and writing the cache where there is one."""
        assert ctx.rope is not None
        kind = jnp.asarray(self.config.local, jnp.int32)[ctx.layer]
        cos, sin = ctx.rope
        return super().__call__(x, ctx.replace(rope=(cos[kind], sin[kind])), cache)

    def project(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map `[B, T, D]` to queries, keys and values `[B, T, heads * head_dim]`, not rotated yet."""
        q, k, v = super().project(x, ctx)
        return norm_heads(self.q_norm, q, ctx), norm_heads(self.k_norm, k, ctx), v


class Gemma2Layer(nnx.Module):
    """Attention and MLP, each normed before and after, and added to the residual stream."""

    attention: ClassVar[type[Gemma2Attention]] = Gemma2Attention

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs):
        self.self_attn = self.attention(config, rngs=rngs)
        self.mlp = LlamaMLP(config, rngs=rngs)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(d, eps)
        self.post_attention_layernorm = GemmaRMSNorm(d, eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(d, eps)
        self.post_feedforward_layernorm = GemmaRMSNorm(d, eps)
        self.attention_adapters, self.output_adapters = Join("attention", d), Join("output", d)

    def __call__(self, x: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Map `[B, T, D]` to `[B, T, D]`."""
        normed = self.input_layernorm(x, ctx)
        y, cache = self.self_attn(normed, ctx, cache)
        x = self.attention_adapters(x, self.post_attention_layernorm(y, ctx), normed, ctx)
        normed = self.pre_feedforward_layernorm(x, ctx)
        y = self.post_feedforward_layernorm(self.mlp(normed, ctx), ctx)
        return self.output_adapters(x, y, normed, ctx), cache


class Gemma3Layer(Gemma2Layer):
    """A Gemma 2's layer with the attention of Gemma 3."""

    attention = Gemma3Attention


class Gemma2Model(LlamaModel):
    """A Llama's backbone with a scaled embedding, and norms around each part."""

    def __init__(self, config: Gemma2Config, layer: Any, *, rngs: nnx.Rngs):
        super().__init__(config, layer, rngs=rngs)
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, ids: jax.Array, ctx: Context) -> jax.Array:
        """Map ids `[B, T]` to `[B, T, D]`, times sqrt(D), rounded to the dtype first as the peer does."""
        return super().embed(ids, ctx) * jnp.asarray(self.config.hidden_size**0.5, self.config.dtype)


class Gemma3Model(Gemma2Model):
    """A Gemma 2's backbone with two bases of rotation."""

    config: Gemma3Config

    def angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines `[2, B, 1, T, head_dim / 2]`: of the layers that see everything, and that slide."""
        c = self.config
        (cos, sin), (local_cos, local_sin) = (rope.angles(positions, c.head_dim) for rope in (c.rope, c.local_rope))
        return jnp.stack([cos, local_cos]), jnp.stack([sin, local_sin])


class Gemma2ForCausalLM(LlamaForCausalLM):
    """A Gemma 2 with its output head, whose logits are capped."""

    config: Gemma2Config
    model_type = "gemma2"
    default_ia3 = (("q_proj", "v_proj", "down_proj"), ("down_proj",))
    config_class: ClassVar[type[ModelConfig]] = Gemma2Config
    layer = Gemma2Layer
    backbone_class = Gemma2Model
    biases = ("attention_bias",)

    def head(self, hidden: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Map `[B, T, D]` to logits `[B, T, V]`, `cap * tanh(logits / cap)` where there is a cap."""
        logits, cap = super().head(hidden, key=key), self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """The text model of a Gemma 3 with its output head."""

    model_type = "gemma3_text"
    config_class = Gemma3Config
    layer = Gemma3Layer
    backbone_class = Gemma3Model
