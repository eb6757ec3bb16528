"""Losses of language modelling. Shapes: B rows, T positions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import BatchError
from .chunked import chunked_cross_entropy, chunked_figures
from .entropy import IGNORED


def next_token_loss(
    model: Any, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Predict each token from those before it: `sum over t of -log p(x_t | x_<t)`, where label t is not -100.

    The model loss of instruction tuning and of plain language modelling, as `transformers` computes it. The logits are
    not formed whole: see `chunked_cross_entropy`.

    Args:
        model: A model with `hidden` and `head`, a pytree.
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
    hidden, labels = _read(model, batch, key)
    total = chunked_cross_entropy(model, hidden, labels, key=key)
    return total, jnp.sum(labels != IGNORED).astype(jnp.float32), {}


def next_token_figures(
    model: Any, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Return `next_token_loss` and, as a further metric, how often the likeliest token is the right one: to evaluate.

    Args:
        model: As for `next_token_loss`.
        batch: As there.
        key: As there.

    Returns:
        Summed loss, number of trained tokens, and `token_accuracy`: (hits, number of trained tokens).

    >>> import jaxft
    >>> ids = jnp.array([[5, 6, 7, 8]])
    >>> _, _, metrics = next_token_figures(jaxft.testing.tiny_llama(), {"input_ids": ids, "labels": ids})
    >>> [float(x) for x in metrics["token_accuracy"]]
    [0.0, 3.0]
    """
    hidden, labels = _read(model, batch, key)
    total, hits = chunked_figures(model, hidden, labels, key=key)
    weight = jnp.sum(labels != IGNORED).astype(jnp.float32)
    return total, weight, {"token_accuracy": (hits, weight)}


def _read(model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return hidden states `[B, T, D]`, and labels `[B, T]` shifted to the states that predict them."""
    absent = [name for name in ("input_ids", "labels") if name not in batch]
    if absent:
        raise BatchError(f"next_token_loss needs input_ids and labels [B, T]; the batch lacks {' and '.join(absent)}")
    if batch["labels"].shape != batch["input_ids"].shape:
        raise BatchError(f"next_token_loss needs labels for tokens [B, T]; these are {list(batch['labels'].shape)}")
    if not hasattr(model, "head"):
        raise BatchError(
            f"next_token_loss: a {type(model).__name__} predicts no next token; give a causal language model"
        )
    inputs = {name: batch[name] for name in ("attention_mask", "position_ids", "segment_ids") if name in batch}
    hidden = model.hidden(batch["input_ids"], **inputs, key=key)
    labels = jnp.where(predicted(batch), batch["labels"][:, 1:], IGNORED)
    return hidden, jnp.pad(labels, ((0, 0), (0, 1)), constant_values=IGNORED)  # the last token predicts nothing


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
