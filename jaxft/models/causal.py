"""What every causal language model offers: `hidden`, `head`, their composition, and decoding with a cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import MethodError
from ..parallel.rules import constrain
from .attention import causal_mask, default_positions
from .base import Model
from .cache import Cache
from .virtual import begin, behind


class Decoder(Model):
    """A model that reads from left to right. A family sets `prefix`, and its backbone under that name.

    The backbone has `embed(ids, ctx) -> vectors`, is called as `backbone(vectors, ctx, cache) -> (hidden, cache)`, and
    has `input_embedding()`.
    """

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


class CausalLM(Decoder):
    """A language model that reads from left to right. A family sets `make_backbone` and `lm_head`."""

    task_type = "CAUSAL_LM"

    lm_head: Any

    @classmethod
    def make_backbone(cls, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """Return a fresh backbone."""
        raise NotImplementedError(f"{cls.__name__} sets `make_backbone`")

    @classmethod
    def backbone_keys(cls, backbone: Any) -> dict[str, Any]:
        """Return the keys of `config.json` that follow from which leaves a backbone has."""
        del backbone
        return {}

    def head(self, hidden: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Map `[B, T, D]` to logits `[B, T, V]`.

        Raises:
            MethodError: The model was saved without its head, as sentence-transformers does.
        """
        if self.lm_head is None:
            raise MethodError(
                "this model was saved without its output head (lm_head), to embed texts: load the one that it was made "
                "of to generate text or to train a language model"
            )
        ctx = self.context(len(hidden), key)
        hidden = constrain(hidden, ctx.mesh, "batch", None, None)
        logits = self.lm_head(hidden, ctx, self.tied_kernel())
        if self.lm_head.kernel is None:
            logits = self.backbone.input_embedding().follow(hidden, logits, ctx)
        return constrain(logits, ctx.mesh, "batch", None, "vocab")

    def tied_kernel(self) -> jax.Array | None:
        """Return the kernel `[D, V]` that a head without one of its own calls: the embedding, transposed."""
        tied = self.lm_head is not None and self.lm_head.kernel is None
        return self.backbone.input_embedding().as_kernel() if tied else None

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
        tied = {} if self.lm_head is None else {"tie_word_embeddings": self.lm_head.kernel is None}
        return {**tied, **self.backbone_keys(self.backbone)}

    def empty_cache(self, rows: int, room: int) -> Cache:
        """Return a cache for `rows` texts of up to `room` tokens, begun with what adapters put before them."""
        c = self.config
        cache = Cache.empty(c.num_hidden_layers, rows, c.num_key_value_heads, room, c.head_dim, c.dtype)
        return dataclasses.replace(cache, past=begin(self, rows, None))

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
