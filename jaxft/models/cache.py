"""The key/value cache of generation: one buffer for all layers, carried through the scan and updated in place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .seams import Past


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of what was read so far.

    Attributes:
        k: `[L, B, K, S, E]`: layers, rows, key/value heads, room, width of a head.
        v: As `k`.
        valid: `[B, S]` bool, False at padding and at what is still empty.
        index: Where the next tokens go.
        past: What stands before all of them, beside the buffer.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array
    index: jax.Array
    past: Past | None = None

    @classmethod
    def empty(cls, layers: int, rows: int, heads: int, room: int, width: int, dtype: Any) -> "Cache":
        """Return a cache with room for `room` tokens in each row."""
        buffer = jnp.zeros((layers, rows, heads, room, width), dtype)
        return cls(buffer, buffer, jnp.zeros((rows, room), bool), jnp.int32(0))

    def admit(self, valid: jax.Array) -> "Cache":
        """Mark `[B, T]` new tokens, at `index`, as real or padding."""
        spread = jax.lax.dynamic_update_slice(self.valid, valid, (0, self.index))
        return dataclasses.replace(self, valid=spread)

    def mask(self, length: int) -> jax.Array:
        """Return `[B, 1, T, S]`: what the T tokens at `index` may see."""
        rows = self.index + jnp.arange(length)
        causal = rows[:, None] >= jnp.arange(self.valid.shape[1])[None, :]
        return (causal[None] & self.valid[:, None, :])[:, None]

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> tuple["Cache", jax.Array, jax.Array]:
        """Put `[B, K, T, E]` keys and values of one layer in; return the cache and all `[B, K, S, E]` of the layer."""
        at = (layer, 0, 0, self.index, 0)
        new = dataclasses.replace(
            self,
            k=jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), at),
            v=jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), at),
        )
        return new, new.k[layer], new.v[layer]

    def advance(self, length: int) -> "Cache":
        """Move on by `length` tokens."""
        return dataclasses.replace(self, index=self.index + length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """Stands for a cache where the keys and values of one reading are wanted, and there is nothing before them.

    Attributes:
        k: `[B, K, T, E]` of one layer, `[L, B, K, T, E]` of a stack; None at first.
        v: As `k`.
    """

    k: jax.Array | None = None
    v: jax.Array | None = None
    index: int = dataclasses.field(default=0, metadata={"static": True})

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> tuple["Kept", jax.Array, jax.Array]:
        """Keep one layer's."""
        del layer
        return Kept(k, v), k, v
