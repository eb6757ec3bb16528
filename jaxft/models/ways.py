"""Which kernels of a model a checkpoint has quantised, and in which way: by its tensors, or by its config alone."""

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError, refuse
from ..quant import NF4, Int8, quantize_int8, quantize_nf4
from .layers import Linear
from .names import LEAF_NAMES, Named, parameters, renamed
from .packed import BLOCK, INSTEAD, SKIPPED, declared
from .tensors import Tensors

DOUBLE = "nf4 with double quantisation"


def as_packed(model: Any, way: Callable[[str], str | None], where: object) -> None:
    """Let those kernels of an abstract model be quantised that a checkpoint has so.

    Args:
        model: The model; of some leaves the shapes become those of quantised ones.
        way: How the tensor of a name, as the model's tree has it, is quantised; of `ways_on_disk` or `ways_declared`.
        where: The checkpoint's folder, for errors.

    Raises:
        CheckpointError: Layers of a stack that are not alike, or a layer that stays whole here.
    """
    problems = []
    for named, leaf, variable in parameters(model):
        ways = {f"{name}.{LEAF_NAMES[leaf]}": way(f"{name}.{LEAF_NAMES[leaf]}") for name in named.names}
        ours = max(dict.fromkeys(ways.values()), key=list(ways.values()).count)
        problems += [
            f"{name} is quantised {other or 'not at all'}, the other layers {ours or 'not at all'}: a stack's are alike"
            for name, other in ways.items()
            if other != ours
        ]
        if ours is None:
            continue
        if not stays_whole(model, named):
            variable.set_value(make(variable.get_value(), ours))
        else:
            problems.append(f"{next(iter(ways))} is quantised, and {named.path} stays whole here: {INSTEAD}")
    refuse(CheckpointError, f"{where}: quantised kernels that have no place here", problems)


def make(kernel: Any, way: str) -> NF4 | Int8:
    """Quantise a kernel `(*layers, in, out)`, or its shape."""
    if way == "int8":
        return quantize_int8(kernel)
    return quantize_nf4(kernel, block=BLOCK, double=way == DOUBLE, transposed=True)


def stays_whole(model: Any, named: Named) -> bool:
    """Tell whether a module is none whose kernel a checkpoint can have quantised: no linear one, or a head."""
    heads = ("lm_head", *(path for path in model.heads if not path.startswith(f"{model.prefix}.")))
    return not isinstance(named.module, Linear) or f"{named.path}.".startswith(tuple(f"{path}." for path in heads))


def ways_on_disk(tensors: Tensors, on_disk: Mapping[str, str]) -> Callable[[str], str | None]:
    """Return how tensors are quantised in the files; `on_disk` gives their names there."""

    def way(name: str) -> str | None:
        packed = tensors.packed.get(on_disk.get(name, name))
        if packed is None or packed.kind != "nf4":
            return packed and packed.kind
        return "nf4" if packed.offset is None else DOUBLE

    return way


def ways_declared(model: Any, raw: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Return how tensors are quantised by a `config.json`, which names what is not as transformers matches names."""
    said = raw["quantization_config"]
    kind = "int8" if declared(raw) == "int8" else DOUBLE if said.get("bnb_4bit_use_double_quant") else "nf4"
    kept = said.get(SKIPPED) or ()
    linear = {
        f"{name}.weight": renamed(name, model.written)
        for named, leaf, _ in parameters(model)
        if leaf == "kernel" and not stays_whole(model, named)
        for name in named.names
    }

    def way(name: str) -> str | None:
        dots = f".{linear.get(name, '')}."
        return None if name not in linear or any(f".{one}." in dots for one in kept) else kind

    return way
