"""`adapter_config.json` of peft's LoRA: written from our options, and read back into them."""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..methods.lora import LoRA, takes_product
from ..methods.matching import ALL_LINEAR, Names, find, named
from ..methods.options import PISSA
from ..methods.tokens import by_name

READ = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "trainable_token_indices",
    "bias",
    "modules_to_save",
    "init_lora_weights",
}
NAMED = ("gaussian", PISSA)  # initialisations that are called the same here; the SVD of PiSSA is done again at loading
BASE_KEPT = (True, False, None, "orthogonal", *NAMED)  # initialisations that leave the base as it is, or are done again


def config_of(method: LoRA, model: Any) -> dict[str, Any]:
    """Return the `adapter_config.json` that says in peft's words what the method adapts in this model."""
    layers = [n.module for n in (t.named for t in method.targets(model))]
    wanted = method.target_modules
    if wanted is None or wanted == ALL_LINEAR:
        wanted = shortest(model, method.resolved_targets(model))
    return {
        "alpha_pattern": dict(method.alpha_pattern),
        "bias": method.bias,
        "exclude_modules": method.exclude_modules,
        "fan_in_fan_out": not all(getattr(layer, "transposed", True) for layer in layers),
        "init_lora_weights": method.init if method.init in NAMED else True,
        "layers_pattern": method.layers_pattern,
        "layers_to_transform": method.layers,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "modules_to_save": list(method.modules_to_save) or None,
        "r": method.r,
        "rank_pattern": dict(method.rank_pattern),
        "target_modules": wanted,
        "trainable_token_indices": _tokens(method),
        "use_dora": method.use_dora,
        "use_rslora": method.use_rslora,
    }


def shortest(model: Any, names: Names) -> Names:
    """Return the last parts of full module names, if they mean the same modules, else the names themselves."""
    if not isinstance(names, tuple):
        return names
    short = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))

    def meant(wanted: Names) -> list[tuple[str, ...]]:
        return [t.names for t in find(model, lambda name: named(name, wanted), takes_product)]

    return short if meant(short) == meant(names) else names


def method_of(config: Mapping[str, Any], where: str) -> LoRA:
    """Return the method that a config of peft's, whose keys are all known, describes.

    Raises:
        CheckpointError: An initialisation that changed the base.
    """
    init = config.get("init_lora_weights")
    if not any(init is known or init == known for known in BASE_KEPT):
        raise CheckpointError(
            f"{where}: init_lora_weights={init!r} changed the base model when the adapter was made, so its tensors "
            "alone are not the adapter; save it again in peft with path_initial_model_for_weight_conversion"
        )
    return LoRA(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        target_modules=config["target_modules"],
        exclude_modules=config.get("exclude_modules") or None,
        layers=_layers(config.get("layers_to_transform")),
        layers_pattern=config.get("layers_pattern") or None,
        rank_pattern=config.get("rank_pattern") or (),
        alpha_pattern=config.get("alpha_pattern") or (),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        trainable_tokens=config.get("trainable_token_indices"),
        bias=config.get("bias") or "none",
        modules_to_save=config.get("modules_to_save") or (),
        init=init if init in NAMED else "default",
    )


def _tokens(method: LoRA) -> Any:
    """Return the ids of the input embedding's own rows, or `{module: ids}`."""
    ids = {module: list(ids) for module, ids in by_name(method.trainable_tokens).items()}
    return ids.get(None, ids) or None


def _layers(value: Any) -> Any:
    return None if value is None or value == [] else value
