"""A new adapter that is the plain mean of others that a model carries."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import MethodError, nearest, refuse
from ..models.names import variables
from ..models.placement import place
from ..models.seams import SLOTS, Delta
from .method import Method, adapters, attach, owner
from .partition import held_layers
from .switch import all_off, set_adapter


def average_adapters(model: Any, names: Sequence[str], *, name: str) -> Any:
    """Return a new model that also carries the mean of several adapters' parameters: `(1 / n) sum_i theta_i`.

    Of any method, if all have the same structure. Of low-rank factors this is the mean of the factors, not of their
    products. (`adapters` 1.3.0 divides by n twice in `Average`; this is the mean.)

    Args:
        model: A model that carries the adapters.
        names: Which of them, at least one.
        name: Of the new adapter. It waits for `set_adapter`; what the model computes does not change.

    Returns:
        The new model; the given one stays as it is.

    Raises:
        MethodError: A name that no adapter has or that is taken, or adapters of unequal structure: each leaf is named.

    >>> import jaxft
    >>> model = jaxft.attach(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2), name="a")
    >>> model = jaxft.attach(model, jaxft.LoRA(r=2), name="b", seed=1)
    >>> sorted(jaxft.adapters(jaxft.average_adapters(model, ["a", "b"], name="c")))
    ['a', 'b', 'c']
    """
    meant = carried(model, names, name)
    leaves = {given: _leaves(model, given) for given in meant}
    (first, like), *others = leaves.items()
    problems = [what for given, own in others for what in _differences(first, like, given, own)]
    holds = {given: _renamed(held_layers(model, given), given) for given in meant}
    other = [given for given in holds if holds[given] != holds[first]]
    problems += [f"{given!r} is for other layers or ranks than {first!r}" for given in other]
    refuse(MethodError, "adapters of unequal structure have no mean", problems)
    fresh = attach(all_off(model), meant[first], name=name)
    for place_, variable in _leaves(fresh, name).items():
        values = [own[place_].get_value() for own in leaves.values()]
        variable.set_value(sum(values) / len(values) if isinstance(variable, Delta) else values[0])
    return waiting(place(fresh), model)


def carried(model: Any, names: Iterable[str], new: str) -> dict[str, Method]:
    """Return the methods of the adapters that are meant."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise MethodError(f"names={names!r}: give a list of names of adapters")
    known, names = adapters(model), list(names)
    if not names:
        raise MethodError("name at least one adapter to combine")
    for given in names:
        if names.count(given) > 1:
            raise MethodError(f"{given!r} stands there more than once: name each adapter once")
        if not isinstance(given, str) or given not in known:
            raise MethodError(f"no adapter {given!r}; {nearest(str(given), known) if known else 'the model has none'}")
    if new in known:
        raise MethodError(f"the model already has an adapter {new!r}: give the new one another name")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        raise MethodError("this model has shapes for arrays (abstract=True): load it whole to combine its adapters")
    return {given: known[given] for given in names}


def _leaves(model: Any, name: str) -> dict[str, Any]:
    """Return what hangs under an adapter's name, by path without the name."""
    return _renamed({path: v for path, v in variables(model).items() if owner(path) == name}, name)


def _renamed(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Put * for an adapter's name in paths: the part after a slot."""
    out = {}
    for path, value in found.items():
        parts = path.split(".")
        at = next(i for i, part in enumerate(parts) if part == name and parts[i - 1] in SLOTS)
        out[".".join([*parts[:at], "*", *parts[at + 1 :]])] = value
    return out


def _differences(first: str, like: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> Iterable[str]:
    for path in sorted({*like, *own}):
        if (path in like) != (path in own):
            yield f"{path} is only in {(first if path in like else name)!r}"
            continue
        mine, theirs = own[path].get_value(), like[path].get_value()
        if mine.shape != theirs.shape:
            yield f"{path} is {theirs.shape} in {first!r}, {mine.shape} in {name!r}"
        elif not isinstance(own[path], Delta) and not bool((mine == theirs).all()):
            yield f"{path}, which is not trained (a scale), differs between {first!r} and {name!r}"


def waiting(fresh: Any, model: Any) -> Any:
    """Give the new adapter weight 0, and the others what they had."""
    old = model.adapter_weights.get_value()
    return set_adapter(fresh, jnp.concatenate([old, jnp.zeros((*old.shape[:-1], 1))], -1))
