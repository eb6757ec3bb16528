"""Log-probabilities of the tokens that are there, chunk by chunk over the positions: `[B, T, V]` is not formed whole.

Shapes: B rows, T positions, V tokens of the vocabulary, D model width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import BatchError
from .chunked import split_positions
from .entropy import IGNORED
from .language import predicted


def token_log_probs(
    model: Any,
    batch: Mapping[str, jax.Array],
    *,
    key: jax.Array | None = None,
    temperature: Any = 1.0,
    entropy: bool = False,
    last: int | None = None,
    chunk: int | None = None,
) -> Any:
    """Return `log softmax(logits_t / temperature)[x_t+1]`: place t speaks of token t + 1.

    The backward pass computes the logits of each chunk again, in the memory of one; where all fit into one chunk it
    does not.

    Args:
        model: A model with `hidden` and `head`, a pytree.
        batch: `input_ids` `[B, T]`; optionally `attention_mask`, `position_ids`, `segment_ids`.
        key: Dropout key; None: no dropout.
        temperature: What the logits are divided by, a number or a scalar array: that of the sampler.
        entropy: Whether to return the entropy of each place's distribution beside it, in nats.
        last: Only the last so many places: those that speak of the last tokens, as many; None: all T - 1.
        chunk: As for `chunked_cross_entropy`.

    Returns:
        `[B, T - 1]` float32, or `[B, last]`; 0 where token t or t + 1 is padding, or they are of two segments. With
        `entropy` a pair of these.

    Raises:
        BatchError: No tokens, fewer places than `last`, or a model that predicts no next token.

    >>> import jaxft
    >>> model, ids = jaxft.testing.tiny_llama(), jnp.array([[5, 6, 7, 8]])
    >>> whole = jax.nn.log_softmax(model(ids))[0, jnp.arange(3), ids[0, 1:]]
    >>> bool(jnp.allclose(token_log_probs(model, {"input_ids": ids})[0], whole, atol=1e-5))
    True
    >>> token_log_probs(model, {"input_ids": ids}, last=2).shape
    (1, 2)
    """
    places = _checked(model, batch, last)
    inputs = {name: batch[name] for name in ("attention_mask", "position_ids", "segment_ids") if name in batch}
    hidden = model.hidden(batch["input_ids"], **inputs, key=key)[:, -1 - places : -1]
    tokens = jnp.where(predicted(batch), batch["input_ids"][:, 1:], IGNORED)[:, -places:]

    def figures(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        index, hidden, tokens = part
        real = tokens != IGNORED
        hidden = jnp.where(real[..., None], hidden, 0)
        logits = model.head(hidden, key=None if key is None else jax.random.fold_in(key, index))
        logits = logits.astype(jnp.float32) / temperature
        total = jax.nn.logsumexp(logits, -1)
        picked = jnp.take_along_axis(logits, jnp.where(real, tokens, 0)[..., None], -1)[..., 0]
        found = [jnp.where(real, picked - total, 0)]
        if entropy:
            mean = (jnp.exp(logits - total[..., None]) * logits).sum(-1)
            found.append(jnp.where(real, total - mean, 0))
        return tuple(found)

    parts = split_positions(model, hidden, tokens, chunk)
    chunks = len(parts[0])
    body = figures if chunks == 1 else jax.checkpoint(figures, prevent_cse=False)
    made = jax.lax.map(body, (jnp.arange(chunks), *parts))
    found = tuple(x.swapaxes(0, 1).reshape(len(hidden), -1)[:, :places] for x in made)
    return found if entropy else found[0]


def _checked(model: Any, batch: Mapping[str, jax.Array], last: int | None) -> int:
    """Return how many places there are."""
    if "input_ids" not in batch:
        raise BatchError(f"token_log_probs needs input_ids [B, T]; the batch has {', '.join(batch) or 'nothing'}")
    if not hasattr(model, "head"):
        raise BatchError(
            f"token_log_probs: a {type(model).__name__} predicts no next token; give a causal language model"
        )
    places = batch["input_ids"].shape[1] - 1
    if places < 1 or (last is not None and not 1 <= last <= places):
        raise BatchError(
            f"token_log_probs: rows of {places + 1} tokens have {places} places that speak of a next token; last={last}"
        )
    return places if last is None else last
