"""What a run will need of each device, before anything is bought: the real step, compiled with shapes for arrays."""

import dataclasses
import math
import re
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from .config import Config
from .errors import RunError
from .flops import count_flops
from .loading import free_name, labels_of, load
from .methods import Full
from .methods.heads import drop_heads
from .methods.method import attach, parts_of
from .methods.report import parameter_report
from .models.hub import abstract_model, load_model, resolve
from .parallel import make_mesh
from .parallel.rules import rows_sharding
from .parallel.topology import GIB, capacity, topology_devices
from .run import RunFolder
from .tasks.registry import task_of
from .tasks.start import choose_mesh, choose_remat, dtype_of, shape_of
from .train.policy import PpoState
from .train.state import TrainState

STEPS = 1000  # of the schedule, where the config does not say how many: it changes no shape
COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
EXCEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of one step; bytes are those of one device.

    Attributes:
        device: Kind of device.
        devices: How many there are.
        mesh: How many of them are used along each axis.
        remat: What the backward pass recomputes.
        rows: Rows of a step, over all devices.
        width: Tokens of the widest row; 0 of images.
        trainable_parameters: Trained numbers.
        total_parameters: All numbers of the model.
        parameters_bytes: Trained and frozen leaves, and the copy of trained ones that a task may compare with.
        optimizer_bytes: The optimiser's state.
        temporary_bytes: Activations, gradients, gathered layers: the most that is alive at once beside the rest.
        total_bytes: Arguments + temporaries + outputs - what outputs share with arguments.
        capacity_bytes: What programs may use.
        fits: Whether the total is within the capacity.
        flops_per_step: Of the matrix products of all devices together, recomputed ones included.
        compile_seconds: Time that the compiler took here.
        collectives: How many of each the program has; those of a scanned layer count once. None: the program is not
            there (the compiler gave up), or its text cannot be read (a libtpu of another time than this jax).
    """

    device: str
    devices: int
    mesh: dict[str, int]
    remat: str
    rows: int
    width: int
    trainable_parameters: int
    total_parameters: int
    parameters_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    total_bytes: int
    capacity_bytes: int
    fits: bool
    flops_per_step: int
    compile_seconds: float
    collectives: dict[str, int] | None

    def __str__(self) -> str:
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        spare = (self.capacity_bytes - self.total_bytes) / GIB
        verdict = f"fits, {spare:.2f} to spare" if self.fits else f"does not fit: {-spare:.2f} too much"
        percent = 100 * self.trainable_parameters / self.total_parameters
        used = math.prod(self.mesh.values())
        more = f", of {self.devices} (`mesh: {{data: -1}}` uses them all)" if used < self.devices else ""
        kinds = None if self.collectives is None else [f"{n} {name}" for name, n in self.collectives.items()]
        sent = "not read" if kinds is None else ", ".join(kinds) or "none"
        what = f"rows x {self.width:,} tokens" if self.width else "images"
        lines = {
            "parameters": self.parameters_bytes,
            "optimizer": self.optimizer_bytes,
            "activations": self.temporary_bytes,
            "total": self.total_bytes,
            "capacity": self.capacity_bytes,
        }
        return "\n".join(
            [
                f"{used} x {self.device} ({axes}){more}",
                f"{self.rows} {what} a step, remat {self.remat}",
                f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters trained ({percent:.2f} %)",
                "",
                *(f"{name:14}{size / GIB:9.2f} GiB a device" for name, size in lines.items()),
                verdict,
                "",
                f"{self.flops_per_step:.3e} FLOPs a step, of all devices",
                f"collectives: {sent} (a layer's count once)",
                f"compiled in {self.compile_seconds:.0f} s",
            ]
        )


def make_plan(config: Config, topology: str | None = None) -> Plan:
    """Compile the train step of a config for some devices, and read off what it needs.

    No data and no weights are read, and nothing is written. The rows are as wide as `data.max_length` allows. Of a step
    of several programs (answers are drawn, and learnt from) the figures are those of the one that needs most.
    Models that reward answers are not counted, nor is the pass in which policy and reference score them.

    Args:
        config: A run's config; `model.config` may stand for weights that are not there.
        topology: A TPU slice, `"v5e:4x4"` say, of which there need be none; None: the devices at hand.

    Raises:
        JaxftError: The config does not fit the devices, or there is no such slice.
    """
    devices = jax.devices() if topology is None else topology_devices(topology)
    mesh = choose_mesh(config, devices) or (make_mesh(devices=devices[:1]) if topology else None)
    room = capacity(devices[0])
    state = abstract_state(config, mesh, devices[0].platform)
    batch = abstract_batch(config, mesh)
    task = task_of(config)
    programs, held = task.programs(state, batch), task.held(state)
    whole = _device_bytes((state, batch, held))
    needs = [_needs(traced, _device_bytes(given), whole, topology) for traced, given in programs]
    most = max(needs, key=lambda one: one.total)
    roles = (state, state.critic) if isinstance(state, PpoState) else (state,)
    held = (held, state.reference) if isinstance(state, PpoState) else held
    report = parameter_report(state)
    return Plan(
        device=devices[0].device_kind,
        devices=len(devices),
        mesh={"data": 1, "fsdp": 1, "tensor": 1} if mesh is None else dict(mesh.shape),
        remat=state.frozen.config.remat,
        rows=config.train.batch_size,
        width=max((x.shape[1] for name, x in batch.items() if name.endswith("input_ids")), default=0),
        trainable_parameters=report.trainable,
        total_parameters=report.total,
        parameters_bytes=_device_bytes((held, [(role.trainable, role.frozen) for role in roles])),
        optimizer_bytes=_device_bytes([role.opt_state for role in roles]),
        temporary_bytes=most.temporaries,
        total_bytes=most.total,
        capacity_bytes=room,
        fits=most.total <= room,
        flops_per_step=sum(count_flops(traced.jaxpr) for traced, _ in programs),
        compile_seconds=sum(one.seconds for one in needs),
        collectives=most.collectives,
    )


class _Needs(NamedTuple):
    """What a program needs of each device, beside what else the run holds."""

    temporaries: int
    total: int
    seconds: float
    collectives: dict[str, int] | None


def _needs(traced: Any, arguments: int, held: int, topology: str | None) -> _Needs:
    """Compile a program.

    Args:
        traced: The program.
        arguments: Bytes of what it is given.
        held: Bytes of all that the run holds, of which some may not be among them.
        topology: As of `make_plan`.
    """
    lowered = traced.lower()
    cached = jax.config.values["jax_enable_compilation_cache"]
    if topology is not None:  # a program for devices that are not there can be written to a cache, but not read again
        _use_cache(False)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        exceeded = EXCEEDED.search(str(error))
        if exceeded is None:
            raise RunError(f"the compiler refuses this step: {str(error).splitlines()[0]}") from error
        total = int(float(exceeded[1]) * 1024 ** "BKMGT".index(exceeded[2]))  # arguments are in it
        return _Needs(max(0, total - arguments), total, time.perf_counter() - began, None)
    finally:
        if topology is not None:
            _use_cache(cached)
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = taken + memory.temp_size_in_bytes + max(0, held - arguments)
    return _Needs(memory.temp_size_in_bytes, total, seconds, _collectives(compiled))


def _use_cache(on: bool) -> None:
    """Switch the compilation cache; what it has decided once, it keeps to until it is reset."""
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()


def abstract_state(config: Config, mesh: Mesh | None, platform: str) -> TrainState:
    """Return the first state of a config's run, as shapes."""
    m, labels = config.model, task_of(config).planned_labels()
    head: dict[str, Any] = {"labels": labels} if labels else {}
    options: dict[str, Any] = {"dtype": dtype_of(config), "remat": choose_remat(config, platform), "mesh": mesh}
    method = config.make_method()
    if method is None:
        raise RunError("method is left out: jaxft plan needs one, since it reads no run's adapter")
    method = method.loaded()  # a prompt's first words make no difference
    if m.config is not None:
        model: Any = abstract_model(shape_of(config, **options).replace(**head), m.quantize)
    else:
        merged = any(isinstance(part, Full) for part in parts_of(method))
        model = abstract_base(m.source, merged, **options, **head, quantize=m.quantize)
    return task_of(config).planned_state(model, method, config.train.steps or STEPS)


def abstract_base(source: str, merged: bool, **options: Any) -> Any:
    """Return the model of a folder, hub id or run, as shapes; adapters of runs are not read but made, or merged."""
    run = RunFolder(source)
    if not run.started:
        return load_model(resolve(source, weights=False), **options, abstract=True)
    if run.model.is_dir():
        return load(run.model, **options, abstract=True)[0]
    config = run.config()
    options["quantize"] = None if merged else options["quantize"] or config.model.quantize
    model, method = abstract_base(config.model.source, merged, **options), config.make_method()
    if merged or method is None:
        return model
    name = free_name(model)
    model = attach(model, method.loaded(), name=name)
    if not labels_of(run):
        drop_heads(model, name)  # it was trained without one
    return model


def abstract_batch(config: Config, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the widest batch of a config, as shapes."""
    sharding = None if mesh is None else rows_sharding(mesh)
    return {name: x.update(sharding=sharding) for name, x in task_of(config).shapes().items()}


def _collectives(compiled: Any) -> dict[str, int] | None:
    """Count the collectives in a program's text."""
    try:
        found = COLLECTIVE.findall(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return None
    return dict(sorted(Counter(found).items()))


def _device_bytes(tree: Any) -> int:
    """Return the bytes of one device's parts of some arrays."""

    def held(x: Any) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(held, jax.tree.leaves(tree)))
