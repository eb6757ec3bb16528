"""Answers drawn to the prompts of a run, and what they are worth: in training and in evaluation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config.preferences import Rollouts
from ..data.batches import Batch
from ..data.prompts import columns_of
from ..generation.generate import stops_of
from ..generation.rollout import Rollout, draw_answers, stopping_of
from ..models.placement import mesh_of
from ..parallel.rules import batch_devices, repeated, rows_sharding
from ..rewards import Answers, ExactAnswer, Reward
from ..train.scoring import log_probs_of
from .task import Data

Figures = dict[str, np.ndarray[Any, Any]]


class Drawing:
    """Draws answers to the prompts of batches, and asks what they are worth.

    Args:
        model: The policy, or a part of it: its mesh, and which tokens end an answer.
        data: The rows that the batches number.
        options: How answers are drawn.
        reward: What they are worth.
    """

    def __init__(self, model: Any, data: Data, options: Rollouts, reward: Reward):
        self.tokenizer, self.reward, self.room = data.tokenizer, reward, options.max_new_tokens
        self.prompts = {row.row: row for part in (*data.train, *data.held_out) for row in part.examples}
        self.columns = list(columns_of(list(self.prompts.values())))  # a batch may have none of a source that has one
        self.mesh = mesh_of(model)
        self.stopping = stopping_of(stops_of(model, data.tokenizer), model.config.vocab_size)
        self.temperature = jnp.float32(options.temperature)
        self.filters = jnp.int32(options.top_k), jnp.float32(options.top_p)

    def draw(self, model: Any, batch: Batch, key: jax.Array) -> Rollout:
        """Return answers to the prompts of a batch."""
        ids, mask = self.placed(batch["input_ids"]), self.placed(batch["attention_mask"])
        return draw_answers(model, ids, mask, self.stopping, key, self.temperature, *self.filters, room=self.room)

    def placed(self, x: Any) -> jax.Array:
        """Return an array over rows where the model's mesh has it."""
        if self.mesh is None:
            return jnp.asarray(x)
        divides = len(x) % batch_devices(self.mesh) == 0
        return jax.device_put(x, rows_sharding(self.mesh) if divides else repeated(self.mesh))

    def answers(self, rollout: Rollout, batch: Batch) -> Answers:
        """Return what a reward is given; a row that fills a batch up is the first again."""
        numbers = [int(row) if row >= 0 else int(batch["row"][0]) for row in batch["row"]]
        prompts = [self.prompts[number] for number in numbers]
        ids, mask, ended = jax.device_get((rollout.input_ids, rollout.answer_mask, rollout.ended))
        lengths = mask.sum(1) - ended  # without the token that ended it
        new = [row[:n].tolist() for row, n in zip(ids[:, -self.room :], lengths, strict=True)]
        return Answers(
            [prompt.said for prompt in prompts],
            [self.tokenizer.decode(row, skip_special_tokens=True) for row in new],
            columns_of(prompts, self.columns),
            rollout.input_ids,
            rollout.attention_mask,
            lengths,
            [prompt.place for prompt in prompts],
        )

    def scored(self, answers: Answers) -> tuple[np.ndarray[Any, Any], Figures]:
        """Return the reward of each answer `[B]`, and figures of each answer: what each of several rewards says, and
        `accuracy` where one is whether the answer is right.

        Raises:
            RewardError: A reward that is not one finite number for each answer.
        """
        each = self.reward.each(answers)
        figures = {f"reward_{name}": x for name, x in each.items()} if len(each) > 1 else {}
        right = [part.name for part in self.reward.parts if isinstance(part.scorer, ExactAnswer)]
        return self.reward.total(each), {**figures, **({"accuracy": each[right[0]]} if right else {})}

    def measured(
        self, model: Any, reference: Any, batch: Batch, key: jax.Array
    ) -> tuple[Figures, list[dict[str, Any]]]:
        """Return figures of a model's answer to each prompt of a batch, and the texts, to evaluate.

        Rows that fill the batch up are left out.

        Args:
            model: The policy.
            reference: What the KL is measured to; None: it is not.
            batch: The prompts.
            key: Of the draw.
        """
        rollout = self.draw(model, batch, key)
        answers = self.answers(rollout, batch)
        reward, parts = self.scored(answers)
        figures = {"reward": reward, **parts, "response_length": rollout.lengths, "ended": rollout.ended}
        if reference is not None:
            policy, theirs = (log_probs_of(m, rollout, self.temperature) for m in (model, reference))
            figures["kl"] = (policy - theirs).sum(1)
        real = batch["row"] >= 0
        texts = zip(answers.prompts, answers.completions, reward, strict=True)
        said = [{"prompt": prompt, "answer": text, "reward": float(worth)} for prompt, text, worth in texts]
        return (
            {name: np.asarray(x, np.float64)[real] for name, x in figures.items()},
            [row for row, there in zip(said, real, strict=True) if there],
        )


def answer_shapes(rows: int, width: int, room: int, places: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return answers, their rewards, and numbers at each of their places, as shapes, for a plan.

    >>> {name: x.shape for name, x in answer_shapes(2, 8, 4, ["log_probs"]).items() if name[0] in "il"}
    {'input_ids': (2, 12), 'log_probs': (2, 4)}
    """
    ids, row = jax.ShapeDtypeStruct((rows, width + room), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    each = jax.ShapeDtypeStruct((rows, room), jnp.float32)
    masks = {"answer_mask": each.update(dtype=bool), "ended": row.update(dtype=bool)}
    return {"input_ids": ids, "attention_mask": ids, **masks, **dict.fromkeys(places, each), "rewards": row}


def trace_drawing(
    model: Any, shapes: Mapping[str, Any], key: jax.Array
) -> tuple[Rollout, dict[str, Any], tuple[Any, Any]]:
    """Return the rollout of `answer_shapes`, the rest of them, and the traced drawing with what it is given."""
    rest = dict(shapes)
    rollout = Rollout(*(rest.pop(field.name) for field in dataclasses.fields(Rollout)))
    ids: Any = rollout.input_ids
    ids = ids.update(shape=(ids.shape[0], ids.shape[1] - rollout.room))
    real, whole, flags = (jax.ShapeDtypeStruct((), kind) for kind in (jnp.float32, jnp.int32, bool))
    stopping = flags.update(shape=(model.config.vocab_size,))
    traced = draw_answers.trace(model, ids, ids, stopping, key, real, whole, real, room=rollout.room)
    return rollout, rest, (traced, (model, ids, ids))


def summed(figures: Figures) -> dict[str, float]:
    """Return the mean of each figure over the rows, and how far the rewards spread."""
    return {**{name: float(x.mean()) for name, x in figures.items()}, "reward_std": float(figures["reward"].std())}
