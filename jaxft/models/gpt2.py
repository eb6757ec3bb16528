"""GPT-2 (Radford et al. 2019): named as the modules of transformers, its kernels stored `(in, out)` as there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import BatchError, CheckpointError
from .attention import attend
from .cache import Cache
from .causal import CausalLM
from .config import ModelConfig, activation, refuse_unsupported
from .layers import ACTIVATIONS, Embed, Join, LayerNorm, Linear, dropout
from .seams import Context, number
from .stack import run, stacked

EMBEDDING, PROBABILITIES, ATTENTION, MLP = map(number, ("embd_pdrop", "attn_pdrop", "attn.resid", "mlp.resid"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """The fields of a GPT-2.

    >>> config = GPT2Config.from_raw({"vocab_size": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16})
    >>> config.intermediate_size, config.tie_word_embeddings, config.resid_pdrop
    (32, True, 0.1)
    """

    n_positions: int
    layer_norm_epsilon: float
    activation_function: str
    scale_attn_weights: bool
    embd_pdrop: float
    attn_pdrop: float
    resid_pdrop: float

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a GPT-2's `config.json`."""
        refuse_unsupported(raw, {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False})
        heads, width = raw["n_head"], raw["n_embd"]
        if width % heads:
            raise CheckpointError(f"config.json: n_embd {width} is no multiple of n_head {heads}")
        return {
            "vocab_size": raw["vocab_size"],
            "hidden_size": width,
            "num_hidden_layers": raw["n_layer"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": width // heads,
            "tie_word_embeddings": raw.get("tie_word_embeddings", True),
            "intermediate_size": raw.get("n_inner") or 4 * width,
            "n_positions": raw["n_positions"],
            "layer_norm_epsilon": float(raw.get("layer_norm_epsilon", 1e-5)),
            "activation_function": activation(raw, "activation_function", "gelu_new"),
            "scale_attn_weights": raw.get("scale_attn_weights", True),
            **{key: float(raw.get(key, 0.1)) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")},
        }


class GPT2Attention(nnx.Module):
    """Multi-head attention whose queries, keys and values come from one product."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        d, self.config = config.hidden_size, config
        self.c_attn = Linear(d, 3 * d, axes=("embed", "heads"), use_bias=True, transposed=False, rngs=rngs)
        self.c_proj = Linear(d, d, axes=("heads", "embed"), use_bias=True, transposed=False, rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Map `[B, T, D]` to `[B, T, D]`, reading and writing the cache where there is one."""
        b, t, d = x.shape
        c = self.config
        assert ctx.mask is not None
        assert ctx.layer is not None
        parts = jnp.split(self.c_attn(x, ctx), 3, -1)
        q, k, v = (y.reshape(b, t, c.num_attention_heads, c.head_dim).swapaxes(1, 2) for y in parts)
        if not c.scale_attn_weights:
            q = q * c.head_dim**0.5
        if cache is not None:
            cache, k, v = cache.write(ctx.layer, k, v)
        drops: dict[str, Any] = {"rate": c.attn_pdrop, "key": ctx.key_for(PROBABILITIES)}
        out = attend(q, k, v, ctx.mask, **drops, past=ctx.past, causal=True, platform=ctx.platform)
        return self.c_proj(out.swapaxes(1, 2).reshape(b, t, d), ctx), cache


class GPT2MLP(nnx.Module):
    """`c_proj(act(c_fc(x)))`."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.c_fc = Linear(d, f, axes=("embed", "mlp"), use_bias=True, transposed=False, rngs=rngs)
        self.c_proj = Linear(f, d, axes=("mlp", "embed"), use_bias=True, transposed=False, rngs=rngs)
        self.activation = config.activation_function

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, D]`."""
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x, ctx)), ctx)


class GPT2Block(nnx.Module):
    """Attention and MLP, each normed before, dropped out and added to the residual stream."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, rngs=rngs)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config, rngs=rngs)
        self.attention_adapters = Join("attention", config.hidden_size)
        self.output_adapters = Join("output", config.hidden_size)
        self.rate = config.resid_pdrop

    def __call__(self, x: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Map `[B, T, D]` to `[B, T, D]`."""
        normed = self.ln_1(x, ctx)
        y, cache = self.attn(normed, ctx, cache)
        x = self.attention_adapters(x, dropout(y, self.rate, ctx.key_for(ATTENTION)), normed, ctx)
        normed = self.ln_2(x, ctx)
        y = dropout(self.mlp(normed, ctx), self.rate, ctx.key_for(MLP))
        return self.output_adapters(x, y, normed, ctx), cache


class GPT2Model(nnx.Module):
    """Token and position embeddings, blocks, final norm."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.wte = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.wpe = Embed(config.n_positions, config.hidden_size, axes=("positions", "embed"), rngs=rngs)
        self.h = stacked(lambda r: GPT2Block(config, rngs=r), config.num_hidden_layers, rngs)
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_epsilon)

    def input_embedding(self) -> Embed:
        """Return the table that a tied head calls."""
        return self.wte

    def embed(self, ids: jax.Array, ctx: Context) -> jax.Array:
        """Map ids `[B, T]` to `[B, T, D]`, without their positions."""
        return self.wte(ids, ctx).astype(self.config.dtype)

    def __call__(self, x: jax.Array, ctx: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Map vectors `[B, T, D]` to hidden states `[B, T, D]`."""
        c, before = self.config, 0 if ctx.past is None else ctx.past.room
        assert ctx.positions is not None
        if x.shape[1] + before > c.n_positions:
            taken = f", of which virtual tokens take {before}" if before else ""
            raise BatchError(f"rows of {x.shape[1]} tokens: this model has {c.n_positions} positions{taken}")
        x = x + self.wpe(ctx.positions, ctx).astype(c.dtype)
        x = dropout(x, c.embd_pdrop, ctx.key_for(EMBEDDING))
        x, cache = run(self.h, x, ctx, cache, c.remat)
        return self.ln_f(x, ctx), cache


class GPT2LMHeadModel(CausalLM):
    """A GPT-2 with its output head, tied to the token embedding as a rule."""

    model_type = "gpt2"
    prefix = stem = "transformer"
    config_class = GPT2Config
    default_targets = ("c_attn",)
    default_ia3 = (("c_attn", "mlp.c_proj"), ("mlp.c_proj",))
    disposable = r".*attn\.(masked_)?bias"

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        super().__init__(config)
        self.transformer = self.make_backbone(config, rngs)
        d, v, tied = config.hidden_size, config.vocab_size, config.tie_word_embeddings
        self.lm_head = Linear(d, v, axes=("embed", "vocab"), tied=tied, rngs=rngs)

    @classmethod
    def make_backbone(cls, config: Any, rngs: nnx.Rngs) -> GPT2Model:
        """Return a fresh backbone."""
        return GPT2Model(config, rngs=rngs)
