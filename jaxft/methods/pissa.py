"""PiSSA (Meng et al. 2024): a low-rank product that begins as the kernel's principal part."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models.seams import Const
from .low_rank import LowRank


class PiSSA(LowRank):
    """`s (x A B - x A0 B0)`, where `s A0 B0` is the kernel's best approximation of rank r, and A, B begin there.

    Beside a base that stays whole this is what the reference computes with the residual `W - s A0 B0` for a base. It is
    formed as `s (x (A - A0) B + x A0 (B - B0))`: exactly 0 at first, and nothing large cancels later. The same two
    factors of rank 2r are those of a plain LoRA (`factors`).

    Dropout acts on both terms, so that it leaves the base whole; the reference's drops part of what the base computes.

    Args:
        shape: As for `LowRank`, and so are the other options.
        axes: Logical axes of the kernel.
        kernel: W, `(*lead, in, out)`.
        ranks: Rank in each of the layers held.
        scales: `alpha / r` or `alpha / sqrt(r)` in each of the layers held.
        options: Of `LowRank`.
    """

    reversible = False  # attached to the merged kernel it would begin as a part of that one

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[Any, Any],
        *,
        kernel: jax.Array,
        ranks: tuple[int, ...],
        scales: tuple[float, ...],
        **options: Any,
    ):
        a, b = principal_part(kernel, ranks, scales)
        super().__init__(shape, axes, ranks=ranks, scales=scales, a=a, b=b, **options)
        self.a0 = Const(jnp.copy(a), axes=self.a.get_metadata("axes"))
        self.b0 = Const(jnp.copy(b), axes=self.b.get_metadata("axes"))

    def factors(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return A, B and gate, of rank 2r, of the plain low-rank product that this one is."""
        a, b, gate = super().factors()
        a0, b0 = self.a0.get_value(), self.b0.get_value()
        return jnp.concatenate([a - a0, a0], -1), jnp.concatenate([b, b - b0], -2), jnp.concatenate([gate, gate], -1)


@partial(jax.jit, static_argnums=(1, 2))
def principal_part(kernel: jax.Array, ranks: tuple[int, ...], scales: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """Return A `(*lead, in, r)` and B `(*lead, r, out)`: `W = U S V`, `A = U_r sqrt(S_r / s)`, `B = sqrt(S_r / s) V_r`.

    Args:
        kernel: W, `(*lead, in, out)`.
        ranks: Rank in each of the layers held; what is above it is zero.
        scales: s in each of the layers held.
    """
    lead, widest = kernel.shape[:-2], max(ranks)
    shape = (*lead, widest) if len(ranks) == math.prod(lead) else (*(1,) * len(lead), widest)
    live = np.arange(widest)[None] < np.array(ranks)[:, None]
    over = np.where(live, 1 / np.array(scales)[:, None], 0).astype(np.float32).reshape(shape)
    u, s, v = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[..., :widest] * over)
    return u[..., :widest] * root[..., None, :], root[..., :, None] * v[..., :widest, :]
