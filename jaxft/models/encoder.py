"""What encoders offer: hidden states of a sequence that is seen from both sides, with what adapters put before it."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..errors import BatchError
from .attention import default_positions, open_mask
from .base import Model, arrays, called, refuse_packed
from .pooling import pool
from .seams import Context
from .virtual import VIRTUAL, behind, prefixes, weights


class Encoder(Model):
    """A model whose tokens see each other from both sides.

    The backbone has `embed(...) -> vectors` and `encode(vectors, ctx) -> hidden`; its attention takes keys and values
    through `virtual.apart`.

    The virtual tokens of prompts see the sequence and it sees them, as in peft; positions count them first. In the
    array they stand behind the sequence, and their places are dropped again: pooling, the first token's too, is over
    the true tokens. A virtual token of weight w counts as w equal ones.
    """

    task_type: ClassVar[str | None] = "FEATURE_EXTRACTION"

    def read(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Return what the backbone makes of embedded tokens `[B, T, D]`, virtual ones beside them: `[B, T, D]`."""
        return self.read_all(x, ctx)[:, : x.shape[1]]

    def read_all(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Return the same with the places of the P virtual tokens at the end: `[B, T + P, D]`."""
        rows = len(x)
        key = None if ctx.key is None else jax.random.fold_in(ctx.key, VIRTUAL)
        past = None if self.past is None else prefixes(self, ctx.replace(key=key), rows)
        ctx = ctx.replace(past=past) if ctx.positions is None else behind(past, ctx, ctx.positions)
        if self.prompt is None:
            return self.backbone.encode(x, ctx)
        vectors = jnp.concatenate([module(ctx.replace(key=key), 1) for module in self.prompt.values()], 1)
        weight = weights(self.prompt, ctx)
        x = jnp.concatenate([x, jnp.broadcast_to(vectors.astype(x.dtype), (rows, *vectors.shape[1:]))], 1)
        return self.backbone.encode(x, _among(ctx.replace(virtual=weight), weight[:, 0] > 0, rows))


def _among(ctx: Context, there: jax.Array, rows: int) -> Context:
    """Return the context of a sequence and the virtual tokens at its end: these take the first positions.

    Args:
        ctx: That of the sequence, its positions already behind the prefixes.
        there: `[R, P]` bool, which virtual tokens count.
        rows: B.
    """
    if ctx.positions is not None:
        start = 0 if ctx.past is None else ctx.past.offset
        places = start + jnp.maximum(jnp.cumsum(there, 1, dtype=jnp.int32) - 1, 0)
        places = jnp.broadcast_to(places, (rows, there.shape[1]))
        positions = ctx.positions + there.sum(1, keepdims=True, dtype=jnp.int32)
        ctx = ctx.replace(positions=jnp.concatenate([positions, places.astype(positions.dtype)], 1))
    if ctx.token_types is not None:
        ctx = ctx.replace(token_types=jnp.pad(ctx.token_types, ((0, 0), (0, there.shape[1]))))
    return ctx


class TextEncoder(Encoder):
    """An encoder of token ids."""

    inputs = ("input_ids", "attention_mask", "position_ids", "segment_ids", "token_type_ids")

    def hidden(self, input_ids: jax.Array, *args: Any, key: jax.Array | None = None, **inputs: Any) -> jax.Array:
        """Return the output of the last layer `[B, T, D]`, in the model's dtype. Arguments as in the call."""
        return self.states(input_ids, *args, key=key, **inputs)[:, : input_ids.shape[1]]

    def states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the same with the places of the P virtual tokens of prompts at the end: `[B, T + P, D]`."""
        if position_ids is None:
            position_ids = default_positions(input_ids.shape, attention_mask, segment_ids)
        if self.prompt is not None and segment_ids is not None:
            raise BatchError(
                "segment_ids: the virtual tokens of an encoder see their whole row, and would carry one packed text "
                "into another: give each text its own row"
            )
        mask = open_mask(input_ids.shape, attention_mask, segment_ids)
        places = {"positions": position_ids, "token_types": token_type_ids}
        ctx = self.context(len(input_ids), key, mask=mask, **places)
        return self.read_all(self.backbone.embed(input_ids, ctx), ctx)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        segment_ids: Any = None,
        token_type_ids: Any = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the hidden states of every position; of a model with a head, what that makes of them.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, zero at padding, which may stand left or right.
            position_ids: `[B, T]`, from 0; by default counted over the real tokens of the row, or of its segment.
                (transformers counts from the left edge; of rows that are padded right it is the same.)
            segment_ids: `[B, T]`, one number for each row packed into this one; 0 is padding.
            token_type_ids: `[B, T]`, which of two texts a token is of; by default the first.
            key: Dropout key. None: no dropout.

        Returns:
            `[B, T, D]` in the model's dtype; a classifier's logits `[B, C]`.
        """
        given = (input_ids, attention_mask, position_ids, segment_ids, token_type_ids)
        return called(self, arrays(dict(zip(TextEncoder.inputs, given, strict=True))), key)


class TextClassifier(TextEncoder):
    """An encoder with a classification head, which reads the first token of a row: a family sets `classify`.

    With `config.head_pooling` it reads the vector that is pooled so instead, and a pooler is passed over.
    Where prompts stand before the row that is the first virtual token, as in peft; padded left, the first real one.
    """

    task_type = "SEQ_CLS"
    reads = "cls"

    def classify(self, first: jax.Array, ctx: Context) -> jax.Array:
        """Map the hidden states of first tokens `[B, 1, D]` to logits `[B, 1, C]`."""
        raise NotImplementedError(f"{type(self).__name__} sets `classify`")

    def classify_pooled(self, vectors: jax.Array, ctx: Context) -> jax.Array:
        """Map pooled vectors `[B, 1, D]` to logits `[B, 1, C]`."""
        return self.classify(vectors, ctx)

    def answer(self, inputs: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """Return logits `[B, C]`, in the model's dtype."""
        refuse_packed(inputs)
        if self.head_pooling is not None:
            hidden = self.hidden(**inputs, key=key)
            vectors = pool(hidden, inputs.get("attention_mask"), self.head_pooling).astype(self.dtype)
            return self.classify_pooled(vectors[:, None], self.context(len(vectors), key))[:, 0]
        states = self.states(**inputs, key=key)
        ctx = self.context(len(states), key)
        mask = inputs.get("attention_mask")
        length = inputs["input_ids"].shape[1]
        first = jnp.zeros(len(states), int) if mask is None else jnp.argmax(mask != 0, 1)
        if self.prompt is not None:
            there = weights(self.prompt, ctx)[:, 0] > 0
            first = jnp.where(there.any(1), length + jnp.argmax(there, 1), first)
        return self.classify(jnp.take_along_axis(states, first[:, None, None], 1), ctx)[:, 0]
