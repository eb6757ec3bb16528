"""Supervised fine-tuning: instructions, conversations or plain text, by any method."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from ..config import Config, Source
from ..data import Dataset, PackedBatches, Template, TrainBatches, load_dataset
from ..data.batches import width_of
from ..data.tokens import Example
from ..errors import BatchError, DataError
from ..losses.language import next_token_figures, next_token_loss
from ..report import ANSWERS
from ..run import RunFolder
from ..scores import SCORES, check_scores, exact_match
from ..train.evaluate import evaluate_loss, write_answers
from ..train.step import ModelLoss
from .start import tokenizer_of
from .task import Data, Task, steps_of


class SupervisedTuning(Task):
    """Predict the answers, token by token."""

    formats = ("instruction", "prompt_completion", "messages", "text")
    unit, shown = "nats per token", ANSWERS

    @cached_property
    def loss(self) -> ModelLoss:
        """The loss of a step."""
        return next_token_loss

    def load_data(self, *, train: bool = True) -> Data:
        """Read the rows. Arguments and errors as of the task."""
        config, tokenizer = self.config, tokenizer_of(self.config)
        template = Template(**config.data.template.model_dump()) if config.data.template else None

        def read(source: Source) -> Dataset:
            return load_dataset(
                source.path,
                tokenizer,
                format=source.format,
                max_length=config.data.max_length,
                template=template,
                columns=source.columns,
                split=source.split,
                skip_bad_rows=config.data.skip_bad_rows,
                name=source.name,
                weight=source.weight,
            )

        training, held_out = self.read_all(read, train=train)
        return Data(tokenizer, training, held_out)

    def make_batches(self, data: Data) -> TrainBatches | PackedBatches:
        """Return the batches, packed or padded: as many as asked for, or enough to see each row `epochs` times.

        Raises:
            DataError: Fewer rows than one batch.
        """
        config, t = self.config, self.config.train
        if config.data.packing:
            length, epochs = config.data.max_length, (t.epochs or 1) if t.steps is None else None
            return PackedBatches(
                data.train, batch_size=t.batch_size, length=length, seed=t.seed, steps=t.steps, epochs=epochs
            )
        return TrainBatches(data.train, batch_size=t.batch_size, seed=t.seed, steps=steps_of(config, data.train))

    def check_fit(self, data: Data, model: Any) -> None:
        """Refuse rows with tokens that the model does not know, or that it has no positions for.

        Raises:
            BatchError: The tokenizer is not this model's, or `data.max_length` is too long for it.
        """
        config = self.config
        known, positions = model.config.vocab_size, model.positions_left()
        beside = "" if positions == getattr(model.config, "n_positions", None) else " beside its virtual tokens"
        packing, length = config.data.packing, config.data.max_length
        padded = data.held_out if packing else (*data.train, *data.held_out)
        longest = max((len(row) for part in padded for row in part.examples), default=0)
        if positions is not None and packing and data.train and length > positions:
            raise BatchError(
                f"data.max_length {length}: packs are as wide, but this model has {positions} positions{beside}: set "
                f"it to {positions} at most"
            )
        if positions is not None and width_of(longest) > positions:
            fits = max((n for n in range(positions + 1) if width_of(n) <= positions), default=positions)
            raise BatchError(
                f"data.max_length {length}: the longest row has {longest} tokens and is padded to "
                f"{width_of(longest)}, but this model has {positions} positions{beside}: set it to {fits}"
            )
        e = config.evaluation
        if positions is not None and (e.exact_match or e.scores or e.samples):
            asked = max((row.prompt for part in data.held_out for row in part.examples), default=0)
            if asked and asked + e.max_new_tokens > positions:
                raise BatchError(
                    f"evaluation.max_new_tokens {e.max_new_tokens}: the longest prompt has {asked} tokens, and this "
                    f"model has {positions} positions{beside}: set it to {max(positions - asked, 1)}, or a shorter "
                    "data.max_length"
                )
        for part in (*data.train, *data.held_out):
            for row in part.examples:
                if int(row.input_ids.max()) >= known:
                    raise BatchError(
                        f"{row.place}: it has the token {int(row.input_ids.max())}, but the model knows {known}: the "
                        "tokenizer is not this model's"
                    )

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], list[tuple[Example, str]]]:
        """Return the figures of a model on the held-out rows, and the answers it wrote where answers are asked for."""
        figures = evaluate_loss(model, next_token_figures, data.held_out, batch_size=batch_size)
        config, e = self.config, self.config.evaluation
        if not (e.exact_match or e.scores or e.samples):
            return figures, []
        written: list[tuple[Example, str]] = []
        for part in data.held_out:
            rows = [row for row in part.examples if row.answer is not None and 0 < row.prompt < len(row)]
            if not (e.exact_match or e.scores):
                rows = rows[: max(0, e.samples - len(written))]
            if rows:
                answers = write_answers(
                    model, data.tokenizer, rows, max_new_tokens=e.max_new_tokens, batch_size=min(32, len(rows))
                )
                written += zip(rows, answers, strict=True)
                if len(data.held_out) > 1:
                    figures = {**_judge(config, written[-len(rows) :], f"/{part.name}"), **figures}
        return {**figures, **_judge(config, written)}, written

    def check_evaluation(self, data: Data) -> None:
        """Refuse an evaluation that could not be made at the end: before the run, not after it."""
        config = self.config
        check_scores(config.evaluation.scores)
        wanted = config.evaluation.exact_match or config.evaluation.scores
        if wanted and not any(row.answer is not None for part in data.held_out for row in part.examples):
            raise DataError("evaluation.exact_match and scores compare answers, but rows of format text have none")

    def keep(self, run: RunFolder, step: int, data: Data, made: Any) -> None:
        """Write down some of the answers."""
        shown = self.config.evaluation.samples
        every = max(1, len(made) // shown) if shown else 1
        run.add_samples(
            [
                {
                    "step": step,
                    "prompt": data.tokenizer.decode(row.input_ids[: row.prompt], skip_special_tokens=True),
                    "expected": row.answer,
                    "answer": answer,
                }
                for row, answer in made[::every][:shown]
            ]
        )

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest batch, as shapes."""
        length, packing = self.config.data.max_length, self.config.data.packing
        shape = (self.config.train.batch_size, length if packing else width_of(length))
        names = ["input_ids", "labels", "attention_mask", *(["segment_ids", "position_ids"] if packing else [])]
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}


def _judge(config: Config, written: list[tuple[Example, str]], suffix: str = "") -> dict[str, float]:
    expected, said = [str(row.answer) for row, _ in written], [answer for _, answer in written]
    if not written:
        return {}
    figures = {f"accuracy{suffix}": exact_match(said, expected)} if config.evaluation.exact_match else {}
    return figures | {f"{name}{suffix}": SCORES[name](said, expected) for name in config.evaluation.scores}
