"""Classification and regression of texts and images by a head on an encoder, or on a decoder's last token."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..config.schema import Classify
from ..data import GroupedBatches, TrainBatches
from ..data.batches import ahead, eval_batches
from ..errors import ConfigError, DataError
from ..loading import labels_of
from ..losses import classification_loss, make_contrastive_loss
from ..probes import accuracy, f1
from ..run import RunFolder
from ..similarity import pearson, spearman
from ..train.evaluate import evaluate_loss
from ..train.step import ModelLoss
from .pictures import OfPictures
from .start import base_of
from .task import Data, Task, steps_of
from .texts import OfTexts, check_positives, check_scores_differ, classes_in

SCORE = ("score",)  # the one output of a regression


class Classification(Task):
    """Name the class of a row, by a head on what the model reads of it."""

    unit = "mean over rows"
    shown: ClassVar[Mapping[str, str]] = {
        "accuracy": "accuracy",
        "f1": "macro F1",
        "pearson": "Pearson's correlation",
        "spearman": "Spearman's correlation",
    }

    @property
    def options(self) -> Classify:
        """The section `classify` of the config."""
        return self.config.classify or Classify()

    @cached_property
    def loss(self) -> ModelLoss:
        """The loss of a step: first of the vectors, where that is asked for, then of the head."""
        if not self.options.contrastive_steps:
            return classification_loss
        return in_turn(make_contrastive_loss("supervised_contrastive", temperature=self.options.temperature))

    def head_labels(self, data: Data) -> tuple[str, ...]:
        """Return the classes of the head that the model gets."""
        return data.labels

    def planned_labels(self) -> tuple[str, ...]:
        """Return the classes that the config names, or two, for a plan, which reads no rows."""
        return self.options.labels or ("0", "1")

    def make_batches(self, data: Data) -> Any:
        """Return the batches; those of the contrastive steps, if there are any, come first."""
        t, first, steps = self.config.train, self.options.contrastive_steps, steps_of(self.config, data.train)
        options: dict[str, Any] = {"batch_size": t.batch_size, "seed": t.seed, "collate": self.collate()}
        if not first:
            return TrainBatches(data.train, steps=steps, **options)
        if first >= steps:
            raise ConfigError(f"classify.contrastive_steps: {first} of {steps} steps: none would be left for the head")
        if t.batch_size // t.accumulate < 2:
            raise ConfigError(f"classify.contrastive_steps: micro-batches of one row (train.batch_size {t.batch_size})")
        check_positives(data)
        grouped = GroupedBatches(data.train, steps=first, **options)
        return InTurn(grouped, TrainBatches(data.train, steps=steps - first, **options))

    def values_of(self, kind: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Return what a batch holds besides what the model reads, as shapes."""
        names = {"labels": kind, **({"first": jnp.float32} if self.options.contrastive_steps else {})}
        return {name: jax.ShapeDtypeStruct((self.config.train.batch_size,), of) for name, of in names.items()}

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], Any]:
        """Return the loss and how well the classes are named, and what each row was taken for."""
        options: dict[str, Any] = {"batch_size": batch_size, "collate": self.collate()}
        figures = evaluate_loss(model, classification_loss, data.held_out, **options)
        found: dict[str, float] = {}
        made: list[tuple[Any, Any]] = []
        for part in data.held_out:
            guesses = self.read_off(predict(model, part.examples, **options))
            suffix = f"/{part.name}" if len(data.held_out) > 1 else ""
            found |= self.judge(guesses, [row.value for row in part.examples], suffix)
            made += list(zip(part.examples, guesses, strict=True))
        if len(data.held_out) > 1:
            found |= self.judge([guess for _, guess in made], [row.value for row, _ in made], "")
        return {**figures, **found}, made

    def read_off(self, outputs: Any) -> list[Any]:
        """Return what the head's outputs `[N, C]` say of each row: the number of a class."""
        return list(outputs.argmax(1).tolist())

    def judge(self, guesses: list[Any], values: list[Any], suffix: str) -> dict[str, float]:
        """Return accuracy and macro F1."""
        return {f"accuracy{suffix}": accuracy(guesses, values), f"f1{suffix}": f1(guesses, values)}


def check_two(data: Data) -> None:
    """Refuse rows that are all of one class.

    Raises:
        DataError: They are.
    """
    if len(data.labels) == 1:
        raise DataError(f"all rows are of the class {data.labels[0]!r}: two classes at least are needed")


class TextClassification(OfTexts, Classification):
    """Of texts, or of two texts together; with `problem: regression` a number is to be met."""

    formats = ("labelled",)

    @property
    def regression(self) -> bool:
        """Whether labels are numbers to be met."""
        return self.options.problem == "regression"

    def planned_labels(self) -> tuple[str, ...]:
        """Return the same; of a regression the one output."""
        return SCORE if self.regression else super().planned_labels()

    def load_data(self, *, train: bool = True) -> Data:
        """Read the rows. The classes are the config's, or the run's that is evaluated, or the training rows'."""
        if self.regression:
            if self.options.labels is not None:
                raise ConfigError("classify.labels: a regression has no classes")
            return dataclasses.replace(self.read_texts(train=train, labels=None), labels=SCORE)
        data = self.read_texts(train=train, labels=self.names(train))
        check_two(data)
        return data

    def names(self, train: bool) -> tuple[str, ...]:
        """Return the classes; where no row has a label that can be one, none, so that each row is refused."""
        run = base_of(self.config)
        made = () if train or run is None else labels_of(run)
        return made or self.options.labels or classes_in(self.config.data.train)

    def check_evaluation(self, data: Data) -> None:
        """Refuse held-out numbers that nothing can be correlated with."""
        if self.regression:
            check_scores_differ(data)

    def make_batches(self, data: Data) -> Any:
        """Return the batches, as of every classification."""
        if self.regression and self.options.contrastive_steps:
            raise ConfigError("classify.contrastive_steps: a regression has no classes to pull together")
        return super().make_batches(data)

    def read_off(self, outputs: Any) -> list[Any]:
        """Return the class of each row, or its number."""
        return list(outputs[:, 0].tolist()) if self.regression else super().read_off(outputs)

    def judge(self, guesses: list[Any], values: list[Any], suffix: str) -> dict[str, float]:
        """Return accuracy and macro F1; of a regression Pearson's and Spearman's correlation."""
        if not self.regression:
            return super().judge(guesses, values, suffix)
        return {f"pearson{suffix}": pearson(guesses, values), f"spearman{suffix}": spearman(guesses, values)}

    def keep(self, run: RunFolder, step: int, data: Data, made: Any) -> None:
        """Write down some of the rows, and what they were taken for."""
        shown = self.config.evaluation.samples
        every = max(1, len(made) // shown) if shown else 1
        named = (lambda value: f"{value:.3f}") if self.regression else data.labels.__getitem__
        run.add_samples(
            [
                {"step": step, "prompt": row.said, "expected": named(row.value), "answer": named(guess)}
                for row, guess in made[::every][:shown]
            ]
        )

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest batch, as shapes."""
        return {**self.widest(), **self.values_of(jnp.float32 if self.regression else jnp.int32)}


class ImageClassification(OfPictures, Classification):
    """Of images."""

    formats = ("images",)

    def load_data(self, *, train: bool = True) -> Data:
        """Read the images, all of them. The classes are the config's, or those of the training images."""
        del train
        if self.options.problem == "regression":
            raise ConfigError("classify.problem: images are classified; a regression is of texts")
        data = self.read_pictures(classes=self.options.labels)
        check_two(data)
        bare = [part.name for part in (*data.train, *data.held_out) if part.examples[0].value is None]
        if bare:
            raise DataError(f"{', '.join(bare)}: images without labels; give a folder for each class, or labels")
        return data

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the batch, as shapes."""
        return {**self.widest(), **self.values_of(jnp.int32)}


def predict(model: Any, rows: Sequence[Any], *, batch_size: int, collate: Any) -> Any:
    """Return the outputs `[N, C]` of a model's head for rows, in their order."""
    order = np.argsort([len(row) for row in rows], kind="stable")
    batches = eval_batches([rows[i] for i in order], batch_size, collate)
    outputs = [logits(model, {name: x for name, x in batch.items() if name in model.inputs}) for batch in batches]
    return np.concatenate([np.asarray(x) for x in outputs])[: len(rows)][np.argsort(order)]


@jax.jit
def logits(model: Any, inputs: Any) -> jax.Array:
    """Return the outputs `[B, C]` of a model's head, compiled once for a structure and shape."""
    return model(**inputs)


class InTurn:
    """The batches of two phases, one after the other; `first` `[B]` in a batch says which it is of."""

    def __init__(self, first: TrainBatches, second: TrainBatches):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return batch n."""
        early = n < len(self.first)
        batch = self.first[n] if early else self.second[n - len(self.first)]
        return {**batch, "first": np.full(len(batch["labels"]), early, np.float32)}

    def iterate(self, start: int = 0) -> Any:
        """Return an iterator over batches from number `start`."""
        return ahead(self, start)


def in_turn(first: ModelLoss) -> ModelLoss:
    """Return the loss that is `first` in the batches of the first phase, and that of the head in the others."""

    def loss(model: Any, batch: Any, *, key: jax.Array | None) -> Any:
        none = (jnp.float32(0), jnp.float32(0))

        def early(batch: Any) -> Any:
            total, weight, metrics = first(model, batch, key=key)
            return total, weight, {"in_batch_accuracy": metrics["in_batch_accuracy"], "accuracy": none}

        def late(batch: Any) -> Any:
            total, weight, metrics = classification_loss(model, batch, key=key)
            return total, weight, {"in_batch_accuracy": none, "accuracy": metrics["accuracy"]}

        return jax.lax.cond(batch["first"][0] > 0, early, late, batch)

    return loss
