"""Tasks on prompts, whose answers are drawn and rewarded: how rows are read, and what is measured on held-out ones."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from ..config import Source
from ..config.preferences import Rollouts
from ..data import Dataset, TrainBatches, load_prompts, numbered
from ..data.batches import eval_batches
from ..data.prompts import Prompt, collate_prompts
from ..errors import BatchError, ConfigError, RewardError, refuse
from ..generation.generate import stops_of
from ..learning_picture import draw_learning
from ..loading import load_run
from ..methods.partition import attached
from ..models.seams import number
from ..parallel.rules import batch_devices
from ..rewards import Reward, read_rewards
from ..run import RunFolder
from ..train.state import TrainState
from .rollouts import Drawing, Figures, summed
from .start import (
    base_folder,
    base_of,
    begin,
    check_speaks,
    choose_mesh,
    choose_remat,
    dtype_of,
    load_bare,
    load_base,
    optimizer_by_step,
    tokenizer_of,
)
from .task import Data, Task, steps_of

EVALUATION = number("evaluation")
WHOLE = 8  # the width of prompts is a multiple of this


class OfPrompts(Task):
    """A task on prompts. It sets `rollouts`.

    Attributes:
        data: The rows, once they are read.
        reward: What answers are worth; its models are there once the policy is.
        reference: The model that the policy began as, which the KL is measured to.
    """

    formats = ("prompt",)
    shown: ClassVar[Mapping[str, str]] = {}
    reward: Reward
    data: Data
    reference: Any = None

    @property
    def rollouts(self) -> Rollouts:
        """How answers are drawn, and what they are worth."""
        raise NotImplementedError

    def check_config(self) -> None:
        """Refuse a batch that cannot be dealt out into minibatches and micro-batches.

        Raises:
            ConfigError: It does not divide, or the model is a reward model.
        """
        check_speaks(self.config)
        t, parts = self.config.train, self.rollouts.minibatches
        devices = batch_devices(choose_mesh(self.config))
        if t.batch_size % (parts * t.accumulate * devices):
            more = f" over {devices} devices (data x fsdp of the mesh)" if devices > 1 else ""
            raise ConfigError(
                f"train.batch_size {t.batch_size}: it does not divide into {self.config.task}.minibatches {parts} of "
                f"train.accumulate {t.accumulate} parts{more}: take a multiple of {parts * t.accumulate * devices}"
            )

    def load_data(self, *, train: bool = True) -> Data:
        """Read the prompts, and look whether their answers can be rewarded. Arguments and errors as of the task.

        Raises:
            RewardError: Rewards that cannot be had.
        """
        config, tokenizer = self.config, tokenizer_of(self.config)

        def read(source: Source) -> Dataset:
            return load_prompts(
                source.path,
                tokenizer,
                max_length=config.data.max_length,
                columns=source.columns,
                split=source.split,
                skip_bad_rows=config.data.skip_bad_rows,
                name=source.name,
                weight=source.weight,
            )

        training, held_out = self.read_all(read, train=train)
        both = numbered((*training, *held_out))
        rows = [row for part in both for row in part.examples]
        self.reward = read_rewards(list(self.rollouts.reward), tokenizer=tokenizer, rows=rows)
        self.data = Data(tokenizer, both[: len(training)], both[len(training) :])
        return self.data

    def make_batches(self, data: Data) -> TrainBatches:
        """Return the batches: a random draw of prompts each, all of one width, which is compiled once.

        Raises:
            DataError: Fewer prompts than one batch.
        """
        t, collate = self.config.train, partial(collate_prompts, width=width_of(data))
        steps = steps_of(self.config, data.train)
        return TrainBatches(data.train, batch_size=t.batch_size, seed=t.seed, steps=steps, collate=collate, window=1)

    def load_start(self, mesh: Mesh | None) -> tuple[Any, Any]:
        """Return the model that the stage begins with, and that model without adapters; they share their arrays."""
        config, run = self.config, base_of(self.config)
        bare = load_bare(config, mesh)
        if run is None or run.model.is_dir():
            return bare, bare
        return load_base(config, run, choose_remat(config), mesh, over=bare), bare

    def begin(self, model: Any, steps: int) -> TrainState:
        """Return the state of a policy before step 0, over the model that the stage begins with."""
        model, method, name = begin(self.config, model)
        tx = optimizer_by_step(self.config, steps)
        return TrainState.create(model, method, tx, seed=self.config.train.seed, name=name)

    def load_model(self, mesh: Mesh | None, data: Data) -> Any:
        """Return the model that a config begins with, or that the run has made; the reference is what that began with.

        The run's adapter is laid over the reference's own base, which so is in memory once.
        """
        del data
        begun = self.begun or self.config
        start, bare = type(self)(begun).load_start(mesh)
        self.reward = self.reward.load(bare, base_folder(begun))
        model, method, name = begin(begun, start)
        self.reference = attached(model, method, name=name, seed=begun.train.seed)
        if self.begun is None:
            return self.reference
        return load_run(RunFolder(self.config.model.source), dtype=dtype_of(begun), mesh=mesh, over=bare)[0]

    def check_fit(self, data: Data, model: Any) -> None:
        """Refuse prompts of tokens that the model does not know, or too long for an answer to have its room.

        Raises:
            BatchError: Each row is named.
            RewardError: A reward model that knows fewer tokens than may be drawn.
        """
        known, room = model.config.vocab_size, self.rollouts.max_new_tokens
        rows: list[Prompt] = [row for part in (*data.train, *data.held_out) for row in part.examples]
        strange = [f"{row.place}: token {row.input_ids.max()}" for row in rows if row.input_ids.max() >= known]
        refuse(BatchError, f"the tokenizer is not this model's, which knows {known} tokens", dict.fromkeys(strange))
        few = {path: n for path, scorer in self.reward.models().items() if (n := scorer.config.vocab_size) < known}
        refuse(
            RewardError,
            "reward models that cannot read each answer: take one whose table of tokens is as long as the policy's",
            [f"{path!r}: it knows {n} tokens, and the policy draws from {known}" for path, n in few.items()],
        )
        if not any(stop < known for stop in stops_of(model, data.tokenizer)):
            raise BatchError(f"no token ends an answer: the end token of the tokenizer is none of the model's {known}")
        limits = {who: left for who, left in self.positions_left(model).items() if left is not None}
        if limits:
            who = min(limits, key=limits.__getitem__)
            long = [row for row in rows if len(row) + room > limits[who]]
            refuse(
                BatchError,
                f"prompts too long: {who} has {limits[who]} positions, {room} of them for the answer (max_new_tokens)",
                dict.fromkeys(f"{row.place}: the prompt has {len(row)} tokens" for row in long),
            )

    def positions_left(self, model: Any) -> dict[str, int | None]:
        """Return how many tokens prompt and answer may have together, by each model that reads them."""
        rewards = {
            f"the reward model {path!r}": scorer.positions_left() for path, scorer in self.reward.models().items()
        }
        return {"the model": model.positions_left(), **rewards}

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return the figures of a model's answers to the held-out prompts, drawn with the same keys each time."""
        drawing = Drawing(model, data, self.rollouts, self.reward)
        collate = partial(collate_prompts, width=width_of(data))
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), EVALUATION)
        each: dict[str, Figures] = {}
        made: list[dict[str, Any]] = []
        for i, part in enumerate(data.held_out):
            found = []
            for n, batch in enumerate(eval_batches(part.examples, batch_size, collate, by_length=False)):
                draw = jax.random.fold_in(jax.random.fold_in(key, i), n)
                figures, said = drawing.measured(model, self.reference, batch, draw)
                found.append(figures)
                made += said
            each[part.name] = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
        whole = {name: np.concatenate([one[name] for one in each.values()]) for name in next(iter(each.values()))}
        several = {f"{figure}/{name}": x for name, one in each.items() for figure, x in summed(one).items()}
        return {**(several if len(each) > 1 else {}), **summed(whole)}, made

    def keep(self, run: RunFolder, step: int, data: Data, made: Sequence[Mapping[str, Any]]) -> None:
        """Write down some of the answers."""
        del data
        shown = self.config.evaluation.samples
        every = max(1, len(made) // shown) if shown else 1
        run.add_samples([{"step": step, **row} for row in made[::every][:shown]])

    def draw(self, run: RunFolder, data: Data) -> None:
        """Draw reward and KL over the steps."""
        del data
        draw_learning(run.records(run.metrics), title=str(run.path)).savefig(run.report / "learning.png", dpi=120)


def width_of(data: Data) -> int:
    """Return the width of all batches of prompts: that of the longest."""
    return whole(max(len(row) for part in (*data.train, *data.held_out) for row in part.examples))


def whole(width: int) -> int:
    """Return a width rounded up to what devices like.

    >>> whole(9)
    16
    """
    return -(-width // WHOLE) * WHOLE
