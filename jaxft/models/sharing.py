"""One backbone, several models: a head of another kind on the arrays of a model that is there."""

from collections.abc import Sequence
from typing import Any

import jax

from ..errors import MethodError
from .base import Model
from .hub import abstract_model, begin_heads, checked_labels
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
    made: Model = abstract_model(model.config.replace(labels=checked_labels(labels)))
    setattr(made, made.prefix, shared.backbone)
    for slot in (*SLOTS, "adapter_weights"):
        if hasattr(shared, slot):
            setattr(made, slot, getattr(shared, slot))
    begin_heads(made, made.heads)
    return made
