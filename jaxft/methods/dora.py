"""DoRA (Liu et al. 2024): a kernel as magnitude times direction, the direction adapted by a low-rank product."""

from typing import Any

import jax
import jax.numpy as jnp

from ..models.layers import dot, dropout
from ..models.seams import Const, Context, Delta, lift, read
from .low_rank import LowRank, per_row


class DoRA(LowRank):
    """What `m / |V| * V x`, with `V = W + s A B`, adds to `W x`: `(m / |V| - 1) W x + (m / |V|) s x A B`.

    `|V|` is the norm of each column of the kernel, so of each output, and a constant to the gradient, as in the paper
    (4.3) and in peft. It is found as `|V|^2 = |W|^2 + 2 <W, s A B> + |s A B|^2` from products as narrow as the rank:
    no matrix of the kernel's size is formed, and where B is zero it is the base's norm bit for bit.

    With dropout, in training, W reads what A reads, as in peft: that costs a second product with the kernel.

    Args:
        shape: As for `LowRank`, and so are the other options.
        axes: Logical axes of the kernel.
        kernel: W, `(*lead, in, out)`; its norms are the initial magnitudes.
        options: Of `LowRank`.
    """

    reversible = False  # merged, a column's norm is m, and what it was is gone
    reads = "kernel"  # whose norm it holds

    def __init__(self, shape: tuple[int, ...], axes: tuple[Any, Any], *, kernel: jax.Array, **options: Any):
        super().__init__(shape, axes, **options)
        norm = jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)
        outer = (*("layers",) * (len(shape) - 2), axes[1])
        self.magnitude = Delta(norm, axes=outer)
        self.norm = Const(jnp.copy(norm), axes=outer)

    def __call__(self, linear: Any, x: jax.Array, y: jax.Array, ctx: Context, weight: jax.Array) -> jax.Array:
        """Return what the adapter adds to the output `[..., out]` of a linear layer, given its input `[..., in]`."""
        kernel: Any = ctx.kernel if linear.kernel is None else linear.kernel.get_value()
        away = lift(self.away(kernel), y)
        key = ctx.key_for(self.number)
        if self.rate and key is not None:
            y = dot(dropout(x, self.rate, key), kernel)
        elif (bias := read(linear, "bias", ctx)) is not None:
            y = y - lift(bias.astype(y.dtype), y)
        turned = super().__call__(linear, x, y, ctx, weight).astype(jnp.float32)
        return (per_row(weight, y) * away * y.astype(jnp.float32) + (1 + away) * turned).astype(y.dtype)

    def away(self, kernel: Any) -> jax.Array:
        """Return `m / |V| - 1`, `(*lead, out)`: exactly 0 while A B is 0 and m as it was."""
        norm = jax.lax.stop_gradient(self.full_norm(kernel))
        return (self.magnitude.get_value() - norm) / jnp.where(norm == 0, 1, norm)

    def full_norm(self, kernel: Any) -> jax.Array:
        """Return `|W + s A B|` for each output, `(*lead, out)`, in float32."""
        a, b, gate = self.factors()
        a = a * gate[..., None, :]
        across = jnp.swapaxes(a, -1, -2)

        def inner(by: jax.Array) -> jax.Array:
            return jnp.sum(b * by, -2)

        with jax.default_matmul_precision("highest"):
            overlap = dot(across, kernel)
        own = jnp.matmul(jnp.matmul(across, a, precision="highest"), b, precision="highest")
        change, norm = 2 * inner(overlap) + inner(own), self.norm.get_value()
        return jnp.where(change == 0, norm, jnp.sqrt(jnp.maximum(jnp.square(norm) + change, 0)))

    def kernel_change(self, kernel: jax.Array) -> jax.Array:
        """Return what the adapter adds to a kernel, `(*lead, in, out)` in float32."""
        away = self.away(kernel)[..., None, :]
        return away * kernel.astype(jnp.float32) + (1 + away) * super().kernel_change(kernel)
