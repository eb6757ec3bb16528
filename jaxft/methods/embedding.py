"""LoRA on an embedding: a low-rank product of which a token selects a row, instead of multiplying by it."""

from typing import Any

import jax
import jax.numpy as jnp

from ..models.layers import look_up
from ..models.seams import Context, lift
from .low_rank import LowRank, narrow_product, per_row


class LowRankEmbedding(LowRank):
    """`s A[ids] B`, beside a table `[V, D]`: A `[V, r]` zero at first, B `[r, D]` drawn from N(0, 1), as in peft.

    A tied output head goes on calling the base's table, as in peft. There is no dropout on ids.
    """

    def __call__(self, linear: Any, x: jax.Array, y: jax.Array, ctx: Context, weight: jax.Array) -> jax.Array:
        """Return what the adapter adds to the vectors `[B, T, D]` of the ids `[B, T]`."""
        del linear, y
        a, b, gate = self.factors()
        h = look_up(a, x, ctx)
        return narrow_product(h * lift(gate, h) * per_row(weight, h), b)


def initial(key: jax.Array, size: int, features: int, r: int) -> tuple[jax.Array, jax.Array]:
    """Return A `[V, r]` and B `[r, D]` of an embedding."""
    return jnp.zeros((size, r)), jax.random.normal(key, (r, features))
