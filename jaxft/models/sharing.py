"""Models on the arrays of a model that is there: with a head of another kind, or without dropout."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from ..errors import MethodError
from .base import Model
from .config import ModelConfig
from .hub import begin_heads, checked_labels, whole_shapes
from .seams import SLOTS


def with_head(model: Any, labels: Sequence[str]) -> Any:
    """Return the classifier that stands on the same backbone: it shares every array, and its head is new.

    What adapters have attached to the backbone stays attached. So actor, critic and reward model of RLHF hold one base.

    Args:
        model: A causal language model, with adapters or without.
        labels: Names of the classes, one for a value or a score; as of `jaxft.load`.

    Returns:
        The model that `jaxft.load(..., labels=labels)` would return, of the model's own arrays.

    Raises:
        MethodError: Only a causal language model stands on a backbone that can be shared so.

    >>> import jaxft
    >>> model = jaxft.testing.tiny_llama()
    >>> critic = with_head(model, ("value",))
    >>> critic([[3, 4]]).shape
    (1, 1)
    >>> critic.model.embed_tokens.embedding.get_value() is model.model.embed_tokens.embedding.get_value()
    True
    """
    if getattr(model, "task_type", None) != "CAUSAL_LM":
        raise MethodError(f"a {type(model).__name__} is no causal language model: a head is put on one of these")
    shared = jax.tree.map(lambda x: x, model)  # modules and Variables of its own, the same arrays
    made: Model = whole_shapes(model.config.replace(labels=checked_labels(labels)))
    setattr(made, made.prefix, shared.backbone)
    for slot in (*SLOTS, "adapter_weights"):
        if hasattr(shared, slot):
            setattr(made, slot, getattr(shared, slot))
    begin_heads(made, made.heads)
    return made


def without_dropout(model: Model) -> Any:
    """Return the model, of the same arrays, that drops nothing, neither of its own nor in the adapters that it has.

    So with a key it computes what it does without, as reward models, DPO and PPO want it. An adapter that is attached
    afterwards drops what its method asks.

    >>> import jaxft
    >>> model = without_dropout(jaxft.testing.tiny_gpt2(resid_pdrop=0.5))
    >>> bool((model([[3, 4]], key=jax.random.key(0)) == model([[3, 4]])).all())
    True
    """
    fresh = jax.tree.map(lambda x: x, model)
    rates = [f.name for f in dataclasses.fields(model.config) if "dropout" in f.name or f.name.endswith("pdrop")]
    quiet = model.config.replace(**dict.fromkeys(rates, 0.0))
    for path, module in nnx.iter_modules(fresh):
        if set(SLOTS).isdisjoint(path) and isinstance(getattr(module, "config", None), ModelConfig):
            setattr(module, "config", quiet)  # noqa: B010 - not every module has the attribute
        if hasattr(module, "rate"):
            setattr(module, "rate", 0.0)  # noqa: B010
    return fresh
