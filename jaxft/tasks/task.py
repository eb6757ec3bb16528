"""What a run needs to know of its task. What all runs do alike stands in `train`."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from ..config import Config, Source
from ..data import Dataset
from ..errors import DataError, refuse
from ..interop.export import save_model
from ..loading import free_name
from ..methods import Method
from ..run import RunFolder
from ..train.state import TrainState
from ..train.step import ModelLoss, make_train_step
from .start import base_of, check_speaks, load_base, load_state, optimizer_of


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows of a run.

    Attributes:
        tokenizer: What turns rows into arrays: a tokenizer, or an image processor.
        train: Training sources.
        held_out: Held-out sources.
        labels: Names of the classes, where there are any.
    """

    tokenizer: Any
    train: tuple[Dataset, ...]
    held_out: tuple[Dataset, ...]
    labels: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Say what was read, and what was left out of it."""
        said = []
        for kind, data in [("train", d) for d in self.train] + [("eval", d) for d in self.held_out]:
            said.append(f"{kind}: {len(data):,} rows of {data.name}" + (f", {data.cut:,} cut" if data.cut else ""))
            for rows, why in ((data.skipped, "bad rows left out"), (data.dropped, "rows left out")):
                if rows:
                    said.append(f"  {len(rows):,} {why}:")
                    said += [f"    {row}" for row in rows[:5]] + ["    ..."] * (len(rows) > 5)
        return said


class Task:
    """One task, on one config. A task says how rows become batches, what the loss is, and what is measured.

    Args:
        config: Of a run; to look at a finished one, with that run as its model.
        begun: What the finished run was begun with; None: the run is still to be.

    Attributes:
        formats: The formats of rows that it takes.
        unit: What the loss is in.
        shown: Figures of the evaluations that are drawn, each with its name.
    """

    formats: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    shown: ClassVar[Mapping[str, str]]

    def __init__(self, config: Config, begun: Config | None = None):
        self.config, self.begun = config, begun

    @cached_property
    def loss(self) -> ModelLoss:
        """The loss of a step."""
        raise NotImplementedError

    def check_config(self) -> None:
        """Refuse options that do not go together, and a base of the wrong kind: before anything is read."""
        check_speaks(self.config)
        _ = self.loss

    def load_data(self, *, train: bool = True) -> Data:
        """Read the rows; every bad one is named before a model is loaded.

        Args:
            train: Whether the training rows are wanted too.

        Raises:
            DataError: Sources that cannot be read, or bad rows.
        """
        raise NotImplementedError

    def collate(self) -> Any:
        """Return what makes a batch of rows."""
        raise NotImplementedError

    def make_batches(self, data: Data) -> Any:
        """Return the batches of a run: they have a length, and `iterate(start)`.

        Raises:
            DataError: Fewer rows than one batch.
        """
        raise NotImplementedError

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], Any]:
        """Return the figures of a model on the held-out rows, and what else comes of it (answers, vectors)."""
        raise NotImplementedError

    def check_evaluation(self, data: Data) -> None:
        """Refuse an evaluation that could not be made at the end: before the run, not after it."""

    def check_fit(self, data: Data, model: Any) -> None:
        """Refuse rows that the model cannot take."""

    def keep(self, run: RunFolder, step: int, data: Data, made: Any) -> None:
        """Keep in the run's folder what an evaluation has made besides its figures."""

    def write(self, model: Any, folder: Path, data: Data) -> Path:
        """Write the whole model that a run has trained."""
        return save_model(model, folder, data.tokenizer)

    def draw(self, run: RunFolder, data: Data) -> None:
        """Draw what the task has to show besides the curves, at the end."""

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest batch, as shapes."""
        raise NotImplementedError

    def head_labels(self, data: Data) -> tuple[str, ...]:
        """Return the classes of the head that the model gets for this task; () where it gets none."""
        del data
        return ()

    def planned_labels(self) -> tuple[str, ...]:
        """Return the classes of the head for a plan, which reads no rows."""
        return ()

    def load_state(self, steps: int, mesh: Mesh | None, data: Data) -> TrainState:
        """Return the state that the run begins with."""
        return load_state(self.config, steps, mesh, labels=self.head_labels(data))

    def load_model(self, mesh: Mesh | None, data: Data) -> Any:
        """Return the model that a config begins with, to evaluate it."""
        return load_base(self.config, base_of(self.config), "none", mesh, self.head_labels(data))

    def make_step(self, state: TrainState) -> Callable[..., Any]:
        """Return the step: `state, metrics = step(state, batch)`.

        Args:
            state: What the run began with, also where it goes on: what a step compares with is made of it.
        """
        del state
        return make_train_step(self.loss, accumulate=self.config.train.accumulate)

    def planned_state(self, model: Any, method: Method, steps: int) -> TrainState:
        """Return the state that a run begins with, for a plan: over shapes, with the adapters of earlier runs."""
        return TrainState.create(model, method, optimizer_of(self.config, steps), name=free_name(model))

    def programs(self, state: TrainState, batch: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """Return the traced programs of a step for a plan, each with what it is given.

        Args:
            state: Of `planned_state`.
            batch: Of `shapes`.
        """
        step = make_train_step(self.loss, accumulate=self.config.train.accumulate)
        return [(step.trace(state, batch), (state, batch))]

    def held(self, state: TrainState) -> Any:
        """Return what the step holds in memory besides the state, as arrays or shapes, for a plan."""
        del state
        return ()

    def read_all(self, read: Callable[[Source], Dataset], *, train: bool) -> tuple[tuple[Dataset, ...], ...]:
        """Read training and held-out sources; what is wrong with each is said at once."""
        problems: list[str] = []

        def attempt(source: Source) -> Dataset:
            try:
                return read(source)
            except DataError as error:
                problems.append(str(error))
                return Dataset([])

        config = self.config
        training = tuple(map(attempt, config.data.train)) if train else ()
        held_out = tuple(map(attempt, config.data.eval or ()))
        refuse(DataError, "data that cannot be used", dict.fromkeys(problems))  # a file may be named twice
        limit = config.evaluation.rows
        return training, tuple(dataclasses.replace(d, examples=self.some(d.examples, limit)) for d in held_out)

    def some(self, rows: Sequence[Any], limit: int | None) -> Sequence[Any]:
        """Return the held-out rows that are looked at: all, the first, or as a task says."""
        return rows[:limit]


def spread(rows: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """Return so many rows at even distances, since they may be sorted by class.

    >>> spread(range(10), 5)
    [0, 2, 4, 6, 8]
    """
    return rows if limit is None or len(rows) <= limit else [rows[i * len(rows) // limit] for i in range(limit)]


def steps_of(config: Config, sources: Iterable[Dataset], rows: int | None = None) -> int:
    """Return how many steps a run of padded rows has: as asked for, or enough to see each row `epochs` times.

    `rows`: of a step, where these are not `train.batch_size`.
    """
    t = config.train
    return t.steps or math.ceil((t.epochs or 1) * sum(map(len, sources)) / (rows or t.batch_size))
