"""Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024): named as the modules of transformers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from .attention import attend, slide, slide_past
from .cache import Cache, Kept
from .causal import CausalLM
from .config import ModelConfig, activation
from .layers import ACTIVATIONS, Embed, Join, Linear, RMSNorm
from .rope import Rope, rotate
from .seams import Context, number
from .stack import run, stacked

PROBABILITIES = number("attention_dropout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """The fields of a Llama, and of the families that are one with a difference.

    Attributes:
        windows: How many places each layer's queries see, themselves included; () where all see everything.

    >>> raw = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    ...        "num_attention_heads": 2}
    >>> config = LlamaConfig.from_raw(raw)
    >>> config.head_dim, config.num_key_value_heads, config.rope.theta
    (4, 2, 10000.0)
    """

    rms_norm_eps: float
    rope: Rope
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    attention_dropout: float
    windows: tuple[int, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a Llama's `config.json`."""
        heads = raw["num_attention_heads"]
        return {
            **{key: raw[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            "num_attention_heads": heads,
            "num_key_value_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
            "rope": Rope.parse(raw),
            "hidden_act": activation(raw, "hidden_act", "silu"),
            "attention_bias": raw.get("attention_bias", False),
            "mlp_bias": raw.get("mlp_bias", False),
            "attention_dropout": float(raw.get("attention_dropout", 0.0)),
        }


class LlamaAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        q, kv, bias = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.attention_bias
        self.q_proj = Linear(c.hidden_size, q, axes=("embed", "heads"), use_bias=bias, rngs=rngs)
        self.k_proj = Linear(c.hidden_size, kv, axes=("embed", "kv_heads"), use_bias=bias, rngs=rngs)
        self.v_proj = Linear(c.hidden_size, kv, axes=("embed", "kv_heads"), use_bias=bias, rngs=rngs)
        self.o_proj = Linear(q, c.hidden_size, axes=("heads", "embed"), use_bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Map `[B, T, D]` to `[B, T, D]`, reading and writing the cache where there is one."""
        b, t, _ = x.shape
        c, mask = self.config, ctx.mask
        assert mask is not None
        assert ctx.rope is not None
        assert ctx.layer is not None
        q, k, v = (y.reshape(b, t, -1, c.head_dim).swapaxes(1, 2) for y in self.project(x, ctx))
        q, k = rotate(q, ctx.rope), rotate(k, ctx.rope)
        if c.windows:
            virtual = ctx.positions if isinstance(cache, Kept) else None
            mask = slide(mask, c.windows, ctx.layer, 0 if cache is None else cache.index, virtual)
        if cache is not None:
            cache, k, v = cache.write(ctx.layer, k, v)
        if c.windows and ctx.past is not None:
            assert ctx.positions is not None
            ctx = ctx.replace(past=slide_past(ctx.past, ctx.positions, c.windows, ctx.layer))
        out = self.attend(q, k, v, mask, ctx)
        return self.o_proj(out.swapaxes(1, 2).reshape(b, t, -1), ctx), cache

    def project(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map `[B, T, D]` to queries, keys and values `[B, T, heads * head_dim]`, not rotated yet."""
        return self.q_proj(x, ctx), self.k_proj(x, ctx), self.v_proj(x, ctx)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, ctx: Context) -> jax.Array:
        """Mix the values, as the family scales the scores."""
        rate, key = self.config.attention_dropout, ctx.key_for(PROBABILITIES)
        return attend(q, k, v, mask, rate=rate, key=key, past=ctx.past, causal=True, platform=ctx.platform)


class LlamaMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, f, axes=("embed", "mlp"), use_bias=bias, rngs=rngs)
        self.up_proj = Linear(d, f, axes=("embed", "mlp"), use_bias=bias, rngs=rngs)
        self.down_proj = Linear(f, d, axes=("mlp", "embed"), use_bias=bias, rngs=rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, D]`."""
        return self.down_proj(ACTIVATIONS[self.hidden_act](self.gate_proj(x, ctx)) * self.up_proj(x, ctx), ctx)


class LlamaLayer(nnx.Module):
    """Attention and MLP, each normed before and added to the residual stream."""

    attention: ClassVar[type[LlamaAttention]] = LlamaAttention

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.self_attn = self.attention(config, rngs=rngs)
        self.mlp = LlamaMLP(config, rngs=rngs)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention_adapters = Join("attention", config.hidden_size)
        self.output_adapters = Join("output", config.hidden_size)

    def __call__(self, x: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Map `[B, T, D]` to `[B, T, D]`."""
        normed = self.input_layernorm(x, ctx)
        y, cache = self.self_attn(normed, ctx, cache)
        x = self.attention_adapters(x, y, normed, ctx)
        normed = self.post_attention_layernorm(x, ctx)
        return self.output_adapters(x, self.mlp(normed, ctx), normed, ctx), cache


class LlamaModel(nnx.Module):
    """Embedding, layers of the given kind, final norm."""

    def __init__(self, config: LlamaConfig, layer: Callable[..., nnx.Module], *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = stacked(lambda r: layer(config, rngs=r), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def input_embedding(self) -> Embed:
        """Return the table that a tied head calls."""
        return self.embed_tokens

    def __call__(self, x: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Map vectors `[B, T, D]` to hidden states `[B, T, D]`."""
        c = self.config
        assert ctx.positions is not None
        ctx = ctx.replace(rope=self.angles(ctx.positions))
        x, cache = run(self.layers, x, ctx, cache, c.remat)
        return self.norm(x, ctx), cache

    def embed(self, ids: jax.Array, ctx: Context) -> jax.Array:
        """Map ids `[B, T]` to `[B, T, D]`, what the first layer reads."""
        return self.embed_tokens(ids, ctx).astype(self.config.dtype)

    def angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines for positions `[B, T]`, what every layer rotates by."""
        return self.config.rope.angles(positions, self.config.head_dim)


class LlamaForCausalLM(CausalLM):
    """A Llama with its output head, tied to the embedding or with a kernel of its own.

    A family that is a Llama with a difference sets `layer`, and in `biases` which biases its config speaks of.
    """

    model_type = "llama"
    prefix = stem = "model"
    config_class: ClassVar[type[ModelConfig]] = LlamaConfig
    default_targets = ("q_proj", "v_proj")
    default_ia3 = (("k_proj", "v_proj", "down_proj"), ("down_proj",))
    disposable = r".*rotary_emb\.inv_freq"
    layer: ClassVar[type[nnx.Module]] = LlamaLayer
    backbone_class: ClassVar[type[LlamaModel]] = LlamaModel
    biases: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias")

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        self.model = self.make_backbone(config, rngs)
        d, v, tied = config.hidden_size, config.vocab_size, config.tie_word_embeddings
        self.lm_head = Linear(d, v, axes=("embed", "vocab"), tied=tied, rngs=rngs)

    @classmethod
    def make_backbone(cls, config: Any, rngs: nnx.Rngs) -> LlamaModel:
        """Return a fresh backbone of the family's layers."""
        return cls.backbone_class(config, cls.layer, rngs=rngs)

    @classmethod
    def backbone_keys(cls, backbone: Any) -> dict[str, Any]:
        """Return the keys of `config.json` that follow from which biases a backbone has."""
        layers = backbone.layers
        biases = {"attention_bias": layers.self_attn.q_proj.bias, "mlp_bias": layers.mlp.up_proj.bias}
        return {key: biases[key] is not None for key in cls.biases}
