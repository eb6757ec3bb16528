"""`adapter_config.json` of peft: which methods it knows, and what holds for each of them. Read strictly."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError, MethodError
from ..methods import IA3, LoRA, Method, PrefixTuning, PromptTuning, PTuning, PTuningV2
from ..methods.matching import named
from ..models.names import named_modules
from . import peft_ia3, peft_lora, peft_virtual


@dataclasses.dataclass(frozen=True)
class Format:
    """How peft speaks of one method.

    Attributes:
        kind: Its `peft_type`.
        needs: Keys that a config must have.
        reads: Keys that `method_of` reads.
        config_of: (method, model) -> the keys of `adapter_config.json` besides those that every config has.
        method_of: (config, path for messages) -> the method.
        says: (method) -> whether peft's words can say what these options compute; else the folder is ours alone.
        lacks: (method) -> whether they lack something that training goes on with; it is then said beside them.
    """

    kind: str
    needs: tuple[str, ...]
    reads: set[str]
    config_of: Callable[[Any, Any], dict[str, Any]]
    method_of: Callable[[Mapping[str, Any], str], Method]
    says: Callable[[Any], bool] = lambda _: True
    lacks: Callable[[Any], bool] = lambda _: False


def _virtual(kind: str, reads: set[str], config_of: Any, method_of: Any) -> Format:
    needs = ("num_virtual_tokens",)
    return Format(kind, needs, reads, config_of, method_of, says=peft_virtual.shifts, lacks=peft_virtual.makes)


PREFIX = _virtual("PREFIX_TUNING", peft_virtual.PREFIX, peft_virtual.prefix_config, peft_virtual.prefix_method)
FORMATS: dict[type[Method], Format] = {
    LoRA: Format(
        "LORA", ("r", "lora_alpha", "target_modules"), peft_lora.READ, peft_lora.config_of, peft_lora.method_of
    ),
    PrefixTuning: PREFIX,
    PTuningV2: PREFIX,
    PromptTuning: _virtual(
        "PROMPT_TUNING", peft_virtual.PROMPT, peft_virtual.prompt_config, peft_virtual.prompt_method
    ),
    PTuning: _virtual("P_TUNING", peft_virtual.ENCODED, peft_virtual.encoded_config, peft_virtual.encoded_method),
    IA3: Format(
        "IA3", ("target_modules", "feedforward_modules"), peft_ia3.READ, peft_ia3.config_of, peft_ia3.method_of
    ),
}
VIRTUAL = tuple({form.kind for form in FORMATS.values() if "num_virtual_tokens" in form.needs})
AUTOMATIC = ("classifier", "score")  # what peft copies of every classifier
NEUTRAL = {  # say nothing about what the tensors compute
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


def config_of(method: Method, model: Any, heads: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the `adapter_config.json` that says in peft's words what the method adapts in this model.

    Args:
        method: The method.
        model: The model.
        heads: Paths of the heads that the adapter has copies of.
    """
    form = FORMATS[type(method)]
    config = {**common(form.kind, model), **form.config_of(method, model)}
    if heads:
        always = AUTOMATIC if config["task_type"] == "SEQ_CLS" else ()
        ends = (*always, *(path.rsplit(".", 1)[-1] for path in heads), *(config.get("modules_to_save") or ()))
        config["modules_to_save"] = list(dict.fromkeys(ends))
    return config


def heads_of(config: Mapping[str, Any], model: Any) -> tuple[str, ...]:
    """Return the paths of this model's heads that a folder has copies of."""
    ends = config.get("modules_to_save") or ()
    return tuple(path for path in getattr(model, "heads", ()) if any(is_end(end, path) for end in ends))


def without_heads(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return the config with `modules_to_save` as the method's own option: without this model's heads.

    Of a classifier it is also without those that peft names whether a model has them or not. peft names layers of a
    head as targets too, and passes them over.
    """
    passed = AUTOMATIC if config.get("task_type") == "SEQ_CLS" else ()
    heads = heads_of(config, model)
    ends = dict.fromkeys(config.get("modules_to_save") or ())
    rest = [end for end in ends if end not in passed and not any(is_end(end, path) for path in heads)]
    targets = config.get("target_modules")
    if heads and isinstance(targets, list):
        names = [name for n in named_modules(model) for name in n.names]
        inside = [name for name in names if f"{name}.".startswith(tuple(f"{head}." for head in heads))]
        outside = set(names) - set(inside)
        idle = {t for t in targets if any(named(n, (t,)) for n in inside) and not any(named(n, (t,)) for n in outside)}
        config = {**config, "target_modules": [t for t in targets if t not in idle]}
    return {**config, "modules_to_save": rest}


def is_end(end: str, path: str) -> bool:
    """Tell whether a name is the end of a path, in whole parts."""
    return f".{path}".endswith(f".{end}")


def key_of(key: str, config: Mapping[str, Any]) -> str:
    """Return what a tensor of a head is called in a folder: beside virtual tokens peft leaves `model` out."""
    return key.replace("base_model.model.", "base_model.", 1) if config.get("peft_type") in VIRTUAL else key


def common(kind: str, model: Any) -> dict[str, Any]:
    """Return the keys that every `adapter_config.json` has."""
    return {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "source", "") or None,
        "inference_mode": True,
        "peft_type": kind,
        "task_type": getattr(model, "task_type", None),
    }


def method_of(config: Mapping[str, Any], where: str) -> Method:
    """Return the method that an `adapter_config.json` of peft describes.

    Raises:
        CheckpointError: Another kind of adapter, or an option whose effect we do not compute; each is named.
    """
    kind = config.get("peft_type")
    form = next((form for form in FORMATS.values() if form.kind == kind), None)
    if form is None:
        known = ", ".join(dict.fromkeys(form.kind for form in FORMATS.values()))
        raise CheckpointError(f"{where}: peft_type {kind!r} is not supported; there are {known}")
    for key in form.needs:
        if config.get(key) is None:
            raise CheckpointError(f"{where}: {key} is missing")
    unknown = {k: v for k, v in config.items() if k not in form.reads | NEUTRAL and v not in (None, False, {}, [], "")}
    if unknown:
        listed = ", ".join(f"{k}={v!r}" for k, v in unknown.items())
        raise CheckpointError(f"{where}: options that are not supported: {listed}")
    try:
        return form.method_of(config, where)
    except MethodError as error:
        raise CheckpointError(f"{where}: {error}") from None
