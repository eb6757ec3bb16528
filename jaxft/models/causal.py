"""What every causal language model offers: `hidden`, `head`, their composition, and decoding with a cache."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import BatchError
from ..parallel.rules import constrain
from .attention import causal_mask, default_positions
from .cache import Cache
from .config import ModelConfig
from .seams import Context
from .virtual import begin, behind, room


class CausalLM(nnx.Module):
    """A language model that reads from left to right. A family sets `prefix`, its backbone under that name, `lm_head`.

    The backbone has `embed(ids, ctx) -> vectors`, is called as `backbone(vectors, ctx, cache) -> (hidden, cache)`, and
    has `input_embedding()`.
    """

    model_type: ClassVar[str]
    prefix: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]]
    default_targets: ClassVar[tuple[str, ...]]
    default_ia3: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]  # scaled modules, and which of them at their input
    disposable: ClassVar[str] = ""

    lm_head: Any

    def __init__(self, config: ModelConfig):
        self.config = config
        self.adapter_weights: Any = nnx.data(None)
        self.past: Any = nnx.data(None)
        self.prompt: Any = nnx.data(None)
        self.temperature: Any = nnx.data(None)

    @property
    def dtype(self) -> Any:
        """Dtype of computation."""
        return self.config.dtype

    @property
    def backbone(self) -> Any:
        """The model without its head."""
        return getattr(self, self.prefix)

    def context(self, rows: int, key: jax.Array | None = None, **fields: Any) -> Context:
        """Return the context of one pass: dropout key, adapter weights, mask and positions."""
        fields["mesh"] = self.config.mesh
        if self.adapter_weights is None:
            return Context(key=key, **fields)
        weights = self.adapter_weights.get_value()
        if weights.ndim == 2 and weights.shape[0] != rows:
            raise BatchError(f"adapter weights are for {weights.shape[0]} rows, the batch has {rows}")
        names = tuple(name for name, _ in self.adapter_weights.get_metadata("adapters"))
        return Context(key=key, weights=weights, names=names, **fields)

    def hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the normed output of the last layer `[B, T, D]`, in the model's dtype. Arguments as in the call."""
        if position_ids is None:
            position_ids = default_positions(input_ids.shape, attention_mask, segment_ids)
        mask = causal_mask(input_ids.shape[1], attention_mask, segment_ids)
        ctx = behind(begin(self, len(input_ids), key), self.context(len(input_ids), key, mask=mask), position_ids)
        return self.backbone(self.backbone.embed(input_ids, ctx), ctx, None)[0]

    def head(self, hidden: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Map `[B, T, D]` to logits `[B, T, V]`."""
        ctx = self.context(len(hidden), key)
        hidden = constrain(hidden, ctx.mesh, "batch", None, None)
        logits = self.lm_head(hidden, ctx, self.tied_kernel())
        if self.lm_head.kernel is None:
            logits = self.backbone.input_embedding().follow(hidden, logits, ctx)
        return constrain(logits, ctx.mesh, "batch", None, "vocab")

    def tied_kernel(self) -> jax.Array | None:
        """Return the kernel `[D, V]` that a head without one of its own calls: the embedding, transposed."""
        return self.backbone.input_embedding().as_kernel() if self.lm_head.kernel is None else None

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits of every position.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, zero at padding, which may stand left or right.
            position_ids: `[B, T]`; by default counted over the real tokens of the row, or of its segment.
            segment_ids: `[B, T]`, one number for each row packed into this one; 0 is padding.
            key: Dropout key. None: no dropout.

        Returns:
            `[B, T, V]`, in the model's dtype; finite at padding too.
        """
        return _logits(self, input_ids, attention_mask, position_ids, segment_ids, key)

    def config_keys(self) -> dict[str, Any]:
        """Return the keys of `config.json` that follow from which leaves there are; merging can change them."""
        return {"tie_word_embeddings": self.lm_head.kernel is None}

    def empty_cache(self, rows: int, room: int) -> Cache:
        """Return a cache for `rows` texts of up to `room` tokens, begun with what adapters put before them."""
        c = self.config
        cache = Cache.empty(c.num_hidden_layers, rows, c.num_key_value_heads, room, c.head_dim, c.dtype)
        return dataclasses.replace(cache, past=begin(self, rows, None))

    def positions_left(self) -> int | None:
        """Return how many tokens a row may have beside the virtual ones that shift them; None: there is no table."""
        positions = getattr(self.config, "n_positions", None)
        return None if positions is None else positions - room(self)

    def decode(
        self, input_ids: jax.Array, valid: jax.Array, position_ids: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Read T more tokens into the cache.

        Args:
            input_ids: `[B, T]`.
            valid: `[B, T]` bool, False at padding.
            position_ids: `[B, T]`, counted without virtual tokens.
            cache: What was read before.

        Returns:
            Hidden states `[B, T, D]`, and the cache with the T tokens in it.
        """
        length = input_ids.shape[1]
        cache = cache.admit(valid)
        ctx = behind(cache.past, self.context(len(input_ids), mask=cache.mask(length)), position_ids)
        buffers = dataclasses.replace(cache, past=None)
        hidden, buffers = self.backbone(self.backbone.embed(input_ids, ctx), ctx, buffers)
        return hidden, dataclasses.replace(buffers.advance(length), past=cache.past)


@jax.jit
def _logits(model: CausalLM, ids: Any, attention_mask: Any, position_ids: Any, segment_ids: Any, key: Any) -> jax.Array:
    """Compiled once for a structure and shape, so that a call from a script does not trace again."""
    ids = jnp.asarray(ids)
    return model.head(model.hidden(ids, attention_mask, position_ids, segment_ids, key=key), key=key)
