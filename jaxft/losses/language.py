"""Losses of language modelling. Shapes: B rows, T positions, V tokens of the vocabulary, D model width."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import BatchError

IGNORED = -100  # the label of a token that is not trained, as in transformers


def cross_entropy(logits: jax.Array, labels: jax.Array, *, reduction: str = "mean") -> jax.Array:
    """Return `-log softmax(logits)[label]`, over the labels that are not -100.

    Args:
        logits: `[..., V]`, any float dtype; computed in float32. What stands at ignored labels, NaN included,
            changes neither value nor gradient.
        labels: `[...]` int; -100 is not trained. Not shifted: label t belongs to logits t.
        reduction: `"mean"` over the trained labels (0 where there are none), `"sum"`, or `"none"`: `[...]`, zeros at
            ignored labels.

    Returns:
        A float32 scalar, or `[...]` with `reduction="none"`; in nats.

    >>> f"{cross_entropy(jnp.zeros((2, 4)), jnp.array([1, -100])):.4f}"  # log 4
    '1.3863'
    """
    trained = labels != IGNORED
    logits = jnp.where(trained[..., None], logits, 0).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.where(trained, labels, 0)[..., None], -1)[..., 0]
    loss = jnp.where(trained, jax.nn.logsumexp(logits, -1) - picked, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / jnp.maximum(trained.sum(), 1)


def next_token_loss(
    model: Any, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Predict each token from those before it: `sum over t of -log p(x_t | x_<t)`, where label t is not -100.

    The model loss of instruction tuning and of plain language modelling, as `transformers` computes it.

    Args:
        model: A model with `hidden` and `head`.
        batch: `input_ids` and `labels` (unshifted, -100 = not trained), both `[B, T]`; optionally `attention_mask`,
            `position_ids`, `segment_ids`. Padding predicts nothing and is not predicted, whatever its label says
            (transformers looks at the label alone), and nothing is predicted across a border of segments.
        key: Dropout key; None: no dropout.

    Returns:
        Summed loss (float32), number of trained tokens, and no further metrics.

    >>> import jaxft
    >>> ids = jnp.array([[5, 6, 7, 8]])
    >>> total, tokens, _ = next_token_loss(jaxft.testing.tiny_llama(), {"input_ids": ids, "labels": ids})
    >>> int(tokens), bool(total > 0)
    (3, True)
    """
    absent = [name for name in ("input_ids", "labels") if name not in batch]
    if absent:
        raise BatchError(f"next_token_loss needs input_ids and labels [B, T]; the batch lacks {' and '.join(absent)}")
    inputs = {name: batch[name] for name in ("attention_mask", "position_ids", "segment_ids") if name in batch}
    hidden = model.hidden(batch["input_ids"], **inputs, key=key)[:, :-1]
    labels = jnp.where(predicted(batch), batch["labels"][:, 1:], IGNORED)
    total = cross_entropy(model.head(hidden, key=key), labels, reduction="sum")
    return total, jnp.sum(labels != IGNORED).astype(jnp.float32), {}


def predicted(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return `[B, T - 1]` bool: whether token t + 1 is predicted from t, both real and of one segment."""
    pairs = jnp.ones((1, batch["input_ids"].shape[1] - 1), bool)
    if "attention_mask" in batch:
        real = batch["attention_mask"] != 0
        pairs = pairs & real[:, 1:] & real[:, :-1]
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        pairs = pairs & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return pairs
