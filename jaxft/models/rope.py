"""Rotary positions (Su et al. 2021) and the scalings of their frequencies that checkpoints ask for."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Attributes:
        theta: Base of the frequencies `theta^(-2i / head_dim)`.
        kind: `"default"`, `"linear"` (all frequencies divided) or `"llama3"` (the low ones divided, smoothly).
        factor: The divisor.
        low_freq_factor: llama3: below `original / low_freq_factor` turns, a frequency is divided.
        high_freq_factor: llama3: above, it stays.
        original: llama3: the length that the model was first trained on.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original: int = 8192

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "Rope":
        """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

        >>> Rope.parse({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
        Rope(theta=500000.0, kind='linear', factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original=8192)
        """
        given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if any(isinstance(value, Mapping) for value in given.values()):
            raise CheckpointError(
                f"config.json: rope_parameters per kind of layer ({', '.join(given)}) are not supported for "
                f"model_type {raw.get('model_type')!r}"
            )
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise CheckpointError(
                f"config.json: rope type {kind!r} is not supported; there are default, linear, llama3"
            )
        theta = float(given.get("rope_theta", raw.get("rope_theta", cls.theta)))
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, float(given["factor"]))
        original = given.get("original_max_position_embeddings", raw.get("max_position_embeddings", cls.original))
        factor, low, high = (float(given[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        return cls(theta, kind, factor, low, high, int(original))

    def frequencies(self, head_dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return `[head_dim / 2]` frequencies, in radians a position."""
        freqs = 1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            freqs = freqs / self.factor
        if self.kind == "llama3":
            turns = self.original * freqs / (2 * math.pi)
            smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            smooth = np.clip(smooth, 0, 1)
            freqs = (1 - smooth) * freqs / self.factor + smooth * freqs
        return freqs.astype(np.float32)

    def angles(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines `[B, 1, T, head_dim / 2]` in float32 for positions `[B, T]`."""
        freqs = jnp.asarray(self.frequencies(head_dim))[None, None, None]
        angle = positions[:, None, :, None].astype(jnp.float32) * freqs
        return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `[B, H, T, E]`, where the halves of E are the two coordinates (the layout of transformers)."""
    cos, sin = (a.astype(x.dtype) for a in rope)
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
