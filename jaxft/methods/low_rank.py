"""The low-rank delta `s x A B`: its product with a backward rule of its own, and the module that holds A and B."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..models.layers import dropout
from ..models.seams import Const, Context, Delta, lift


@jax.custom_vjp
def narrow_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply by a kernel of which one side is narrow: `x w`, computed in the dtype of `x`.

    The gradient of `w` sums over all tokens. Which of the two factors is then transposed in memory decides its cost,
    so the rule transposes the narrow one, and sums in float32.

    Args:
        x: `[..., i]`.
        w: `[i, o]`.

    Returns:
        `[..., o]`.
    """
    return x @ w.astype(x.dtype)


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return narrow_product(x, w), (x, w)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    rows, cotangents = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    tokens = (((0,), (0,)), ((), ()))
    if w.shape[0] <= w.shape[1]:
        dw = jax.lax.dot_general(rows, cotangents, tokens, preferred_element_type=jnp.float32)
    else:
        dw = jax.lax.dot_general(cotangents, rows, tokens, preferred_element_type=jnp.float32).T
    return dy @ w.astype(dy.dtype).T, dw.astype(w.dtype)


narrow_product.defvjp(_forward, _backward)


class LowRank(nnx.Module):
    """`w (dropout(x) A * gate) B`, where `gate` is the scale on live ranks and 0 on padding.

    Args:
        shape: `(*lead, in, out)`; the leading axes are the layers held.
        axes: Logical axes of the kernel it stands beside.
        ranks: Rank in each of the layers held; the leaves have the largest, the rest is padding.
        scales: `alpha / r` or `alpha / sqrt(r)` in each of the layers held.
        layers_held: Indices of the layers in their stack; None for all, or outside a stack.
        rate: Dropout on the input.
        number: Static number that the dropout key is folded with.
        a: Initial A, `(*lead, in, r)`.
        b: Initial B, `(*lead, r, out)`; None: zeros.
    """

    reversible = True

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[Any, Any],
        *,
        ranks: tuple[int, ...],
        scales: tuple[float, ...],
        layers_held: tuple[int, ...] | None,
        rate: float,
        number: int,
        a: jax.Array,
        b: jax.Array | None = None,
    ):
        *lead, _, out = shape
        outer = ("layers",) * len(lead)
        live = np.arange(max(ranks))[None] < np.array(ranks)[:, None]
        gate = np.where(live, np.array(scales)[:, None], 0).astype(np.float32)
        gate = np.broadcast_to(gate.reshape(*(lead if len(ranks) > 1 else (1,) * len(lead)), -1), (*lead, max(ranks)))
        self.a = Delta(a, axes=(*outer, axes[0], "rank"))
        b = jnp.zeros((*lead, max(ranks), out)) if b is None else b
        self.b = Delta(b, axes=(*outer, "rank", axes[1]))
        self.gate = Const(jnp.asarray(gate))
        self.ranks, self.layers_held, self.rate, self.number = ranks, layers_held, rate, number

    def __call__(self, linear: Any, x: jax.Array, y: jax.Array, ctx: Context, weight: jax.Array) -> jax.Array:
        """Return what the adapter adds to the output `[..., out]` of a linear layer, given its input `[..., in]`."""
        del linear, y
        a, b, gate = self.factors()
        h = narrow_product(dropout(x, self.rate, ctx.key_for(self.number)), a)
        h = h * (lift(gate, h) * per_row(weight, h)).astype(h.dtype)
        return narrow_product(h, b)

    @staticmethod
    def together(deltas: "dict[str, LowRank]", linear: Any, x: jax.Array, y: jax.Array, ctx: Context) -> jax.Array:
        """Return the sum of several; where rows use different ones by one product with all A, and one with all B.

        `sum_n w_n (x A_n * gate_n) B_n = (x [A_1 ... A_n] * [w_1 gate_1 ... w_n gate_n]) [B_1; ...; B_n]`. One after
        the other they would read x and write y n times. They do where one set of weights holds for all rows, so that
        an adapter beside others of weight 0 is bit for bit what it is alone; and where each drops its own input.
        """
        dropping = ctx.key is not None and any(delta.rate for delta in deltas.values())
        if dropping or all(ctx.weight(name).ndim == 0 for name in deltas):
            one, *rest = (delta(linear, x, y, ctx, ctx.weight(name)) for name, delta in deltas.items())
            return sum(rest, start=one)
        every = {name: delta.factors() for name, delta in deltas.items()}
        h = narrow_product(x, jnp.concatenate([a for a, _, _ in every.values()], -1))
        counts = [lift(gate, h) * per_row(ctx.weight(name), h) for name, (_, _, gate) in every.items()]
        h = h * jnp.concatenate(counts, -1).astype(h.dtype)
        return narrow_product(h, jnp.concatenate([b for _, b, _ in every.values()], -2))

    def factors(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return A, B and gate of the plain low-rank product that this one is."""
        return self.a.get_value(), self.b.get_value(), self.gate.get_value()

    def kernel_change(self, kernel: jax.Array) -> jax.Array:
        """Return what the adapter adds to a kernel, `(*lead, in, out)` in float32."""
        del kernel
        a, b, gate = self.factors()
        return jnp.matmul(a * gate[..., None, :], b, precision="highest")

    def parameter_counts(self) -> tuple[int, int]:
        """Count the trained numbers of A and of B, padding left out."""
        a, b = self.a.get_value(), self.b.get_value()
        ranks = sum(self.ranks) * (math.prod(a.shape[:-2]) if len(self.ranks) == 1 else 1)
        return ranks * a.shape[-2], ranks * b.shape[-1]


def per_row(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Give an adapter's weight, a scalar or one for each row `[B, 1, 1]`, the rank of `x`."""
    return weight.reshape(-1, *(1,) * (x.ndim - 1)) if weight.ndim else lift(weight, x)


@partial(jax.jit, static_argnums=1)
def kaiming_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw `(*lead, in, r)` from U(-1/sqrt(in), 1/sqrt(in)): the reference's `kaiming_uniform_(a=sqrt(5))` for A."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


@partial(jax.jit, static_argnums=1)
def gaussian(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw `(*lead, in, r)` from N(0, 1/r^2): the reference's `init_lora_weights="gaussian"` for A."""
    return jax.random.normal(key, shape) / shape[-1]


INITS = {"default": kaiming_uniform, "gaussian": gaussian}
