"""The partition: one model as two parts, trained and frozen, and as a mask; usable alone, without our step.

Both parts are the model's own tree, with holes (None) where the other part's leaves are. They are pytrees that
`jax.grad`, optax and `combine` take as they are.
"""

import re
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax import nnx

from ..errors import MethodError, PartitionError, SelectionError, nearest, refuse
from ..models.names import LEAF_NAMES, dotted, is_variable, named_modules, variables
from ..quant.leaf import is_quantized
from .heads import copied_heads, copy_heads, drop_heads, is_copy, trained
from .method import Method, adapters, attach, detach, parts_of, register
from .switch import all_off


def attached(model: Any, method: Method | None, *, name: str = "default", seed: int = 0) -> Any:
    """Return the model with the adapter of this name: attached now, or as it already hangs there.

    Args:
        model: A model, with or without the adapter.
        method: What to attach. If the adapter is there already it keeps its values, and the method must describe it;
            None takes the method that it was attached with.
        name: The adapter's name.
        seed: Of its initial values.

    Raises:
        MethodError: The adapter that is there is not the one that the method describes.
    """
    there = adapters(model).get(name)
    if there is None:
        if method is None:
            has = sorted(adapters(model)) or "none"
            raise MethodError(f"no method given, and the model carries no adapter {name!r}; it has {has}")
        return attach(model, method, name=name, seed=seed)
    if method is None or method == there:
        return model
    return _readopt(model, method, name)


def _readopt(model: Any, method: Method, name: str) -> Any:
    """Attach afresh and keep the values that hang there, if they are of the same places, shapes and scales."""
    fresh = attach(all_off(detach(model, name)), method, name=name)
    copied = copied_heads(model, name)
    if copied:
        copy_heads(fresh, method, name, copied)
    else:
        drop_heads(fresh, name)  # it was trained without a head
    if name not in adapters(fresh):
        register(fresh, name, method)
    old, new = variables(model), variables(fresh)
    theirs = {path for path in (*old, *new) if f".{name}." in path}
    wrong = [f"{path} is only in one of the two" for path in sorted(theirs) if (path in old) != (path in new)]
    for path in sorted(theirs & set(old) & set(new)):
        have, want = old[path].get_value(), new[path].get_value()
        if have.shape != want.shape:
            wrong.append(f"{path} is {have.shape}, the method makes {want.shape}")
        elif path.endswith(".gate") and not bool((have == want).all()):
            wrong.append(f"{path}: the adapter's scale is not the method's (r, alpha or use_rslora differ)")
        else:
            new[path].set_value(have)
    held, holds = held_layers(model, name), held_layers(fresh, name)
    for path in sorted(set(held) & set(holds)):
        for what, one in held[path].items():
            if one != (other := holds[path][what]):
                wrong.append(f"{path}: {what} {one}, the method's {other}")
    headline = f"the model already carries an adapter {name!r} that {type(method).__name__} does not describe"
    refuse(MethodError, f"{headline}; give its own options, no method (None), or another name", wrong)
    if getattr(model, "adapter_weights", None) is not None:  # in the order that they had
        known, weights = adapters(fresh), model.adapter_weights.get_value()
        order = tuple((one, known[one]) for one in adapters(model))
        for path, variable in variables(fresh).items():
            if path.rsplit(".", 1)[-1] == "adapter_weights":
                variable.set_value(jax.numpy.broadcast_to(weights, variable.get_value().shape))
                variable.set_metadata(adapters=order)
    return fresh


def held_layers(model: Any, name: str) -> dict[str, dict[str, Any]]:
    """Return, by path, of what kind each thing is that an adapter hangs up, for which layers, and what it computes."""
    return {
        dotted(path): {
            "layers": module.layers_held,
            **{what: getattr(module, what, None) for what in ("ranks", "tokens", "computes")},
            "the class": type(module).__name__,
        }
        for path, module in nnx.iter_modules(model)
        if hasattr(module, "layers_held") and path[-1] == name
    }


def _flags(model: Any, method: Method, name: str) -> dict[str, bool]:
    flags = trained(model, method, name)
    hidden = [p for p, on in flags.items() if on and ".saved." in p and flags.get(re.sub(r"\.saved\.\w+", "", p))]
    normed = [re.sub(r"\.delta\.\w+\.norm$", ".kernel", p) for p in flags if re.search(r"\.delta\.\w+\.norm$", p)]
    normed = [p if p in flags else _tied(model) for p in normed]  # a tied head's kernel is the table
    refuse(
        MethodError,
        "parts of a method that do not add up",
        [f"one trains a leaf of the base, another a copy that hides it: {p}" for p in hidden]
        + [f"one trains a kernel of the base, of which a DoRA has the norm: {p}" for p in normed if flags.get(p)],
    )
    known = variables(model)
    copies = {p.replace(f".saved.{one}", "") for one in adapters(model) for p, v in known.items() if is_copy(p, v, one)}
    idle = [p for p, v in known.items() if v.get_metadata("new", False) and not flags[p] and p not in copies]
    refuse(
        MethodError,
        f"the head is new, and the adapter {name!r} has no copy of it to train: attach a new adapter over it",
        [f"{p} would stay random" for p in idle],
    )
    parts = " | ".join(type(part).__name__ for part in parts_of(method))
    refuse(
        MethodError,
        f"{parts} would train quantised kernels, whose codes have no gradient: train an adapter beside them "
        "(jaxft.LoRA), or a base that is not quantised",
        [
            f"{p} is a {type(v.get_value()).__name__}"
            for p, v in known.items()
            if flags[p] and is_quantized(v.get_value())
        ],
    )
    if not any(flags.values()):
        raise SelectionError(f"{type(method).__name__} trains no leaf of this {type(model).__name__}")
    return flags


def _tied(model: Any) -> str:
    table = model.backbone.input_embedding().embedding
    return next(path for path, variable in variables(model).items() if variable is table)


def trainable_mask(model: Any, method: Method | None, *, name: str = "default", seed: int = 0) -> Any:
    """Return a pytree of booleans with the structure of the attached model, as `optax.masked` takes it.

    `optax.masked` hands the gradients of masked-out leaves on as they are, so pair it with `set_to_zero`:
    `optax.multi_transform({True: tx, False: optax.set_to_zero()}, lambda params: mask)`. (The lambda, since the mask
    has the model's own type, and optax takes labels that can be called for a function.)

    Args:
        model: A model; the method is attached where the name is not there yet.
        method: What decides; None: what the adapter that is there was attached with.
        name: The adapter's name.
        seed: Of the adapter's initial values, as in `attach`.

    >>> import jax, jaxft
    >>> mask = jaxft.trainable_mask(jaxft.testing.tiny_gpt2(), jaxft.BitFit())
    >>> sum(jax.tree.leaves(mask)), len(jax.tree.leaves(mask))
    (7, 16)
    """
    model = attached(model, method, name=name, seed=seed)
    flags = _flags(model, method or adapters(model)[name], name)
    return _map(lambda path, variable: jax.tree.map(lambda _: flags[path], variable), model)


def partition(model: Any, method: Method | None, *, name: str = "default", seed: int = 0) -> tuple[Any, Any]:
    """Return the two parts (trainable, frozen) of the attached model: disjoint and complete.

    Args:
        model: A model; the method is attached where the name is not there yet.
        method: What decides; None: what the adapter that is there was attached with.
        name: The adapter's name.
        seed: Of the adapter's initial values, as in `attach`.

    Returns:
        Two trees of the model's own type; `combine` puts them together again.

    >>> import jaxft
    >>> trainable, frozen = jaxft.partition(jaxft.testing.tiny_llama(), jaxft.LoRA(target_modules=["q_proj"], r=2))
    >>> list(jaxft.leaves(trainable))
    ['model.layers.self_attn.q_proj.delta.default.a', 'model.layers.self_attn.q_proj.delta.default.b']
    """
    model = attached(model, method, name=name, seed=seed)
    flags = _flags(model, method or adapters(model)[name], name)

    def part(wanted: bool) -> Any:
        return _map(lambda path, v: v if flags[path] is wanted else v.replace(None), model)

    return part(True), part(False)


def combine(trainable: Any, frozen: Any) -> Any:
    """Put two parts together: the inverse of `partition`; the result is a model that can be called.

    Raises:
        PartitionError: A leaf is in both parts or in neither, or the parts are not of one model; each path is named.

    >>> import jaxft
    >>> model = jaxft.testing.tiny_gpt2()
    >>> whole = jaxft.combine(*jaxft.partition(model, jaxft.BitFit()))
    >>> bool((whole([[1, 2]]) == model([[1, 2]])).all())
    True
    """
    problems = []

    def pick(path: tuple[Any, ...], kept: Any, trained: Any) -> Any:
        a, b = kept.get_value() is not None, trained.get_value() is not None
        if a is b:
            problems.append(f"{dotted(path)} is in {'both parts' if a else 'neither part'}")
        return trained if b else kept

    try:
        model = jax.tree_util.tree_map_with_path(pick, frozen, trainable, is_leaf=is_variable)
    except (ValueError, AttributeError, TypeError):
        raise PartitionError("the two parts are not of one model: " + _difference(trainable, frozen)) from None
    refuse(PartitionError, "two parts that do not make a model", problems)
    return model


def _difference(trainable: Any, frozen: Any) -> str:
    a, b = set(variables(trainable)), set(variables(frozen))
    odd = sorted(a ^ b)
    shown = ", ".join(odd[:5]) or f"{type(trainable).__name__} and {type(frozen).__name__} with other options"
    return f"{shown} (of {len(odd)} leaves that only one of them knows)" if odd else shown


def _map(f: Any, model: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, v: f(dotted(path), v), model, is_leaf=is_variable)


def leaves(part: Any) -> dict[str, Any]:
    """Return the values that a part (or a whole model) holds, by dotted path.

    >>> import jaxft
    >>> jaxft.leaves(jaxft.testing.tiny_llama())["model.layers.self_attn.q_proj.kernel"].shape
    (2, 32, 32)
    """
    return {path: v.get_value() for path, v in variables(part).items() if v.get_value() is not None}


def select(model: Any, *wanted: str | re.Pattern[str] | type) -> list[str]:
    """Return the paths of the leaves that are meant, in the model's order.

    Args:
        model: A model.
        wanted: Each a glob for the path of a leaf or of a module above it (`"*.self_attn.[qv]_proj"`; the stacked
            layers are one place, an index stands for all of them), a compiled regular expression that is searched in
            the leaf's path, or a type of Variable.

    Raises:
        SelectionError: One of them selects nothing; the nearest names are listed.

    >>> import jaxft
    >>> jaxft.select(jaxft.testing.tiny_llama(), "*.self_attn.[qv]_proj")
    ['model.layers.self_attn.q_proj.kernel', 'model.layers.self_attn.v_proj.kernel']
    """
    known = variables(model)
    aliases: dict[str, set[str]] = {path: {path, *_above(path)} for path in known}
    for n in named_modules(model):
        for leaf, variable in vars(n.module).items():
            if is_variable(variable):
                names = {*n.names, *(f"{name}.{LEAF_NAMES.get(leaf, leaf)}" for name in n.names)}
                aliases.get(f"{n.path}.{leaf}", set()).update(names)

    def means(one: Any, path: str) -> bool:
        if isinstance(one, re.Pattern):
            return one.search(path) is not None
        if isinstance(one, str):
            return any(fnmatchcase(alias, one) for alias in aliases[path])
        return isinstance(known[path], one)

    for one in wanted:
        if not any(means(one, path) for path in known):
            parts = {part for path in known for part in path.split(".")}
            hint = nearest(str(one).rsplit(".", 1)[-1], parts) if isinstance(one, str) else nearest(str(one), known)
            raise SelectionError(f"{one!r} selects no leaf of this {type(model).__name__}; {hint}")
    return [path for path in known if any(means(one, path) for one in wanted)]


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
