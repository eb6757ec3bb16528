"""Heads that are new: every adapter trains its own copy of them, whatever its method (peft's `modules_to_save`)."""

from typing import Any

from flax import nnx

from ..models.names import named_modules, variables
from ..models.seams import Copies, Delta


def copy_heads(model: Any, method: Any, name: str, heads: tuple[str, ...] = ()) -> None:
    """Give an adapter a copy of every new module that its method does not train whole in its place.

    Args:
        model: The model, with what the method attaches.
        method: The method.
        name: The adapter's name.
        heads: Paths of heads that it gets a copy of although they are not new (it was trained when they were).
    """
    for n in named_modules(model):
        known = any(within(n.path, head) for head in heads)
        leaves = {
            leaf: variable
            for leaf, variable in sorted(vars(n.module).items())
            if isinstance(variable, nnx.Param) and (known or variable.get_metadata("new", False))
        }
        if all(method.trains(f"{n.path}.{leaf}", variable, name) for leaf, variable in leaves.items()):
            continue
        hung = n.module.saved or {}
        copies = hung.get(name) or Copies({}, None, ())
        for leaf, variable in leaves.items():
            if not hasattr(copies, leaf):
                axes = variable.get_metadata("axes", ())
                setattr(copies, leaf, Delta(variable.get_value().astype("float32"), axes=axes))
            getattr(copies, leaf).set_metadata(head=True)
        n.module.saved = nnx.Dict({**hung, name: copies})


def drop_heads(model: Any, name: str) -> None:
    """Take an adapter's copies of heads away from a model."""
    for n in named_modules(model):
        hung = n.module.saved if getattr(n.module, "saved", None) is not None else {}
        if name not in hung:
            continue
        copies = hung[name]
        for leaf, variable in list(vars(copies).items()):
            if isinstance(variable, Delta) and variable.get_metadata("head", False):
                delattr(copies, leaf)
        if not any(isinstance(variable, Delta) for variable in vars(copies).values()):
            rest = {key: value for key, value in hung.items() if key != name}
            n.module.saved = nnx.Dict(rest) if rest else nnx.data(None)


def copied_heads(model: Any, name: str) -> tuple[str, ...]:
    """Return the paths of the heads of which an adapter has copies."""
    modules = {path.partition(f".saved.{name}.")[0] for path, v in variables(model).items() if is_copy(path, v, name)}
    return tuple(head for head in getattr(model, "heads", ()) if any(within(path, head) for path in modules))


def within(path: str, above: str) -> bool:
    """Tell whether a module is the one of another path, or stands under it."""
    return f"{path}.".startswith(f"{above}.")


def is_copy(path: str, variable: Any, name: str) -> bool:
    """Tell whether a leaf is an adapter's copy of a leaf of a head."""
    return f".saved.{name}." in path and variable.get_metadata("head", False)


def trained(model: Any, method: Any, name: str) -> dict[str, bool]:
    """Return of each leaf of an attached model, by path, whether it is trained.

    What the method says, but for heads: an adapter's copy is always trained, and what it hides never.
    """
    known = variables(model)
    copies = {path.replace(f".saved.{name}", ""): path for path, v in known.items() if is_copy(path, v, name)}
    flags = {path: path not in copies and method.trains(path, variable, name) for path, variable in known.items()}
    return {**flags, **dict.fromkeys(copies.values(), True)}
