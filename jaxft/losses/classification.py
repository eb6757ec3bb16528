"""The loss of a head over whole rows: classes, or one number."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import BatchError
from .entropy import IGNORED, cross_entropy


def classification_loss(
    model: Any, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Predict the label of each row: `sum over rows of -log softmax(logits)[label]`, or `(output - label)^2`.

    The first for labels that are integers, the second, regression, for labels that are floats; as the classification
    heads of `transformers`, in float32.

    Args:
        model: A model with `inputs`, called as `model(**inputs, key=key)`, gives `[B, C]`; regression: C = 1.
        batch: `labels` `[B]`, and of the model's inputs those that there are. A row does not count where its label is
            -100, in regression NaN.
        key: Dropout key; None: no dropout.

    Returns:
        Summed loss (float32), number of rows that count, and for classes `accuracy`: (hits, number of rows).

    Raises:
        BatchError: No labels, labels that are not one a row, or floats for a head of several classes.

    >>> class Guess:
    ...     inputs = ("x",)
    ...     def __call__(self, x, key=None):
    ...         return x
    >>> total, rows, metrics = classification_loss(Guess(), {"x": jnp.eye(3), "labels": jnp.array([0, 2, -100])})
    >>> int(rows), [float(n) for n in metrics["accuracy"]]
    (2, [1.0, 2.0])
    """
    labels = batch.get("labels")
    if labels is None or labels.ndim != 1:
        what = "has none" if labels is None else f"has {list(labels.shape)}"
        raise BatchError(f"classification_loss needs labels [B], one for each row; the batch {what}")
    logits = model(**{name: batch[name] for name in model.inputs if name in batch}, key=key)
    if logits.ndim != 2 or len(logits) != len(labels):
        raise BatchError(
            f"classification_loss needs a head with outputs [B, C]; a {type(model).__name__} gives "
            f"{list(logits.shape)} for {len(labels)} rows: load it with labels"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return _regression(logits, labels)
    counted = labels != IGNORED
    rows = counted.sum().astype(jnp.float32)
    hits = (logits.argmax(-1) == labels) & counted
    total = cross_entropy(logits, labels, reduction="sum")
    return total, rows, {"accuracy": (hits.sum().astype(jnp.float32), rows)}


def _regression(
    outputs: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    if outputs.shape[1] != 1:
        raise BatchError(
            f"labels are {labels.dtype}, numbers to predict, but the head has {outputs.shape[1]} outputs: give "
            "integers for classes, or a head of one output"
        )
    counted = ~jnp.isnan(labels)
    outputs, labels = (jnp.where(counted, x, 0).astype(jnp.float32) for x in (outputs[:, 0], labels))
    return ((outputs - labels) ** 2).sum(), counted.sum().astype(jnp.float32), {}
