"""ViT (Dosovitskiy et al. 2021): pictures cut into patches, pre-norm, named as the modules of transformers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import BatchError, CheckpointError
from .attention import attend, open_mask
from .base import arrays, called
from .config import ModelConfig, activation
from .encoder import Encoder
from .layers import ACTIVATIONS, Join, LayerNorm, Linear, dot, dropout, normal
from .pooling import pool
from .seams import Context, lift, mix, number, read
from .stack import run, stacked
from .virtual import apart

EMBEDDING, PROBABILITIES, ATTENTION, MLP = map(number, ("vit.embeddings", "vit.attention", "vit.o_proj", "vit.mlp"))

ON_DISK = (  # what transformers has called these modules since 5.0, and what it calls them in a folder
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("layernorm_", "layernorm_"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """The fields of a ViT.

    Attributes:
        image_size: (height, width) of the pictures that it reads; no others are.
        patch_size: (height, width) of a patch.
        num_channels: 3, or 1 for grey pictures.
        qkv_bias: Whether queries, keys and values have biases.

    >>> raw = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = ViTConfig.from_raw({**raw, "image_size": 28, "patch_size": 4, "head_dim": 16})
    >>> config.grid, config.head_dim, config.pooling
    ((7, 7), 16, 'cls')
    """

    sizes: ClassVar[tuple[str, ...]] = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "num_channels"),
    )

    pooling: str = "cls"
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    qkv_bias: bool
    layer_norm_eps: float
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a ViT's `config.json`; those left out are ViT-Base's, as in transformers.

        `head_dim` may be wider or narrower than `hidden_size / num_attention_heads` (transformers from 5 reads it too).
        """
        width, heads = raw.get("hidden_size", 768), raw.get("num_attention_heads", 12)
        if "head_dim" not in raw and width % heads:
            raise CheckpointError(
                f"config.json: hidden_size {width} is no multiple of num_attention_heads {heads}; give a head_dim"
            )
        return {
            "hidden_size": width,
            "intermediate_size": raw.get("intermediate_size", 3072),
            "num_hidden_layers": raw.get("num_hidden_layers", 12),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": raw.get("head_dim") or width // heads,
            "image_size": _sides(raw.get("image_size", 224)),
            "patch_size": _sides(raw.get("patch_size", 16)),
            "num_channels": raw.get("num_channels", 3),
            "qkv_bias": bool(raw.get("qkv_bias", True)),
            "layer_norm_eps": float(raw.get("layer_norm_eps", 1e-12)),
            "hidden_act": activation(raw, "hidden_act", "gelu"),
            **{k: float(raw.get(k, 0.0)) for k in ("hidden_dropout_prob", "attention_probs_dropout_prob")},
        }

    def check(self) -> None:
        """Refuse patches that do not divide the picture, beside what every family refuses."""
        super().check()
        if min(*self.image_size, *self.patch_size) < 1 or any(
            side % part for side, part in zip(self.image_size, self.patch_size, strict=True)
        ):
            raise CheckpointError(
                f"config.json: image_size {self.image_size} does not divide into patches of {self.patch_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


def _sides(value: Any) -> tuple[int, int]:
    """Return (height, width), given as one number or two."""
    height, width = value if isinstance(value, (list, tuple)) else (value, value)
    return int(height), int(width)


class PatchProjection(nnx.Module):
    """`patch kernel + bias`, a convolution whose stride is its width; the kernel: `(width, height, channels, out)`."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        shape = (*config.patch_size[::-1], config.num_channels, config.hidden_size)
        self.kernel = nnx.Param(normal(rngs, shape), axes=(None, None, "channels", "embed"), transposed=True)
        self.bias = nnx.Param(jnp.zeros(shape[-1:]), axes=("embed",))
        self.saved: Any = nnx.data(None)

    def __call__(self, pixels: jax.Array, ctx: Context) -> jax.Array:
        """Map pictures `[B, C, H, W]` to patches `[B, P, D]`, row by row."""
        w, h, c, d = self.kernel.get_value().shape
        kernel, bias = self.kernel.get_value().reshape(w * h * c, d), read(self, "bias", ctx)
        for name, copies in (self.saved or {}).items():
            if hasattr(copies, "kernel"):
                kernel = mix(kernel, copies.kernel.get_value().reshape(w * h * c, d), ctx.weight(name))
        b, _, height, width = pixels.shape
        cut = pixels.reshape(b, c, height // h, h, width // w, w).transpose(0, 2, 4, 5, 3, 1)  # as the kernel's axes
        y = dot(cut.reshape(b, -1, w * h * c), kernel)
        return y + lift(bias.astype(y.dtype), y)


class ViTPatchEmbeddings(nnx.Module):
    """The projection of the patches, under its name."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.projection = PatchProjection(config, rngs=rngs)


class ViTEmbeddings(nnx.Module):
    """The class token and the patches, each with its learned position."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        d, self.config = config.hidden_size, config
        self.cls_token = nnx.Param(normal(rngs, (1, 1, d)), axes=(None, None, "embed"))
        places = (1, 1 + math.prod(config.grid), d)
        self.position_embeddings = nnx.Param(normal(rngs, places), axes=(None, None, "embed"))
        self.patch_embeddings = ViTPatchEmbeddings(config, rngs=rngs)

    def __call__(self, pixels: jax.Array, ctx: Context) -> jax.Array:
        """Map pictures `[B, C, H, W]` to `[B, 1 + P, D]`, the class token first."""
        patches = self.patch_embeddings.projection(pixels, ctx)
        first = jnp.broadcast_to(self.cls_token.get_value().astype(patches.dtype), (len(patches), 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], 1) + self.position_embeddings.get_value().astype(patches.dtype)
        return dropout(x, self.config.hidden_dropout_prob, ctx.key_for(EMBEDDING))


class ViTAttention(nnx.Module):
    """Multi-head attention; all heads together may be wider or narrower than the model."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, width, bias = config.hidden_size, config.num_attention_heads * config.head_dim, config.qkv_bias
        self.q_proj = Linear(d, width, axes=("embed", "heads"), use_bias=bias, rngs=rngs)
        self.k_proj = Linear(d, width, axes=("embed", "heads"), use_bias=bias, rngs=rngs)
        self.v_proj = Linear(d, width, axes=("embed", "heads"), use_bias=bias, rngs=rngs)
        self.o_proj = Linear(width, d, axes=("heads", "embed"), use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, D]`."""
        b, t, _ = x.shape
        c = self.config
        assert ctx.mask is not None
        parts = (self.q_proj(x, ctx), self.k_proj(x, ctx), self.v_proj(x, ctx))
        q, k, v = (y.reshape(b, t, c.num_attention_heads, c.head_dim).swapaxes(1, 2) for y in parts)
        k, v, past = apart(k, v, ctx)
        drops: dict[str, Any] = {"rate": c.attention_probs_dropout_prob, "key": ctx.key_for(PROBABILITIES)}
        out = attend(q, k, v, ctx.mask, **drops, past=past, platform=ctx.platform)
        return self.o_proj(out.swapaxes(1, 2).reshape(b, t, -1), ctx)


class ViTMLP(nnx.Module):
    """`fc2(act(fc1(x)))`."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.fc1 = Linear(d, f, axes=("embed", "mlp"), use_bias=True, rngs=rngs)
        self.fc2 = Linear(f, d, axes=("mlp", "embed"), use_bias=True, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, D]`."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x, ctx)), ctx)


class ViTLayer(nnx.Module):
    """Attention and MLP, each normed before, dropped out and added to the residual stream."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.layernorm_before = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = ViTAttention(config, rngs=rngs)
        self.layernorm_after = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = ViTMLP(config, rngs=rngs)
        self.attention_adapters = Join("attention", config.hidden_size)
        self.output_adapters = Join("output", config.hidden_size)
        self.rate = config.hidden_dropout_prob

    def __call__(self, x: jax.Array, ctx: Context, cache: None) -> tuple[jax.Array, None]:
        """Map `[B, T, D]` to `[B, T, D]`; there is no cache."""
        normed = self.layernorm_before(x, ctx)
        y = dropout(self.attention(normed, ctx), self.rate, ctx.key_for(ATTENTION))
        x = self.attention_adapters(x, y, normed, ctx)
        normed = self.layernorm_after(x, ctx)
        y = dropout(self.mlp(normed, ctx), self.rate, ctx.key_for(MLP))
        return self.output_adapters(x, y, normed, ctx), cache


class ViTPooler(nnx.Module):
    """The layer behind the class token that some checkpoints hold; kept for the folder's sake, nothing reads it."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.dense = Linear(d, d, axes=("embed", "width"), use_bias=True, rngs=rngs)


class ViTBackbone(nnx.Module):
    """Embeddings, layers, the last norm, and the pooler where there is one."""

    def __init__(self, config: ViTConfig, pooler: bool = True, *, rngs: nnx.Rngs):
        self.config: Any = config
        self.embeddings = ViTEmbeddings(config, rngs=rngs)
        self.layers = stacked(lambda r: ViTLayer(config, rngs=r), config.num_hidden_layers, rngs)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.pooler = ViTPooler(config, rngs=rngs) if pooler else nnx.data(None)

    def embed(self, pixels: jax.Array, ctx: Context) -> jax.Array:
        """Map pictures `[B, C, H, W]` to vectors `[B, 1 + P, D]`, with their positions."""
        return self.embeddings(pixels.astype(self.config.dtype), ctx)

    def encode(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map vectors `[B, T, D]` to hidden states `[B, T, D]`."""
        return self.layernorm(run(self.layers, x, ctx, None, self.config.remat)[0], ctx)


class ImageEncoder(Encoder):
    """An encoder of pictures. Visual prompts have no position (Jia et al. 2022)."""

    inputs = ("pixel_values",)
    stem = "vit"
    config_class: ClassVar[type[ModelConfig]] = ViTConfig
    default_targets = ("q_proj", "v_proj")
    default_ia3 = (("k_proj", "v_proj", "mlp.fc2"), ("mlp.fc2",))
    disposable = r"(vit\.)?embeddings\.mask_token|decoder\..*|(vit\.)?pooler\..*|classifier\..*"
    renames = tuple((rf"encoder\.layer\.(\d+)\.{disk}", rf"layers.\1.{ours}") for ours, disk in ON_DISK)
    written = tuple((rf"layers\.(\d+)\.{ours}", rf"encoder.layer.\1.{disk}") for ours, disk in ON_DISK)

    def hidden(self, pixel_values: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Return the normed output of the last layer `[B, 1 + P, D]`, in the model's dtype."""
        c: Any = self.config
        want = (c.num_channels, *c.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != want:
            raise BatchError(
                f"pixel_values {pixel_values.shape}: this model reads [B, C, H, W] = [B, {', '.join(map(str, want))}]; "
                "positions are not stretched to other sizes: resize the pictures"
            )
        ctx = self.context(len(pixel_values), key, mask=open_mask((1, 1 + math.prod(c.grid))))
        x = self.backbone.embed(pixel_values, ctx)
        return self.read(x, ctx)[:, : x.shape[1]]

    def __call__(self, pixel_values: Any, *, key: jax.Array | None = None) -> jax.Array:
        """Return the hidden states of the class token and every patch; of a classifier, its logits.

        Args:
            pixel_values: `[B, C, H, W]`, normalised (`jaxft.data.ImageProcessor`).
            key: Dropout key. None: no dropout.

        Returns:
            `[B, 1 + P, D]` in the model's dtype; a classifier's logits `[B, C]`.
        """
        return called(self, arrays({"pixel_values": pixel_values}), key)


class ViTModel(ImageEncoder, ViTBackbone):
    """A ViT without a head: its hidden states, and `pooled`, the class token's where nothing else is said."""

    model_type = "vit"
    prefix = ""
    optional = ("pooler",)

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        ImageEncoder.__init__(self, config)
        ViTBackbone.__init__(self, config, rngs=rngs)


class ViTForImageClassification(ImageEncoder):
    """A ViT that classifies: `classifier(class token)`."""

    model_type = "vit"
    prefix = "vit"
    heads = ("classifier",)
    task_type = None
    reads = "cls"

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        self.vit = ViTBackbone(config, pooler=False, rngs=rngs)
        features, classes = config.hidden_size, len(config.labels)
        self.classifier = Linear(features, classes, axes=("embed", "labels"), use_bias=True, rngs=rngs)

    def answer(self, inputs: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """Return logits `[B, C]`, in the model's dtype."""
        mode = self.head_pooling or self.reads
        vectors = pool(self.hidden(**inputs, key=key), None, mode).astype(self.dtype)
        return self.classifier(vectors[:, None], self.context(len(vectors), key))[:, 0]
