"""Supervised fine-tuning: instructions, conversations or plain text, by any method."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..config import Config, Source
from ..data import Dataset, PackedBatches, Template, TrainBatches, load_dataset
from ..data.batches import width_of
from ..data.tokens import Example
from ..errors import BatchError, ConfigError, DataError, MeshError, RunError, refuse
from ..loading import free_name, load, load_run, load_tokenizer
from ..losses.language import next_token_figures
from ..methods import Full, Method
from ..methods.merge import merge
from ..methods.method import adapters, parts_of
from ..models.hub import fresh_model, read_config, read_shape, resolve
from ..parallel import make_mesh
from ..parallel.rules import batch_devices
from ..run import RunFolder
from ..scores import SCORES, check_scores, exact_match
from ..train.evaluate import evaluate_loss, write_answers
from ..train.optimizer import make_optimizer, make_schedule
from ..train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows of a run: tokenizer, training sources, held-out sources."""

    tokenizer: Any
    train: tuple[Dataset, ...]
    held_out: tuple[Dataset, ...]

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


def base_of(config: Config) -> tuple[RunFolder | None, Any]:
    """Return the run whose result a config begins with, None where it is a plain model; and the tokenizer.

    Raises:
        DataError: The folder has no tokenizer.
    """
    run = RunFolder(config.model.source)
    at = run
    while at.started and not at.model.is_dir():
        at = RunFolder(at.config().model.source)  # the adapter's base may be a run too
    folder = at.model if at.started else resolve(at.path)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise DataError(f"{folder}: it holds no tokenizer (tokenizer.json), which turns the rows into tokens")
    return (run if run.started else None), tokenizer


def load_data(config: Config, *, train: bool = True) -> Data:
    """Read the rows of a config; every bad one is named before a model is loaded.

    Raises:
        DataError: Sources that cannot be read, or bad rows.
    """
    _, tokenizer = base_of(config)
    template = Template(**config.data.template.model_dump()) if config.data.template else None
    problems: list[str] = []

    def read(source: Source) -> Dataset:
        try:
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
        except DataError as error:
            problems.append(str(error))
            return Dataset([])

    training = tuple(map(read, config.data.train)) if train else ()
    held_out = tuple(map(read, config.data.eval or ()))
    refuse(DataError, "data that cannot be used", problems)
    limit = config.evaluation.rows
    held_out = tuple(dataclasses.replace(d, examples=d.examples[:limit]) for d in held_out)
    return Data(tokenizer, training, held_out)


def load_state(config: Config, steps: int, mesh: Mesh | None) -> TrainState:
    """Load the model, onto a mesh where there is one, attach the method and start the optimiser.

    Over a run's adapter, a config without a method goes on training that adapter; one with a method leaves it frozen
    beneath. Full fine-tuning merges it first.
    """
    run, _ = base_of(config)
    method = config.make_method()
    model = load_base(config, run, choose_remat(config), mesh)
    name = free_name(model)
    if method is None:
        if run is None or run.model.is_dir():
            raise RunError("method is left out: it may be, where model.path is a run with an adapter to go on with")
        method = run.config().make_method() or _inherited(run)
        name = next(reversed(adapters(model)), "default")
        kept = None if name in adapters(model) else method
        return TrainState.create(model, kept, optimizer_of(config, steps), seed=config.train.seed, name=name)
    if adapters(model) and any(isinstance(part, Full) for part in parts_of(method)):
        model, name = merge(model), "default"
    return TrainState.create(model, method, optimizer_of(config, steps), seed=config.train.seed, name=name)


def _inherited(run: RunFolder) -> Method:
    """Return the method of a run that itself went on with an earlier run's."""
    earlier = RunFolder(run.config().model.source)
    return earlier.config().make_method() or _inherited(earlier)


def load_base(config: Config, run: RunFolder | None, remat: str, mesh: Mesh | None = None) -> Any:
    """Return the model that a config begins with: loaded, a run's, or random by its `config.json` alone."""
    path = config.model.source
    options: dict[str, Any] = {"dtype": dtype_of(config), "remat": remat, "mesh": mesh}
    if run is not None:
        return load_run(run, **options)[0]
    if config.model.init == "random":
        return fresh_model(read_config(resolve(path), **options, source=path), config.train.seed)
    if config.model.config is not None:
        _check_shape(read_config(resolve(path), **options), shape_of(config, **options))
    return load(path, **options)[0]


def shape_of(config: Config, **options: Any) -> Any:
    """Return the shape that `model.config` names.

    Raises:
        ConfigError: It is no file.
    """
    file = Path(str(config.model.config))
    if not file.is_file():
        what = "a folder: give a config.json in it" if file.is_dir() else "not there"
        raise ConfigError(f"model.config: {file} is {what}")
    return read_shape(file, **options)


def _check_shape(loaded: Any, planned: Any) -> None:
    """Refuse weights of another shape than `model.config` says."""
    keys = [f.name for f in dataclasses.fields(planned) if f.compare and f.name != "dtype"]
    pairs = {key: (getattr(planned, key), getattr(loaded, key, None)) for key in keys}
    pairs["family"] = (type(planned).__name__, type(loaded).__name__)
    refuse(
        ConfigError,
        "model.config is not the shape of the weights at model.path",
        [f"{key}: {there!r} there, {here!r} in the weights" for key, (there, here) in pairs.items() if there != here],
    )


def dtype_of(config: Config) -> str | None:
    """Return the dtype that a config asks for: of random weights float32 if it says nothing, else the checkpoint's."""
    return config.model.dtype or ("float32" if config.model.init == "random" else None)


def choose_remat(config: Config, platform: str | None = None) -> str:
    """Return what the backward pass recomputes: with `auto` everything on an accelerator, where memory is dear."""
    if config.model.remat != "auto":
        return config.model.remat
    return "none" if (platform or jax.default_backend()) == "cpu" else "full"


def choose_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Return the mesh that a config asks for, of all devices; None: the first device alone.

    Raises:
        MeshError: The devices cannot form it, or the rows of a batch do not divide over it.
    """
    if config.mesh is None:
        return None
    mesh = make_mesh(**config.mesh.model_dump(), devices=devices)
    rows, parts = config.train.batch_size // config.train.accumulate, batch_devices(mesh)
    if rows % parts:
        raise MeshError(
            f"train.batch_size {config.train.batch_size}: {rows} rows of a micro-batch do not divide over the "
            f"{parts} devices of data x fsdp; take a multiple of {parts * config.train.accumulate}"
        )
    return mesh


def optimizer_of(config: Config, steps: int) -> Any:
    """Return the optimiser of a config."""
    o = config.optimizer
    moments = {"b1": o.b1, "b2": o.b2, "eps": o.eps}
    return make_optimizer(
        o.name, schedule_of(config, steps), weight_decay=o.weight_decay, clip_norm=o.clip_norm, **moments
    )


def schedule_of(config: Config, steps: int) -> Any:
    """Return the learning rate of a config by step."""
    o = config.optimizer
    return make_schedule(o.schedule, o.learning_rate, steps=steps, warmup_steps=o.warmup_steps)


def make_batches(config: Config, data: Data) -> TrainBatches | PackedBatches:
    """Return the batches of a run, packed or padded: as many as asked for, or enough to see each row `epochs` times.

    Raises:
        DataError: Fewer rows than one batch.
    """
    t = config.train
    epochs = (t.epochs or 1) if t.steps is None else None
    if config.data.packing:
        length = config.data.max_length
        return PackedBatches(
            data.train, batch_size=t.batch_size, length=length, seed=t.seed, steps=t.steps, epochs=epochs
        )
    steps = t.steps if epochs is None else math.ceil(epochs * sum(map(len, data.train)) / t.batch_size)
    return TrainBatches(data.train, batch_size=t.batch_size, seed=t.seed, steps=steps)


def check_fit(config: Config, data: Data, model: Any) -> None:
    """Refuse rows with tokens that the model does not know, or that it has no positions for.

    Raises:
        BatchError: The tokenizer is not this model's, or `data.max_length` is too long for it.
    """
    known, positions = model.config.vocab_size, model.positions_left()
    beside = "" if positions == getattr(model.config, "n_positions", None) else " beside its virtual tokens"
    packing, length = config.data.packing, config.data.max_length
    padded = data.held_out if packing else (*data.train, *data.held_out)
    longest = max((len(row) for part in padded for row in part.examples), default=0)
    if positions is not None and packing and data.train and length > positions:
        raise BatchError(
            f"data.max_length {length}: packs are as wide, but this model has {positions} positions{beside}: set it "
            f"to {positions} at most"
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
                f"evaluation.max_new_tokens {e.max_new_tokens}: the longest prompt has {asked} tokens, and this model "
                f"has {positions} positions{beside}: set it to {max(positions - asked, 1)}, or a shorter "
                "data.max_length"
            )
    for part in (*data.train, *data.held_out):
        for row in part.examples:
            if int(row.input_ids.max()) >= known:
                raise BatchError(
                    f"{row.place}: it has the token {int(row.input_ids.max())}, but the model knows {known}: the "
                    "tokenizer is not this model's"
                )


def evaluate(
    model: Any, config: Config, data: Data, batch_size: int
) -> tuple[dict[str, float], list[tuple[Example, str]]]:
    """Return the figures of a model on the held-out rows, and the answers it wrote where answers are asked for."""
    figures = evaluate_loss(model, next_token_figures, data.held_out, batch_size=batch_size)
    e = config.evaluation
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


def _judge(config: Config, written: list[tuple[Example, str]], suffix: str = "") -> dict[str, float]:
    expected, said = [str(row.answer) for row, _ in written], [answer for _, answer in written]
    if not written:
        return {}
    figures = {f"accuracy{suffix}": exact_match(said, expected)} if config.evaluation.exact_match else {}
    return figures | {f"{name}{suffix}": SCORES[name](said, expected) for name in config.evaluation.scores}


def check_evaluation(config: Config, data: Data) -> None:
    """Refuse an evaluation that could not be made at the end: before the run, not after it."""
    check_scores(config.evaluation.scores)
    wanted = config.evaluation.exact_match or config.evaluation.scores
    if wanted and not any(row.answer is not None for part in data.held_out for row in part.examples):
        raise DataError("evaluation.exact_match and scores compare answers, but rows of format text have none")
