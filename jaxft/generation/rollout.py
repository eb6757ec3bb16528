"""Answers drawn to a batch of prompts, as arrays: what reinforcement learning scores and learns from."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .generate import decode_loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Prompts with the answers that were drawn to them. B rows, P places of prompts, R of answers.

    Attributes:
        input_ids: `[B, P + R]` int32: the prompt, padded left, then the answer, zeros after its last token.
        attention_mask: `[B, P + R]` int32, zero at padding.
        answer_mask: `[B, R]` bool: the tokens of the answer, the one that ended it among them.
        ended: `[B]` bool: whether the answer came to its end within R tokens.
    """

    input_ids: jax.Array
    attention_mask: jax.Array
    answer_mask: jax.Array
    ended: jax.Array

    @property
    def inputs(self) -> dict[str, jax.Array]:
        """What a model reads."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def room(self) -> int:
        """R."""
        return self.answer_mask.shape[1]

    @property
    def lengths(self) -> jax.Array:
        """Tokens of each answer `[B]` int32, the one that ended it included: at least 1."""
        return self.answer_mask.sum(1, dtype=jnp.int32)


def stopping_of(stops: Sequence[int], vocabulary: int) -> jax.Array:
    """Return `[V]` bool: the tokens that end an answer.

    >>> stopping_of([1, 9], 3).tolist()
    [False, True, False]
    """
    stopping = np.zeros(vocabulary, bool)
    stopping[[s for s in stops if 0 <= s < vocabulary]] = True
    return jnp.asarray(stopping)


@partial(jax.jit, static_argnames="room")
def draw_answers(
    model: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    stopping: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    *,
    room: int,
) -> Rollout:
    """Draw an answer to each prompt; the loop ends when every answer has.

    Compiled once for a shape: all but `room` are values.

    Args:
        model: A causal language model.
        input_ids: `[B, P]` prompts, padded left.
        attention_mask: `[B, P]`, zero at padding.
        stopping: `[V]` bool: tokens that end an answer.
        key: Row b draws its n-th token with `fold_in(fold_in(key, n), b)`.
        temperature: Above 0.
        top_k: Draw from the k likeliest; 0: from all.
        top_p: Then from the smallest set of these that holds this probability.
        room: R, tokens of an answer at most.

    >>> import jaxft
    >>> model, ids = jaxft.testing.tiny_llama(), jnp.array([[0, 5], [6, 7]])
    >>> drawn = draw_answers(model, ids, ids > 0, stopping_of([0], 64), jax.random.key(0), *map(jnp.float32, (1, 0, 1)),
    ...                      room=3)
    >>> drawn.input_ids.shape, drawn.answer_mask.shape, bool((drawn.input_ids[:, :2] == ids).all())
    ((2, 5), (2, 3), True)
    """
    valid = attention_mask != 0
    knobs = (temperature, top_k, top_p, key)
    new, count = decode_loop(model, input_ids, valid, stopping, jnp.int32(room), knobs, room, True)
    answer = jnp.arange(room)[None] <= count[:, None]
    mask = jnp.concatenate([valid, answer], 1).astype(jnp.int32)
    return Rollout(jnp.concatenate([input_ids, new], 1), mask, answer, count < room)
