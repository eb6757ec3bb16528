"""How the modules of a tree are called: their path in the tree, and their names in a checkpoint or in peft.

A stacked module has one path and one name a layer: `model.layers.self_attn.q_proj` stands for
`model.layers.0.self_attn.q_proj`, `model.layers.1.self_attn.q_proj`, ...
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from .seams import SLOTS

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
LEAF_NAMES.update({leaf: leaf for leaf in ("bias", "cls_token", "position_embeddings")})


@dataclasses.dataclass(frozen=True)
class Named:
    """A module of a tree.

    Attributes:
        path: Dotted path in the tree.
        module: The module.
        names: Its dotted names in a checkpoint: one, or one for each layer of the stack that it is in.
        stacked: Whether its leaves lead with a layer axis.
    """

    path: str
    module: Any
    names: tuple[str, ...]
    stacked: bool


def dotted(path: tuple[Any, ...]) -> str:
    """Join a path of nnx, or a key path of `jax.tree_util`, with dots; a leaf's last part is its Variable.

    >>> dotted(("model", "layers", 0, "mlp"))
    'model.layers.0.mlp'
    """
    parts = [getattr(p, "name", getattr(p, "key", getattr(p, "idx", p))) for p in path]
    return ".".join(map(str, parts))


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply `(regular expression, replacement)` to a name, one after the other.

    >>> renamed("layers.3.mlp.weight", [("^layers", "encoder.layer"), ("mlp", "dense")])
    'encoder.layer.3.dense.weight'
    """
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def is_variable(x: Any) -> bool:
    """Tell whether a node of a tree is a Variable, where a walk over parameters stops."""
    return isinstance(x, nnx.Variable)


def variables(tree: Any) -> dict[str, nnx.Variable[Any]]:
    """Return the Variables of a tree by dotted path, in the tree's own order."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]
    return {dotted(path): leaf for path, leaf in flat if is_variable(leaf)}


def named_modules(model: Any) -> list[Named]:
    """Return the modules of a model, what methods have attached left out, in the order of their paths."""
    found = {path: module for path, module in nnx.iter_modules(model) if not set(SLOTS) & set(path)}
    depths = {
        path: depth for path, module in found.items() if isinstance(depth := getattr(module, "stack_depth", None), int)
    }
    out = []
    for path in sorted(found, key=dotted):
        stack = next((p for p in depths if path[: len(p)] == p), None)
        if stack is None:
            names: tuple[str, ...] = (dotted(path),)
        else:
            names = tuple(dotted((*stack, i, *path[len(stack) :])) for i in range(depths[stack]))
        out.append(Named(dotted(path), found[path], names, stack is not None))
    return out


def parameters(model: Any) -> list[tuple[Named, str, nnx.Param[Any]]]:
    """Return the base parameters of a model as (module, leaf name, Variable), what is attached left out."""
    return [
        (named, leaf, variable)
        for named in named_modules(model)
        for leaf, variable in sorted(vars(named.module).items())
        if isinstance(variable, nnx.Param)
    ]
