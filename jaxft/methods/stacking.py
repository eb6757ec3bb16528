"""Which adapters do not add up where they count together."""

from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..errors import MethodError, refuse
from ..models.names import dotted, is_variable


def refuse_clashes(model: Any, names: list[str], weights: Any) -> None:
    """Refuse weights under which a leaf would be replaced twice, or changed by what was made for another value of it.

    Args:
        model: A model with adapters.
        names: Their names, in the order of the weights.
        weights: `[n]` or `[B, n]`; shapes and tracers are let pass.

    Raises:
        MethodError: Two adapters (or two parts of one) do not stack; each module is named.
    """
    if isinstance(weights, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return
    rows = np.atleast_2d(np.asarray(weights))
    together = {
        pair
        for row in rows
        for pair in combinations_with_replacement([n for n, w in zip(names, row, strict=True) if w], 2)
    }
    headline = "adapters that do not stack; let one count, with jaxft.set_adapter (None: the base alone)"
    refuse(MethodError, headline, _clashes(model, together))


def _clashes(model: Any, together: set[tuple[str, str]]) -> Iterator[str]:
    for path, module in nnx.iter_modules(model) if together else ():
        saved: Any = getattr(module, "saved", None) or {}
        delta: Any = getattr(module, "delta", None) or {}
        for one, other in sorted(together):
            if one != other and one in saved and other in saved and (both := _shared(saved[one], saved[other])):
                yield f"{one!r} and {other!r} each have a copy of {dotted(path)}.{', '.join(both)}"
            for copying, changing in dict.fromkeys([(one, other), (other, one)]):
                leaf = getattr(delta.get(changing), "reads", None)
                if copying in saved and leaf is not None and hasattr(saved[copying], leaf):
                    kind = type(delta[changing]).__name__
                    what = f"{changing!r} a {kind} that was made for the base's"
                    yield f"{copying!r} has a copy of {dotted(path)}.{leaf}, and {what}"


def _shared(one: Any, other: Any) -> list[str]:
    """Return the leaves of which both have copies, in the same layer of a stack."""
    if None not in (one.layers_held, other.layers_held) and not {*one.layers_held} & {*other.layers_held}:
        return []
    return sorted({k for k, v in vars(one).items() if is_variable(v) and k != "gate"} & set(vars(other)))
