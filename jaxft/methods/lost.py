"""How much of what adapters add is lost where merged kernels are rounded to the model's dtype."""

import logging
from typing import Any

import jax
import jax.numpy as jnp

log = logging.getLogger("jaxft")


class Lost:
    """By leaf the sums of squares of what adapters add, and of what rounding takes from it.

    Copies of whole leaves (`modules_to_save`) and leaves that no adapter touches are no changes, and not in it.
    """

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
        added, off = (sum(sums[i] for sums in self.leaves.values()) for i in (0, 1))
        shares = {path: (b / a) ** 0.5 for path, (a, b) in self.leaves.items() if a}
        worst = max(shares, key=shares.__getitem__, default=None)
        log.warning(
            "merged into the dequantised kernels, not the checkpoint's: rounding to %s moves them by %.2e of what the "
            "adapters add (in root mean squares)%s",
            dtype,
            (off / added) ** 0.5 if added else 0.0,
            "" if worst is None else f", at most by {shares[worst]:.2e}, in {worst}",
        )


@jax.jit
def _sizes(value: Any, change: Any, merged: Any) -> tuple[jax.Array, jax.Array]:
    off = (merged.astype(jnp.float32) - value.astype(jnp.float32)) - change
    return jnp.sum(jnp.square(change)), jnp.sum(jnp.square(off))
