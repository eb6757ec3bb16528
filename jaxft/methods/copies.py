"""An adapter's own trained copies of base leaves: whole modules (`modules_to_save`) and biases.

They hang beside the base, under the adapter's name, so that the base stays as it is, another adapter may bring its
own, and switching the adapter off gives the base back.
"""

from typing import Any

from ..errors import MethodError
from ..models.seams import Copies, Delta
from ..quant.leaf import is_quantized
from .linear import is_linear, kernel_shape, logical_axes, make_seams
from .matching import Target, check_names, find
from .method import hang

LEAVES = ("kernel", "bias", "scale", "embedding")


def has_leaves(module: Any) -> bool:
    """Tell whether a module has parameters of its own, or stands for tied ones."""
    return is_linear(module) or any(getattr(module, leaf, None) is not None for leaf in LEAVES)


def copy_leaves(target: Target, leaves: tuple[str, ...], name: str, tied: Any = None) -> None:
    """Give an adapter its own float32 copies of a module's leaves.

    Raises:
        MethodError: The module is a person's own and no linear layer, so nothing would read the copies; or its kernel
            is quantised.
    """
    module = target.named.module
    make_seams([module] if is_linear(module) else [])
    if not hasattr(module, "saved"):
        raise MethodError(
            f"{target.named.path} is a {type(module).__name__} of your own model, which cannot hold an adapter's copy "
            "of its parameters; only nnx.Linear can. Train it with Full, or with a filter of your own"
        )
    copies: dict[str, Delta] = {}
    lead = kernel_shape(module)[:-2] if is_linear(module) and not target.named.stacked else ()
    for leaf in leaves:
        own = getattr(module, leaf, None)
        if own is None:
            if leaf == "kernel" and is_linear(module) and tied is not None:
                copies[leaf] = Delta(tied().astype("float32"), axes=logical_axes(module))
            continue
        value, axes = own.get_value(), own.get_metadata().get("axes", ())
        if is_quantized(value):
            raise MethodError(
                f"modules_to_save: {target.named.path} has a quantised kernel, of which an adapter cannot hold a "
                "trained copy: let LoRA adapt it, or leave it whole (jaxft.quant.quantize(model, skip=[...]))"
            )
        if target.named.stacked:
            value = value if target.layers_held is None else value[list(target.layers_held),]
            lead = value.shape[:1]
        copies[leaf] = Delta(value.astype("float32"), axes=axes)
    hang(module, "saved", name, Copies(copies, target.layers_held, lead))


def saves(name: str, modules_to_save: tuple[str, ...]) -> bool:
    """Tell whether a module of this name is copied whole: by the end of its name, or of one that it is part of.

    >>> saves("classifier.dense", ("classifier",)), saves("bert.encoder.layer.0.output.dense", ("classifier",))
    (True, False)
    """
    parts = name.split(".")
    return bool(modules_to_save) and any(".".join(parts[: i + 1]).endswith(modules_to_save) for i in range(len(parts)))


def copy_modules(model: Any, modules_to_save: tuple[str, ...], name: str) -> None:
    """Give an adapter a whole copy of every module whose name ends so.

    Raises:
        SelectionError: One of the ends matches nothing.
    """
    found = find(model, lambda n: saves(n, modules_to_save), has_leaves)
    for end in modules_to_save:
        if not any(saves(n, (end,)) for target in found for n in target.names):
            check_names(model, "modules_to_save", (end,), has_leaves, "module with parameters")
    for target in found:
        copy_leaves(target, LEAVES, name, tied=getattr(model, "tied_kernel", None))
