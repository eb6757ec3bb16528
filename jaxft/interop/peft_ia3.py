"""`adapter_config.json` of peft's IA3: written from our options, and read back into them."""

from collections.abc import Mapping
from typing import Any

from ..methods.ia3 import IA3
from ..methods.matching import ALL_LINEAR

READ = {
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "modules_to_save",
    "init_ia3_weights",  # the tensors come in their place
}


def config_of(method: IA3, model: Any) -> dict[str, Any]:
    """Return the keys of `adapter_config.json` that say in peft's words what the method scales in this model.

    Of two lists peft wants the feed-forward modules to be among the targets by the letter; where they are not, both
    are written as whole names.
    """
    targets = method.targets(model)
    wanted, inputs = method.resolved_targets(model)
    plain = isinstance(wanted, tuple) and isinstance(inputs, tuple)
    if wanted == ALL_LINEAR or (plain and not set(inputs or ()) <= set(wanted or ())):
        wanted = tuple(name for target, _ in targets for name in target.names)
        inputs = tuple(name for target, at_input in targets if at_input for name in target.names)
    return {
        "exclude_modules": method.exclude_modules,
        "fan_in_fan_out": not all(getattr(target.named.module, "transposed", True) for target, _ in targets),
        "feedforward_modules": inputs,
        "init_ia3_weights": True,
        "modules_to_save": list(method.modules_to_save) or None,
        "target_modules": wanted,
    }


def method_of(config: Mapping[str, Any], where: str) -> IA3:
    """Return the method that a config of peft's, whose keys are all known, describes."""
    del where
    return IA3(
        target_modules=config["target_modules"],
        feedforward_modules=config["feedforward_modules"],
        exclude_modules=config.get("exclude_modules") or None,
        modules_to_save=config.get("modules_to_save") or (),
    )
