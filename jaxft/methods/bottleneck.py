"""The bottleneck `s up(f(down(h)))` that hangs where a part's output meets the residual stream."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..models.layers import ACTIVATIONS, dropout
from ..models.seams import Context, Delta, lift
from .low_rank import kaiming_uniform, narrow_product


class Narrow(nnx.Module):
    """`x kernel + bias`, with a trained kernel of which one side is narrow, and the bias zero at first."""

    def __init__(self, kernel: jax.Array, axes: tuple[str, str]):
        *lead, _, out = kernel.shape
        outer = ("layers",) * len(lead)
        self.kernel = Delta(kernel, axes=(*outer, *axes))
        self.bias = Delta(jnp.zeros((*lead, out)), axes=(*outer, axes[1]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[B, T, in]` to `[B, T, out]`, in the dtype of `x`."""
        y = narrow_product(x, self.kernel.get_value())
        return y + lift(self.bias.get_value().astype(y.dtype), y)


class Bottleneck(nnx.Module):
    """`w s dropout(up(f(down(h))))`, where h is what the kind of adapter reads.

    Args:
        kernels: Of `down`, `(*lead, D, r)`, and of `up`, `(*lead, r, D)`; the leading axes are the layers held.
        kind: `"pfeiffer"` reads the sum of stream and output, normed where a norm follows; `"houlsby"` the output;
            `"parallel"` the stream before the part, or what the part read of it.
        non_linearity: f, by its name in `ACTIVATIONS`.
        scale: s: a number, or `"learned"`, a trained one for each layer, 1 at first.
        parallel_input: What a parallel one reads, `"residual"` or `"normed"`.
        layers_held: Indices of the layers in their stack; None for all, or outside a stack.
        rate: Dropout on the result.
        number: Static number that the dropout key is folded with.
    """

    def __init__(
        self,
        kernels: tuple[jax.Array, jax.Array],
        *,
        kind: str,
        non_linearity: str,
        scale: Any,
        parallel_input: str,
        layers_held: tuple[int, ...] | None,
        rate: float,
        number: int,
    ):
        down, up = kernels
        lead = down.shape[:-2]
        self.down, self.up = Narrow(down, ("embed", "rank")), Narrow(up, ("rank", "embed"))
        learned = scale == "learned"
        axes = (*("layers",) * len(lead), None)
        self.scale = Delta(jnp.ones((*lead, 1)), axes=axes) if learned else nnx.data(None)
        self.computes = (kind, non_linearity, scale, parallel_input)
        self.layers_held, self.rate, self.number = layers_held, rate, number

    def __call__(
        self, residual: jax.Array, output: jax.Array, normed: jax.Array, ctx: Context, weight: jax.Array, norm: Any
    ) -> jax.Array:
        """Return what the adapter adds to the residual stream `[B, T, D]`; arguments as of `Join`."""
        kind, non_linearity, scale, parallel_input = self.computes
        if kind == "parallel":
            h = normed if parallel_input == "normed" else residual
        elif kind == "houlsby":
            h = output
        else:
            h = residual + output if norm is None else norm(residual + output, ctx)
        y = dropout(self.up(ACTIVATIONS[non_linearity](self.down(h))), self.rate, ctx.key_for(self.number))
        factor = lift(weight, y) * (scale if self.scale is None else lift(self.scale.get_value(), y))
        return y * factor.astype(y.dtype)


def identity_kernels(key: jax.Array, lead: tuple[int, ...], width: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Draw `down` from U(-1/sqrt(D), 1/sqrt(D)) and make `up` zero: at first nothing changes (He et al. 2022)."""
    return kaiming_uniform(key, (*lead, width, size)), jnp.zeros((*lead, size, width))


@partial(jax.jit, static_argnums=(1, 2, 3))
def bert_kernels(key: jax.Array, lead: tuple[int, ...], width: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Draw both from N(0, 0.02^2), as the adapters library does: at first the adapter is not quite the identity."""
    first, second = jax.random.split(key)
    down = 0.02 * jax.random.normal(first, (*lead, width, size))
    return down, 0.02 * jax.random.normal(second, (*lead, size, width))


INITS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {"default": identity_kernels, "bert": bert_kernels}
