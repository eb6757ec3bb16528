"""How much each named adapter counts: switching, stacking, weighting, disabling are values; nothing recompiles."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import MethodError, nearest
from ..models.names import is_variable
from ..models.placement import beside
from ..models.seams import AdapterWeights
from .method import adapters
from .stacking import refuse_clashes

Weights = str | Mapping[str, float] | jax.Array | np.ndarray[Any, Any] | list[Any] | None


def set_adapter(model: Any, weights: Weights) -> Any:
    """Return the model with other weights on its adapters; the arrays are shared, the given one stays as it is.

    In a table of positions (GPT-2), those that prefixes and prompts shift by stay kept while they are off.

    Args:
        model: A model with adapters, a part of one, or a `TrainState`.
        weights: A name (that one alone), `{name: weight}` (the others 0), an array `[n]` in the order in which they
            were attached, `[B, n]` for a batch whose rows use different adapters, or None: the base alone.

    Raises:
        MethodError: A name that no adapter has, an array of another shape, or adapters that count for the same row
            and do not add up: two copies of one leaf, or a copy and what was made for the base's (DoRA, token rows).

    >>> import jaxft
    >>> model = jaxft.attach(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2), name="a")
    >>> model = jaxft.attach(model, jaxft.LoRA(r=4), name="b")
    >>> jaxft.set_adapter(model, {"a": 0.5}).adapter_weights.get_value().tolist()
    [0.5, 0.0]
    """
    holder = model.frozen if hasattr(model, "frozen") else model
    names = list(adapters(holder))
    if not names:
        raise MethodError("this model carries no adapter; jaxft.attach or jaxft.load_adapter gives it one")
    value = as_array(weights, names)
    refuse_clashes(holder, names, value)

    def change(variable: Any) -> Any:
        if not isinstance(variable, AdapterWeights) or variable.get_value() is None:
            return variable
        lead = variable.get_value().shape[: -old.ndim]
        return variable.replace(beside(jnp.broadcast_to(value, (*lead, *value.shape)), variable.get_value()))

    old = holder.adapter_weights.get_value()
    return jax.tree.map(change, model, is_leaf=is_variable)


def all_off(model: Any) -> Any:
    """Return the model with no adapter that counts, if it has any."""
    return set_adapter(model, None) if adapters(model) else model


def as_array(weights: Weights, names: list[str]) -> jax.Array:
    """Return the weights of the named adapters as `[n]` or `[B, n]`, float32."""
    if weights is None:
        return jnp.zeros(len(names))
    if isinstance(weights, str):
        weights = {weights: 1.0}
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                raise MethodError(f"no adapter {name!r}; {nearest(str(name), names)}")
        weights = [weights.get(name, 0) for name in names]
    try:
        value = jnp.asarray(weights, jnp.float32)
    except (TypeError, ValueError):
        raise MethodError(f"adapter weights {weights!r}: give numbers") from None
    if not isinstance(value, jax.core.Tracer) and not bool(jnp.isfinite(value).all()):
        raise MethodError(f"adapter weights {weights!r}: give finite numbers")
    if value.ndim not in (1, 2) or value.shape[-1] != len(names):
        raise MethodError(f"adapter weights {value.shape}: give [{len(names)}] or [rows, {len(names)}], for {names}")
    return value
