"""Folders of the adapters library (1.3.0) for its bottleneck adapters, written from our options and read back.

Beside `adapter_config.json` the library can write a copy of the model's head (`head_config.json` and
`model_head.safetensors`). That of a classifier is the adapter's copy of it. A language model's is not loaded: one that
is the base's own changes nothing, another is refused.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, MethodError, refuse
from ..methods import Adapter
from ..methods.adapter import SITES
from ..models.names import parameters
from ..models.tensors import Tensors, read_json
from .entries import PREFIX, Entry

WEIGHTS, HEAD, HEAD_CONFIG = "adapter.safetensors", "model_head.safetensors", "head_config.json"
CONVERT = "model.load_adapter(folder); model.save_adapter(new_folder, name, with_head=False, use_safetensors=True)"
FAMILIES = (
    "gpt2",
    "llama",
    "mistral",
    "bert",
    "roberta",
    "xlm-roberta",
)  # in the library itself; others it reaches by hooks at other places

KINDS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "is_parallel": False, "original_ln_before": True},
    "houlsby": {"mh_adapter": True, "output_adapter": True, "is_parallel": False, "original_ln_before": False},
    "parallel": {"mh_adapter": False, "output_adapter": True, "is_parallel": True, "original_ln_before": False},
}
ABSENT = {"is_parallel": False, "original_ln_before": False}  # what a key means that is not there
ONLY = {  # other values compute what we do not
    "original_ln_after": True,
    "residual_before_ln": True,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "cross_adapter": False,
    "phm_layer": False,
    "inv_adapter": None,
    "stochastic_depth": 0.0,
}
READ = {"reduction_factor", "non_linearity", "scaling", "init_weights", "dropout", "leave_out"}
NEUTRAL = {  # say nothing about what the tensors compute, where ONLY holds
    *("adapter_residual_before_ln", "init_weights_seed", "inv_adapter_reduction_factor", "phm_dim", "phm_rank"),
    *("factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule", "phm_c_init", "phm_init_range"),
    *("learn_phm", "hypercomplex_nonlinearity", "phm_bias"),
}
OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in configs without a version


def expresses(method: Adapter, model: Any) -> bool:
    """Tell whether the library has these options, on this family, so that a folder of its kind can say them."""
    known = method.parallel_input == "residual" and getattr(model, "model_type", None) in FAMILIES
    inside = f"{getattr(model, 'prefix', '')}."  # what the library takes for the base's, and does not save
    return known and not any(
        n.path.startswith(inside) and v.get_metadata("new", False) for n, _, v in parameters(model)
    )


def is_folder(config: Mapping[str, Any]) -> bool:
    """Tell whether an `adapter_config.json` is the library's."""
    return "peft_type" not in config and "config" in config


def config_of(method: Adapter, model: Any, name: str) -> dict[str, Any]:
    """Return the `adapter_config.json` that says in the library's words what the method adapts in this model."""
    width, factor = model.config.hidden_size, method.reduction_factor
    if method.size is not None:  # half a unit off where it does not divide, so that no rounding meets the floor
        factor = width // method.size if width % method.size == 0 else width / (method.size + 0.5)
    scale = method.scale if method.scale == "learned" else float(method.scale or 0)
    depth = model.config.num_hidden_layers
    options = {
        **KINDS[method.kind],
        **ONLY,
        "reduction_factor": factor,
        "non_linearity": method.non_linearity,
        "scaling": scale,
        "init_weights": "bert" if method.init == "bert" else "mam_adapter",
        "dropout": float(method.dropout),
        "leave_out": [] if method.layers is None else [i for i in range(depth) if i not in method.layers],
    }
    return {
        "config": options,
        "hidden_size": width,
        "model_class": type(model).__name__,
        "model_name": model.config.source or None,
        "model_type": model.model_type,
        "name": name,
        "version": "adapters.1.3.0",
    }


def method_of(config: Mapping[str, Any], model: Any, where: str) -> Adapter:
    """Return the method that an `adapter_config.json` of the library describes, on this model.

    Raises:
        CheckpointError: Another kind of adapter, or options whose effect we do not compute; each is named.
    """
    options, name = config["config"], config.get("name")
    if not isinstance(options, dict) or options.get("architecture") is not None:
        what = options.get("architecture") if isinstance(options, dict) else options
        raise CheckpointError(f"{where}: config {what!r} is not supported; bottleneck adapters with options are")
    refuse(CheckpointError, f"{where}: not a bottleneck adapter that we compute", _problems(options, name))
    parallel = bool(options.get("is_parallel"))
    kind = "parallel" if parallel else "houlsby" if options["mh_adapter"] else "pfeiffer"
    activation = options["non_linearity"]
    if "version" not in config:
        activation = OLD_NAMES.get(activation, activation)
    left_out, layers = options.get("leave_out") or [], None
    if left_out:
        depth = max(len(target.names) for target in Adapter(kind=kind).targets(model))
        absent = sorted(set(left_out) - set(range(depth)))
        if absent:
            raise CheckpointError(f"{where}: leave_out names layers {absent}, this model has {depth}")
        layers = tuple(i for i in range(depth) if i not in left_out)
    try:
        return Adapter(
            kind=kind,
            reduction_factor=options["reduction_factor"],
            non_linearity=activation.lower(),
            scale=options.get("scaling", 1.0),
            init="bert" if options.get("init_weights", "bert") == "bert" else "default",
            dropout=options.get("dropout", 0.0),
            layers=layers,
        )
    except MethodError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _problems(options: Mapping[str, Any], name: Any) -> Iterable[str]:
    if not isinstance(name, str) or not name:
        yield f"name={name!r}: the adapter's name is a text, as it stands in the names of its tensors"
    needed = [
        key for key in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity") if key not in options
    ]
    for key in needed:
        yield f"{key} is missing"
    asked = {**ABSENT, **options}
    keys = ["mh_adapter", "output_adapter", "is_parallel"]
    keys += [] if asked["is_parallel"] else ["original_ln_before"]  # which a parallel one does not look at
    if not needed and not any(all(asked[k] == kind[k] for k in keys) for kind in KINDS.values()):
        said = ", ".join(f"{k}={asked[k]!r}" for k in keys)
        yield f"{said}: there are those of {', '.join(SITES)}"
    for key, value in ONLY.items():
        if options.get(key, value) != value:
            yield f"{key}={options[key]!r} is not supported, only {value!r} is"
    for key in sorted(set(options) - {*KINDS["pfeiffer"], *ONLY, *READ, *NEUTRAL, "architecture"}):
        yield f"{key}={options[key]!r} is not known"
    if not isinstance(options.get("non_linearity", ""), str):
        yield f"non_linearity={options['non_linearity']!r}: the name of an activation is expected"
    if isinstance(options.get("reduction_factor"), dict):
        yield f"reduction_factor={options['reduction_factor']!r}: one number for all layers is supported"
    left_out = options.get("leave_out") or []
    if not isinstance(left_out, list) or not all(isinstance(i, int) for i in left_out):
        yield f"leave_out={left_out!r}: indices of layers are expected"


def files(places: Mapping[str, Entry], name: str) -> dict[str, dict[str, Entry]]:
    """Return the entries by the library's files and names: the adapter's own name stands in each of its tensors."""
    out: dict[str, dict[str, Entry]] = {WEIGHTS: renamed(places, name)}
    head = {key: entry for key, entry in out[WEIGHTS].items() if f".adapters.{name}." not in key}
    if head:
        out = {WEIGHTS: {key: entry for key, entry in out[WEIGHTS].items() if key not in head}, HEAD: head}
    return out


def renamed(places: Mapping[str, Entry], name: str) -> dict[str, Entry]:
    """Return the entries by the library's names.

    Its module `adapters` stands in ours of pre-norm families, `output_adapters`, and is ours in post-norm ones.
    """

    def theirs(key: str) -> str:
        key = key.removeprefix(PREFIX).replace("_adapters.", "_adapters.adapters.", 1)
        return key.replace(".adapters.", f".adapters.{name}.", 1)

    return {theirs(key): entry for key, entry in places.items()}


def head_config(model: Any) -> dict[str, Any]:
    """Return the `head_config.json` of a classifier."""
    labels = model.config.labels
    return {
        "config": None,
        "hidden_size": model.config.hidden_size,
        "label2id": {label: i for i, label in enumerate(labels)},
        "model_class": type(model).__name__,
        "model_name": model.config.source or None,
        "model_type": model.model_type,
        "name": None,
        "num_labels": len(labels),
        "version": "adapters.1.3.0",
    }


def read_labels(folder: Path) -> tuple[str, ...]:
    """Return the names of the classes of the head beside an adapter, () where none are said."""
    named = read_json(folder / HEAD_CONFIG).get("label2id") if (folder / HEAD_CONFIG).is_file() else None
    return tuple(sorted(named, key=named.__getitem__)) if isinstance(named, dict) else ()


def heads_of(folder: Path, model: Any) -> tuple[str, ...]:
    """Return the paths of this model's heads that a folder has copies of."""
    if not (folder / HEAD).is_file():
        return ()
    with Tensors(folder, HEAD, CONVERT) as tensors:
        return tuple(
            path for path in getattr(model, "heads", ()) if any(k.startswith(f"{path}.") for k in tensors.shapes)
        )


def check_names(tensors: Tensors, name: str, where: str) -> None:
    """Refuse a file whose tensors are another adapter's: the library would load none of them, and say nothing."""
    found = {m[1] for key in tensors.shapes if (m := re.search(r"\.adapters\.([^.]+)\.", key))}
    if found and name not in found:
        raise CheckpointError(
            f"{where}: the config's name is {name!r}, the tensors of {WEIGHTS} are of {', '.join(sorted(found))}; "
            "give both the same name"
        )


def check_head(folder: Path, model: Any) -> None:
    """Refuse a head beside the adapter that is not the base's own, since it is not loaded."""
    hint = "save the adapter without it: model.save_adapter(folder, name, with_head=False, use_safetensors=True)"
    if not (folder / HEAD).is_file():
        if (folder / "pytorch_model_head.bin").is_file():
            raise CheckpointError(f"{folder} has pytorch_model_head.bin, a head in a pickle, which is not read; {hint}")
        return
    with Tensors(folder, HEAD, CONVERT) as tensors:
        copied = heads_of(folder, model)
        for key in (k for k in tensors.shapes if not any(k.startswith(f"{path}.") for path in copied)):
            own = _head_kernel(model) if key == "lm_head.weight" else None
            if own is None or own.shape != tensors.shapes[key] or not np.array_equal(own, tensors.read(key)):
                raise CheckpointError(f"{folder}: {HEAD} has {key}, which is not the base's own; {hint}")


def _head_kernel(model: Any) -> Any:
    head = getattr(model, "lm_head", None)
    if head is None:
        return None
    return np.asarray(model.tied_kernel() if head.kernel is None else head.kernel.get_value()).T
