"""How a run begins, whatever its task: the model that it starts from, mesh, method and optimiser."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from ..config import Config
from ..errors import ConfigError, DataError, MeshError, RunError, refuse
from ..loading import free_name, load, load_run, load_tokenizer, root_folder, with_config, with_pooling
from ..methods import Full, Method
from ..methods.merge import merge
from ..methods.method import adapters, parts_of
from ..models.hub import fresh_model, read_config, read_shape, resolve
from ..models.sharing import without_dropout
from ..parallel import make_mesh
from ..parallel.rules import batch_devices
from ..quant import quantize
from ..run import RunFolder
from ..train.optimizer import by_step, in_phases, make_optimizer, make_schedule
from ..train.state import TrainState

QUIET = ("reward", "dpo", "ppo", "grpo")  # tasks that have what they begin with drop nothing, unless told otherwise
SPEAK = ("sft", "dpo", "ppo", "grpo")  # tasks that need the probability of a text


def base_of(config: Config) -> RunFolder | None:
    """Return the run whose result a config begins with, None where it is a plain model."""
    run = RunFolder(config.model.source)
    return run if run.started else None


def check_speaks(config: Config) -> None:
    """Refuse a task that needs a language model and is given a classifier or the run of a reward model.

    Raises:
        ConfigError: It is one.
    """
    if config.task not in SPEAK:
        return
    run = base_of(config)
    if run is not None:
        other = "a reward model" if run.config().task == "reward" else ""
    else:
        other = "a classifier (its config.json says so)" if base_shape(config).labels else ""
    if other:
        raise ConfigError(
            f"model.path: {config.model.source} is {other}, which gives no probability to an answer; "
            f"{config.task} begins with a language model or its SFT run"
        )


def base_folder(config: Config) -> Path:
    """Return the folder of the model that everything begins with: that of the last of the runs that lie over it."""
    return root_folder(config.model.source)


def base_shape(config: Config) -> Any:
    """Return what the `config.json` says of the model that everything begins with."""
    return shape_of(config) if config.model.path is None else read_config(base_folder(config))


def tokenizer_of(config: Config) -> Any:
    """Return the tokenizer that a config begins with.

    Raises:
        DataError: The folder has none.
    """
    folder = base_folder(config)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise DataError(f"{folder}: it holds no tokenizer (tokenizer.json), which turns the rows into tokens")
    return tokenizer


def load_state(
    config: Config, steps: int, mesh: Mesh | None, *, labels: tuple[str, ...] = (), more: Method | None = None
) -> TrainState:
    """Load the model, onto a mesh where there is one, attach the method and start the optimiser.

    Over a run's adapter, a config without a method goes on training that adapter; one with a method leaves it frozen
    beneath. Full fine-tuning merges it first.

    Args:
        config: Of the run.
        steps: Of the run.
        mesh: Where it runs.
        labels: Classes of a head that the model gets; (): it gets none.
        more: What the task trains besides the method.
    """
    model, method, name = begin(config, load_base(config, base_of(config), choose_remat(config), mesh, labels), more)
    return TrainState.create(model, method, optimizer_of(config, steps), seed=config.train.seed, name=name)


def begin(config: Config, model: Any, more: Method | None = None) -> tuple[Any, Method | None, str]:
    """Return what a config trains: the model, the method (None: the adapter that hangs there), the adapter's name.

    Args:
        config: Of the run.
        model: What it begins with, as of `load_base`.
        more: What the task trains besides the method.
    """
    run, method, name = base_of(config), config.make_method(), free_name(model)
    method = method | more if method is not None and more is not None else method
    if method is None:
        if run is None or run.model.is_dir():
            raise RunError("method is left out: it may be, where model.path is a run with an adapter to go on with")
        name = next(reversed(adapters(model)), "default")
        return model, None if name in adapters(model) else run.config().make_method() or _inherited(run), name
    if adapters(model) and any(isinstance(part, Full) for part in parts_of(method)):
        return merge(model), method, "default"
    return model, method, name


def _inherited(run: RunFolder) -> Method:
    """Return the method of a run that itself went on with an earlier run's."""
    earlier = RunFolder(run.config().model.source)
    return earlier.config().make_method() or _inherited(earlier)


def load_base(
    config: Config,
    run: RunFolder | None,
    remat: str,
    mesh: Mesh | None = None,
    labels: tuple[str, ...] = (),
    over: Any = None,
) -> Any:
    """Return the model that a config begins with: loaded, a run's, or random by its `config.json` alone.

    With `labels` it has a head of these classes, and its vectors are pooled as the head reads them; with
    `model.pooling` both are pooled so. Where the task has dropout off, it is off in the model and in the adapters of
    earlier runs, the one that goes on too; that of the config's own `method` is not. `over`: of a run with an adapter,
    the model of `load_bare` that it shares.
    """
    model = _load_base(config, run, remat, mesh, labels, over)
    if config.task in QUIET and not getattr(getattr(config, config.task), "dropout", False):
        model = without_dropout(model)
    if config.model.pooling is not None:
        return with_pooling(model, config.model.pooling)
    return with_config(model, pooling=model.reads) if labels and model.config.head_pooling is None else model


def load_bare(config: Config, mesh: Mesh | None) -> Any:
    """Return the model that everything begins with, as the runs over it have it, without their adapters."""
    at, dtype, bits = base_of(config), dtype_of(config), config.model.quantize
    if at is None:
        return load_base(config, None, choose_remat(config), mesh)
    while at is not None and not at.model.is_dir():
        began = at.config()
        at, dtype, bits = base_of(began), dtype or began.model.dtype, bits or began.model.quantize
    return load(base_folder(config), dtype=dtype, quantize=bits, remat=choose_remat(config), mesh=mesh)[0]


def _load_base(
    config: Config, run: RunFolder | None, remat: str, mesh: Mesh | None, labels: tuple[str, ...], over: Any
) -> Any:
    path = config.model.source
    options: dict[str, Any] = {"dtype": dtype_of(config), "remat": remat, "mesh": mesh}
    head: dict[str, Any] = {"labels": labels} if labels else {}
    if run is not None:
        return load_run(run, **options, **head, quantize=config.model.quantize, over=over)[0]
    if config.model.init == "random":
        fresh = fresh_model(read_config(resolve(path), **options, **head, source=path), config.train.seed)
        return fresh if config.model.quantize is None else quantize(fresh, config.model.quantize)
    if config.model.config is not None:
        _check_shape(read_config(resolve(path), **options), shape_of(config, **options))
    return load(path, **options, **head, quantize=config.model.quantize)[0]


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
    made = [_optimizer(config, schedule) for schedule in _schedules(config, steps)]
    return made[0] if len(made) == 1 else in_phases(made[0], made[1], first_phase(config))


def optimizer_by_step(config: Config, steps: int) -> Any:
    """Return the optimiser of a config whose steps update several times: see `by_step`."""
    return by_step(partial(_optimizer, config), schedule_of(config, steps))


def _optimizer(config: Config, schedule: Any) -> Any:
    o = config.optimizer
    moments = {"b1": o.b1, "b2": o.b2, "eps": o.eps}
    return make_optimizer(o.name, schedule, weight_decay=o.weight_decay, clip_norm=o.clip_norm, **moments)


def schedule_of(config: Config, steps: int) -> Any:
    """Return the learning rate of a config by step."""
    made = _schedules(config, steps)
    return made[0] if len(made) == 1 else optax.join_schedules(made, [first_phase(config)])


def _schedules(config: Config, steps: int) -> list[Any]:
    """Return the schedule of each phase: warm-up and decay begin anew with the second."""
    o, first = config.optimizer, first_phase(config)
    options: dict[str, Any] = {"learning_rate": o.learning_rate, "warmup_steps": o.warmup_steps}
    return [make_schedule(o.schedule, steps=n, **options) for n in (first, steps - first) if n > 0]


def first_phase(config: Config) -> int:
    """Return the steps of a classification in which the vectors are pulled together, before the head learns."""
    return 0 if config.classify is None else config.classify.contrastive_steps
