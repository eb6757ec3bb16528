"""Which modules a method means: names, regular expressions and patterns, matched as peft matches them, but loudly."""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import MethodError, SelectionError, nearest
from ..models.names import Named, named_modules
from .linear import all_linear, is_new, of_head

log = logging.getLogger("jaxft")

ALL_LINEAR = "all-linear"
Names = str | tuple[str, ...] | None


def frozen_names(value: Any) -> Names:
    """Return a selection as it is kept in a (hashable) method: a regular expression, or a tuple of names."""
    if value is None or isinstance(value, str):
        return value
    return tuple(value) if isinstance(value, Iterable) else (value,)


def frozen_ends(value: Any) -> tuple[str, ...]:
    """Return ends of names as they are kept in a method: a text is one of them."""
    ends = frozen_names(value or ())
    return (ends,) if isinstance(ends, str) else ends or ()


def pattern_error(pattern: Any) -> str | None:
    """Return what is wrong with a regular expression, None where nothing is."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        return str(error)
    return None


def frozen_pattern(value: Mapping[str, Any] | Iterable[tuple[str, Any]] | None) -> tuple[tuple[str, Any], ...]:
    """Return a pattern `{regular expression: number}` as pairs, in the order given: the first that matches wins."""
    if value is None:
        return ()
    given: Any = value.items() if isinstance(value, Mapping) else value
    pairs = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise MethodError(f"pattern {value!r}: give a dict of regular expressions and numbers")
    return tuple((key, number) for key, number in pairs)


def named(name: str, names: Names) -> bool:
    """Tell whether a dotted module name is meant: by its last parts, or by a regular expression for all of it.

    >>> named("model.layers.0.self_attn.q_proj", ("q_proj",)), named("model.norm_q_proj", ("q_proj",))
    (True, False)
    >>> named("model.layers.0.self_attn.q_proj", r".*[01].*q_proj")
    True
    """
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == n or name.endswith(f".{n}") for n in names)


def by_pattern(name: str, pattern: tuple[tuple[str, Any], ...], default: Any) -> Any:
    """Return the value of the first key that matches the end of a dotted module name, else the default.

    >>> by_pattern("model.layers.1.self_attn.q_proj", (("layers.1.self_attn.q_proj", 2), ("q_proj", 4)), 8)
    2
    """
    return next((value for key, value in pattern if re.match(rf"(.*\.)?({key})$", name)), default)


def layer_index(name: str, container: Names = None) -> int | None:
    """Return the first index in a dotted name (after one of the containers, where given), None where there is none.

    >>> layer_index("model.layers.3.mlp.up_proj"), layer_index("lm_head")
    (3, None)
    """
    containers = (container,) if isinstance(container, str) else container or (r"[^.]*",)
    for c in containers:
        found = re.match(rf"(?:^|.*?\.){c}\.(?P<idx>\d+)\.", name)
        if found:
            return int(found["idx"])
    return None


@dataclasses.dataclass(frozen=True)
class Target:
    """One module of the tree that is meant, in some or all of its layers.

    Attributes:
        named: The module.
        picks: Places in `named.names` that are meant.
    """

    named: Named
    picks: tuple[int, ...]

    @property
    def layers_held(self) -> tuple[int, ...] | None:
        """The layers that are meant, None for all of them or outside a stack."""
        return None if len(self.picks) == len(self.named.names) else self.picks

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are meant."""
        return tuple(self.named.names[i] for i in self.picks)


def anything(module: Any) -> bool:
    """Accept every kind of module."""
    del module
    return True


def outside_heads(model: Any, kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return the same kinds of modules without those of a head that is copied whole: a new one, and as in peft that of
    every classifier of texts.
    """
    always = getattr(model, "task_type", None) == "SEQ_CLS"
    apart = {id(n.module) for n in named_modules(model) if of_head(model, n) and (always or is_new(n.module))}
    return lambda module: kinds(module) and id(module) not in apart


def find(model: Any, accept: Callable[[str], bool], kinds: Callable[[Any], bool] = anything) -> list[Target]:
    """Return the modules of the kinds wanted of which `accept(name)` holds for at least one layer."""
    found = []
    for n in named_modules(model):
        picks = tuple(i for i, name in enumerate(n.names) if kinds(n.module) and accept(name))
        if picks:
            found.append(Target(n, picks))
    return found


def check_names(model: Any, option: str, names: Names, kinds: Callable[[Any], bool], kind: str) -> None:
    """Refuse a selection of which some part matches no module of the kinds wanted, naming the nearest."""
    if names is None:
        return
    known = [name for n in named_modules(model) if kinds(n.module) for name in n.names]
    shorts = {name.rsplit(".", 1)[-1] for name in known}
    if isinstance(names, str) and (error := pattern_error(names)) is not None:
        raise MethodError(f"{option}={names!r} is not a regular expression: {error}")
    for one in (names,) if isinstance(names, str) else names:
        if not any(named(name, names if isinstance(names, str) else (one,)) for name in known):
            raise SelectionError(f"{option}={one!r} matches no {kind} of this model; {nearest(one, shorts)}")


def check_pattern(option: str, pattern: tuple[tuple[str, Any], ...], names: list[str]) -> None:
    """Refuse a pattern with a key that matches none of the adapted modules."""
    for key, _ in pattern:
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            shorts = {name.rsplit(".", 1)[-1] for name in names}
            raise SelectionError(f"{option} key {key!r} matches no module that is adapted; {nearest(key, shorts)}")


def resolved(model: Any, wanted: Names, default: tuple[str, ...] | None, method: str) -> Names:
    """Return a selection as names or a regular expression, with None (the default) and "all-linear" worked out.

    Args:
        model: The model.
        wanted: What was asked for.
        default: What None means; where that is None too, every linear layer.
        method: The method's name, for the message.

    Raises:
        MethodError: The model has no linear layer.
    """
    if wanted is not None and wanted != ALL_LINEAR:
        return wanted
    if wanted is None and default is not None:
        return tuple(default)
    names = {name for n in all_linear(model, named_modules(model)) for name in n.names}
    if not names:
        raise MethodError(f"{method}: this {type(model).__name__} has no linear layer (nnx.Linear) to adapt")
    return tuple(sorted(names))
