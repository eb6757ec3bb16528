"""How much of what adapters add is lost where merged kernels are rounded to the model's dtype."""

import logging
from typing import Any

import jax
import jax.numpy as jnp

log = logging.getLogger("jaxft")


class Lost:
    """By leaf the root mean squares of what adapters add, and of what rounding takes from it."""

    def __init__(self) -> None:
        self.leaves: dict[str, tuple[float, float]] = {}

    def add(self, path: str, value: Any, change: Any, merged: Any) -> None:
        """Take a leaf in.

        Args:
            path: Its path.
            value: What it was.
            change: What was added, float32.
            merged: What it is now.
        """
        added, off = _sizes(value, change, merged)
        self.leaves[path] = (float(added), float(off))

    def say(self, dtype: Any) -> None:
        """Log, for all leaves and for the worst, which part of the change is lost."""
        if not self.leaves:
            return
        added = sum(a**2 for a, _ in self.leaves.values()) ** 0.5
        off = sum(b**2 for _, b in self.leaves.values()) ** 0.5
        shares = {path: b / a for path, (a, b) in self.leaves.items() if a}
        worst = max(shares, key=shares.__getitem__, default=None)
        log.info(
            "merged into the dequantised kernels: rounding to %s moves them by %.2e of what the adapters add (in root "
            "mean squares)%s",
            dtype,
            off / added if added else 0.0,
            "" if worst is None else f", at most by {shares[worst]:.2e}, in {worst}",
        )


@jax.jit
def _sizes(value: Any, change: Any, merged: Any) -> tuple[jax.Array, jax.Array]:
    off = (merged.astype(jnp.float32) - value.astype(jnp.float32)) - change
    return jnp.sqrt(jnp.mean(jnp.square(change))), jnp.sqrt(jnp.mean(jnp.square(off)))
