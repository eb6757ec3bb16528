"""The modules that families are made of: linear, embedding, norms, dropout, activations.

Names of leaves: `kernel` and `bias` of a linear, `scale` and `bias` of a norm, `embedding`. Every leaf carries its
logical axes under the metadata key `axes`. Shapes: B rows, T positions, D model width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..parallel.rules import constrain
from ..quant.leaf import is_quantized
from ..quant.product import product
from .seams import Context, add_deltas, lift, mix, read, scale_input


def gelu(x: jax.Array) -> jax.Array:
    """Return `x/2 (1 + erf(x / sqrt 2))`, in float32 inside; by erf, as torch has it, which on a CPU is half of erfc.

    >>> [round(float(x), 4) for x in gelu(jnp.array([-1.0, 0.0, 1.0]))]
    [-0.1587, 0.0, 0.8413]
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
# Computed again for the gradient, from their input alone: cheaper than keeping what stands between (up to four of it).
ACTIVATIONS = {name: jax.checkpoint(f, prevent_cse=False) for name, f in _FUNCTIONS.items()}


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float = 0.02) -> jax.Array:
    """Draw N(0, std^2), the initialisation of fresh parameters."""
    return std * jax.random.normal(rngs.params(), shape)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each value with probability `rate` and scale the rest by 1 / (1 - rate); the identity without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def dot(x: jax.Array, kernel: Any) -> jax.Array:
    """Multiply by a kernel, computed in the dtype of `x`: the seam at which other types of kernel come in.

    Args:
        x: `[..., in]`.
        kernel: `[in, out]`, or `[B, in, out]` where each row of the batch has its own; an array, or quantised.
    """
    if is_quantized(kernel):
        return product(x, kernel)
    kernel = kernel.astype(x.dtype)
    if kernel.ndim > 2:
        return x @ kernel
    # As a plain matrix product: XLA on a CPU sums a gradient up to five times as fast over one axis as over two
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """`x kernel + bias`, with the seams `dot`, `delta` and `saved`.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        axes: Logical axes of the kernel.
        use_bias: Whether there is a bias.
        tied: No kernel of its own; it is given at the call (a tied output head).
        transposed: The checkpoint holds the kernel as `(out, in)`; False for GPT-2's Conv1D.
        rngs: Source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        use_bias: bool = False,
        tied: bool = False,
        transposed: bool = True,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.out_features, self.axes, self.transposed = in_features, out_features, axes, transposed
        shape = (in_features, out_features)
        self.kernel = nnx.data(None) if tied else nnx.Param(normal(rngs, shape), axes=axes, transposed=transposed)
        self.bias = nnx.Param(jnp.zeros((out_features,)), axes=axes[1:]) if use_bias else nnx.data(None)
        self.delta = nnx.data(None)
        self.saved = nnx.data(None)

    def __call__(self, x: jax.Array, ctx: Context, kernel: jax.Array | None = None) -> jax.Array:
        """Map `[B, T, in]` to `[B, T, out]`; `kernel` is the tied one, where this module has none."""
        y = dot(scale_input(self, x, ctx), read(self, "kernel", ctx, kernel))
        bias = read(self, "bias", ctx)
        if bias is not None:
            y = y + lift(bias.astype(y.dtype), y)
        return add_deltas(self, x, y, ctx if kernel is None else ctx.replace(kernel=kernel))


class Join(nnx.Module):
    """Where a part's output meets the residual stream, with the seam `join`: `residual + output + sum_n w_n delta_n`.

    A layer names its two as the adapters library does, `attention_adapters` and `output_adapters`.

    Args:
        site: `"attention"` or `"output"` (after the feed-forward): what the part is.
        features: Width of the stream.
    """

    def __init__(self, site: str, features: int):
        self.site, self.features = site, features
        self.join: Any = nnx.data(None)

    def __call__(
        self, residual: jax.Array, output: jax.Array, normed: jax.Array, ctx: Context, norm: Any = None
    ) -> jax.Array:
        """Add a part's output to the stream.

        Args:
            residual: The stream before the part, `[B, T, D]`.
            output: What the part made of it, after its dropout and its own last norm, `[B, T, D]`.
            normed: What the part read, `[B, T, D]`: the normed stream; in a post-norm block the stream itself.
            ctx: Weights, names and dropout key.
            norm: In a post-norm block the norm that the sum goes through next; the block itself applies it.

        Returns:
            `[B, T, D]`; where nothing hangs here exactly `residual + output`.
        """
        joined = residual + output
        for name, delta in (self.join or {}).items():
            joined = joined + delta(residual, output, normed, ctx, ctx.weight(name), norm)
        return joined


class Embed(nnx.Module):
    """A table of vectors, with the seams `delta` and `saved`; a tied output head calls it."""

    def __init__(self, size: int, features: int, *, axes: tuple[str, str] = ("vocab", "embed"), rngs: nnx.Rngs):
        self.embedding, self.axes = nnx.Param(normal(rngs, (size, features)), axes=axes), axes
        self.delta: Any = nnx.data(None)
        self.saved: Any = nnx.data(None)

    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        """Look ids `[B, T]` up: `[B, T, D]`. Copies are mixed after the look-up, so a row may have its own."""
        rows = look_up(self.embedding.get_value(), ids, ctx)
        for name, copies in (self.saved or {}).items():
            rows = mix(rows, look_up(copies.embedding.get_value(), ids, ctx), ctx.weight(name))
        return add_deltas(self, ids, rows, ctx)

    def follow(self, x: jax.Array, y: jax.Array, ctx: Context) -> jax.Array:
        """Add to the logits of a tied head what those deltas make of them that change its rows too.

        Args:
            x: What the head reads, `[B, T, D]`.
            y: Its logits, `[B, T, V]`.
            ctx: Weights and names.
        """
        for name, delta in (self.delta or {}).items():
            if hasattr(delta, "at_head"):
                y = delta.at_head(self, x, y, ctx.weight(name))
        return y

    def as_kernel(self) -> jax.Array:
        """Return the table as the kernel `[D, V]` of a tied head: the base's, as in peft, not an adapter's copy."""
        return self.embedding.get_value().T


def look_up(table: jax.Array, ids: jax.Array, ctx: Context) -> jax.Array:
    """Return rows of a table `[V, D]` for ids `[B, T]`: `[B, T, D]`.

    On a mesh each device looks up its part of every vector, and the parts change places: the table, and its gradient,
    are never whole on a device.
    """
    ids = constrain(ids, ctx.mesh, "data", None)
    parts = constrain(table[ids], ctx.mesh, "data", None, "embed")
    return constrain(parts, ctx.mesh, "batch", None, None)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, normalised in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, features: int, eps: float):
        self.scale, self.eps = nnx.Param(jnp.ones((features,)), axes=("norm",)), eps
        self.saved = nnx.data(None)

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Normalise `[B, T, D]` over the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * lift(read(self, "scale", ctx).astype(x.dtype), x)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias`, in float32 (Ba et al. 2016)."""

    def __init__(self, features: int, eps: float):
        self.scale = nnx.Param(jnp.ones((features,)), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((features,)), axes=("norm",))
        self.eps = eps
        self.saved = nnx.data(None)

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Normalise `[B, T, D]` over the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, -1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        scale, bias = (lift(read(self, leaf, ctx).astype(jnp.float32), wide) for leaf in ("scale", "bias"))
        return (wide * scale + bias).astype(x.dtype)
