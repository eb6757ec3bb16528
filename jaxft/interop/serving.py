"""The serving export: a peft folder for engines that read only plain LoRA, of one rank and one scale."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MethodError, refuse
from ..methods.heads import trained
from ..methods.linear import is_linear
from ..methods.low_rank import LowRank
from ..methods.pissa import PiSSA
from ..models.names import named_modules, parameters
from ..models.seams import SLOTS
from ..models.stack import spread
from ..models.tensors import replacing, write_tensors
from .entries import PREFIX
from .folder import CONFIG, WEIGHTS, chosen
from .peft import common

PLAIN = (LowRank, PiSSA)


def save_serving(model_or_state: Any, folder: str | Path, *, name: str | None = None) -> Path:
    """Write a LoRA as engines read it that know only `r`, `lora_alpha`, `target_modules` and the tensors A and B.

    One rank for all (the largest; the others are padded with zeros), `lora_alpha = r` and so a scale of 1, each
    layer's own scale (alpha, rsLoRA, patterns) multiplied into its B. PiSSA is converted to the plain LoRA of rank 2r
    that it is: `A' = [A - A0, A0]`, `B' = [B; B - B0]`. Modules whose last name is a target's and that have no adapter
    get zeros. peft reads the folder too.

    Args:
        model_or_state: A `TrainState`, or a model that carries the adapter.
        folder: Where to; made if it is not there.
        name: The adapter's name; by default the state's, or "default".

    Returns:
        The folder.

    Raises:
        MethodError: There is no such adapter, or part of it is no low-rank product beside a linear layer (DoRA, copies
            of modules or biases, embeddings, token rows, IA3) or beside several under one name:
            each place is named. Or the model has shapes for arrays.

    >>> import jaxft, json, tempfile
    >>> model = jaxft.attach(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2, alpha=8, rank_pattern={"v_proj": 4}))
    >>> folder = jaxft.save_serving(model, tempfile.mkdtemp())
    >>> config = json.loads((folder / "adapter_config.json").read_text())
    >>> config["r"], config["lora_alpha"], config["target_modules"]
    (4, 4, ['q_proj', 'v_proj'])
    """
    model, name, method = chosen(model_or_state, name)
    modules, found = named_modules(model), dict[str, LowRank]()
    flags = trained(model, method, name)
    base = [f"{n.path}.{leaf}" for n, leaf, _ in parameters(model)]
    problems = [f"{path} of the base is trained" for path in base if flags[path]]
    for n in modules:
        for slot in SLOTS:
            hung = (getattr(n.module, slot, None) or {}).get(name)
            if isinstance(hung, LowRank) and not n.stacked and hung.a.get_value().ndim > 2:
                problems.append(f"{n.path} is several layers of your own model under one name")
            elif type(hung) in PLAIN:
                found[n.path] = spread(hung, len(n.names))
            elif hung is not None:
                problems.append(f"{n.path} has a {type(hung).__name__} in its slot `{slot}`")
    headline = f"a plain LoRA cannot express the adapter {name!r}; jaxft.save_model(jaxft.merge(model)) can"
    refuse(MethodError, headline, problems)
    targets = sorted({path.rsplit(".", 1)[-1] for path in found})
    r = max(delta.factors()[0].shape[-1] for delta in found.values())
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for n in modules:
        if is_linear(n.module) and n.path.rsplit(".", 1)[-1] in targets:
            for i, module in enumerate(n.names):
                a, b = _padded(found.get(n.path), n.module, i if n.stacked else None, r)
                tensors[f"{PREFIX}{module}.lora_A.weight"] = a
                tensors[f"{PREFIX}{module}.lora_B.weight"] = b
    config = {
        **common("LORA", model),
        "bias": "none",
        "fan_in_fan_out": not all(getattr(n.module, "transposed", True) for n in modules if n.path in found),
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": r,
        "target_modules": targets,
        "use_dora": False,
        "use_rslora": False,
    }
    with replacing(Path(folder)) as scratch:
        write_tensors(scratch / WEIGHTS, tensors)
        (scratch / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def _padded(delta: LowRank | None, module: Any, index: int | None, r: int) -> tuple[Any, Any]:
    """Return A `(r, in)` and B `(out, r)` of one layer, the scale in B; zeros where there is no delta."""
    whole_a = np.zeros((r, module.in_features), np.float32)
    whole_b = np.zeros((module.out_features, r), np.float32)
    if delta is not None:
        a, b, gate = (np.asarray(x if index is None else x[index]) for x in delta.factors())
        live = gate != 0
        whole_a[: a.shape[1]] = (a * live).T
        whole_b[:, : b.shape[0]] = (gate[:, None] * b).T
    return whole_a, whole_b
