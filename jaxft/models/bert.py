"""BERT (Devlin et al. 2019), MiniLM among them: post-norm, named as the modules of transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import BatchError, CheckpointError
from .attention import attend
from .config import ModelConfig, activation, refuse_unsupported
from .encoder import TextClassifier, TextEncoder
from .layers import ACTIVATIONS, Embed, Join, LayerNorm, Linear, dropout
from .seams import Context, number
from .stack import run, stacked
from .virtual import apart

SITES = ("embeddings", "attention.self", "attention.output", "output", "classifier")
EMBEDDING, PROBABILITIES, ATTENTION, OUTPUT, CLASSIFIER = (number(f"{site}.dropout") for site in SITES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """The fields of a BERT.

    Attributes:
        n_positions: How many positions there are to learn.
        first_position: Row of the table that the first of them has.

    >>> raw = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> config = BertConfig.from_raw({**raw, "intermediate_size": 16, "max_position_embeddings": 64})
    >>> config.n_positions, config.hidden_dropout_prob, config.pooling
    (64, 0.1, 'mean')
    """

    sizes: ClassVar[tuple[str, ...]] = (*ModelConfig.sizes, "n_positions", "type_vocab_size")

    pooling: str = "mean"
    n_positions: int
    first_position: int = 0
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    classifier_dropout: float

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a BERT's `config.json`."""
        plain = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
        refuse_unsupported(raw, plain)
        heads, width = raw["num_attention_heads"], raw["hidden_size"]
        if width % heads:
            raise CheckpointError(f"config.json: hidden_size {width} is no multiple of num_attention_heads {heads}")
        rates = {key: float(raw.get(key, 0.1)) for key in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
        own = raw.get("classifier_dropout")
        return {
            **{key: raw[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": width // heads,
            "n_positions": raw.get("max_position_embeddings", 512),
            "type_vocab_size": raw.get("type_vocab_size", 2),
            "layer_norm_eps": float(raw.get("layer_norm_eps", 1e-12)),
            "hidden_act": activation(raw, "hidden_act", "gelu"),
            "classifier_dropout": rates["hidden_dropout_prob"] if own is None else float(own),
            **rates,
        }


class BertEmbeddings(nnx.Module):
    """Word, position and token type embeddings, summed and normed."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        c, rows = config, config.first_position + config.n_positions
        self.word_embeddings = Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        self.position_embeddings = Embed(rows, c.hidden_size, axes=("positions", "embed"), rngs=rngs)
        self.token_type_embeddings = Embed(c.type_vocab_size, c.hidden_size, axes=("positions", "embed"), rngs=rngs)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.first, self.rate = c.first_position, c.hidden_dropout_prob

    def __call__(self, words: jax.Array, ctx: Context) -> jax.Array:
        """Map embedded words `[B, T, D]` to what the first layer reads, `[B, T, D]`."""
        assert ctx.positions is not None
        types = jnp.zeros_like(ctx.positions) if ctx.token_types is None else ctx.token_types
        x = words + self.token_type_embeddings(types, ctx).astype(words.dtype)
        x = x + self.position_embeddings(ctx.positions + self.first, ctx).astype(words.dtype)
        return dropout(self.LayerNorm(x, ctx), self.rate, ctx.key_for(EMBEDDING))


class BertSelfAttention(nnx.Module):
    """Multi-head attention without its last product."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        d, self.config = config.hidden_size, config
        self.query = Linear(d, d, axes=("embed", "heads"), use_bias=True, rngs=rngs)
        self.key = Linear(d, d, axes=("embed", "heads"), use_bias=True, rngs=rngs)
        self.value = Linear(d, d, axes=("embed", "heads"), use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, D]`."""
        b, t, d = x.shape
        c = self.config
        assert ctx.mask is not None
        parts = (self.query(x, ctx), self.key(x, ctx), self.value(x, ctx))
        q, k, v = (y.reshape(b, t, c.num_attention_heads, c.head_dim).swapaxes(1, 2) for y in parts)
        k, v, past = apart(k, v, ctx)
        drops: dict[str, Any] = {"rate": c.attention_probs_dropout_prob, "key": ctx.key_for(PROBABILITIES)}
        out = attend(q, k, v, ctx.mask, **drops, past=past, platform=ctx.platform)
        return out.swapaxes(1, 2).reshape(b, t, d)


class BertSum(nnx.Module):
    """`LayerNorm(residual + dropout(dense(x)))`: how attention and feed-forward end.

    Args:
        site: What ends here, as of `Join`.
        features: Width of what `dense` reads.
        axes: Logical axes of its kernel.
    """

    def __init__(self, site: str, features: int, axes: tuple[str, str], config: BertConfig, *, rngs: nnx.Rngs):
        self.dense = Linear(features, config.hidden_size, axes=axes, use_bias=True, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.adapters = Join(site, config.hidden_size)
        self.rate, self.number = config.hidden_dropout_prob, ATTENTION if site == "attention" else OUTPUT

    def __call__(self, x: jax.Array, residual: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, T, features]`, beside the stream `[B, T, D]`, to the stream `[B, T, D]`."""
        y = dropout(self.dense(x, ctx), self.rate, ctx.key_for(self.number))
        return self.LayerNorm(self.adapters(residual, y, residual, ctx, self.LayerNorm), ctx)


class BertAttention(nnx.Module):
    """Self-attention, and the sum that it ends in."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.self = BertSelfAttention(config, rngs=rngs)
        self.output = BertSum("attention", config.hidden_size, ("heads", "embed"), config, rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, D]`."""
        return self.output(self.self(x, ctx), x, ctx)


class BertIntermediate(nnx.Module):
    """`act(dense(x))`."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.dense = Linear(d, f, axes=("embed", "mlp"), use_bias=True, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, F]`."""
        return ACTIVATIONS[self.activation](self.dense(x, ctx))


class BertLayer(nnx.Module):
    """Attention and feed-forward, each added to the stream and normed after."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.attention = BertAttention(config, rngs=rngs)
        self.intermediate = BertIntermediate(config, rngs=rngs)
        self.output = BertSum("output", config.intermediate_size, ("mlp", "embed"), config, rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Context, cache: None) -> tuple[jax.Array, None]:
        """Map `[B, T, D]` to `[B, T, D]`; there is no cache."""
        x = self.attention(x, ctx)
        return self.output(self.intermediate(x, ctx), x, ctx), cache


class BertEncoder(nnx.Module):
    """The layers."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.layer = stacked(lambda r: BertLayer(config, rngs=r), config.num_hidden_layers, rngs)


class BertPooler(nnx.Module):
    """`tanh(dense(first))`: what BERT's own heads read of the first token."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.dense = Linear(d, d, axes=("embed", "width"), use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, 1, D]` to `[B, 1, D]`."""
        return jnp.tanh(self.dense(x, ctx))


class BertBackbone(nnx.Module):
    """Embeddings, layers, and the pooler, which a backbone without one leaves out.

    Args:
        config: The config.
        pooler: Whether there is one.
        rngs: Source of the initial values.
    """

    def __init__(self, config: BertConfig, pooler: bool = True, *, rngs: nnx.Rngs):
        self.config: Any = config
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.encoder = BertEncoder(config, rngs=rngs)
        self.pooler: Any = BertPooler(config, rngs=rngs) if pooler else nnx.data(None)

    def input_embedding(self) -> Embed:
        """Return the table of words."""
        return self.embeddings.word_embeddings

    def embed(self, ids: jax.Array, ctx: Context) -> jax.Array:
        """Map ids `[B, T]` to words `[B, T, D]`, without their positions."""
        return self.embeddings.word_embeddings(ids, ctx).astype(self.config.dtype)

    def encode(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map words `[B, T, D]` to hidden states `[B, T, D]`."""
        c, before = self.config, 0 if ctx.past is None else ctx.past.room
        virtual = before + (0 if ctx.virtual is None else ctx.virtual.shape[-1])
        if x.shape[1] + before > c.n_positions:
            taken = f", of which virtual tokens take {virtual}" if virtual else ""
            raise BatchError(
                f"rows of {x.shape[1] + before - virtual} tokens: this model has {c.n_positions} positions{taken}; "
                "cut the texts shorter"
            )
        return run(self.encoder.layer, self.embeddings(x, ctx), ctx, None, c.remat)[0]


class BertModel(TextEncoder, BertBackbone):
    """A BERT without a head: its hidden states, and `pooled`, by the mean over tokens where nothing else is said.

    The pooler belongs to heads; it is kept for the folder's sake, and nothing here reads it.
    """

    model_type = "bert"
    prefix, stem = "", "bert"
    config_class: ClassVar[type[ModelConfig]] = BertConfig
    default_targets = ("query", "value")
    default_ia3 = (("key", "value", "output.dense"), ("output.dense",))
    optional = ("pooler",)
    renames = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
    disposable = r"(\w+\.)?embeddings\.position_ids|cls\..*|lm_head\..*"

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        TextEncoder.__init__(self, config)
        BertBackbone.__init__(self, config, rngs=rngs)


class BertForSequenceClassification(TextClassifier):
    """A BERT that classifies: `classifier(dropout(pooler(first token)))`."""

    config: BertConfig
    model_type = "bert"
    prefix = stem = "bert"
    config_class: ClassVar[type[ModelConfig]] = BertConfig
    default_targets, default_ia3 = BertModel.default_targets, BertModel.default_ia3
    heads = ("bert.pooler", "classifier")
    passes_pooler = True
    renames, disposable = BertModel.renames, BertModel.disposable

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        self.bert = BertBackbone(config, rngs=rngs)
        features, classes = config.hidden_size, len(config.labels)
        self.classifier = Linear(features, classes, axes=("embed", "labels"), use_bias=True, rngs=rngs)

    def classify(self, first: jax.Array, ctx: Context) -> jax.Array:
        """Map the hidden states of first tokens `[B, 1, D]` to logits `[B, 1, C]`."""
        return self.classify_pooled(self.bert.pooler(first, ctx), ctx)

    def classify_pooled(self, vectors: jax.Array, ctx: Context) -> jax.Array:
        """Map vectors `[B, 1, D]` to logits `[B, 1, C]`."""
        return self.classifier(dropout(vectors, self.config.classifier_dropout, ctx.key_for(CLASSIFIER)), ctx)
