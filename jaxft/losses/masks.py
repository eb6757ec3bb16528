"""Which documents of a batch are true negatives of a query: what `info_nce` takes as `mask`."""

import jax
import jax.numpy as jnp

from ..errors import BatchError
from .entropy import IGNORED


def different_text_mask(anchor_ids: jax.Array, document_ids: jax.Array) -> jax.Array:
    """Return where a document is another text than the query's own positive, than the query, and not asked for by it.

    A text that stands twice in a batch is no negative of itself: neither where two rows have one positive, nor where
    two rows ask the same (then either's positive answers both), nor where a document repeats the query.

    Args:
        anchor_ids: `[B]` int, equal where texts are equal, over all columns of the batch.
        document_ids: `[N]` int, likewise, positives first, then hard negatives.

    Returns:
        `[B, N]` bool; False at every query's own positive, which `info_nce` never masks.

    >>> different_text_mask(jnp.array([1, 2, 1]), jnp.array([5, 6, 7, 5])).astype(int).tolist()
    [[0, 1, 0, 0], [1, 0, 1, 1], [0, 1, 0, 1]]
    """
    rows = len(anchor_ids)
    if len(document_ids) < rows:
        raise BatchError(f"different_text_mask: ids of {rows} anchors, but of {len(document_ids)} documents")
    same_question = anchor_ids[:, None] == anchor_ids[None]
    answers = jnp.zeros((rows, len(document_ids)), bool).at[:, :rows].set(same_question)
    own = document_ids[:rows, None]
    return (own != document_ids[None]) & (anchor_ids[:, None] != document_ids[None]) & ~answers


def different_label_mask(labels: jax.Array, document_labels: jax.Array | None = None) -> jax.Array:
    """Return where a document's class is not the query's; -100, no class, is like no other.

    Args:
        labels: `[B]` int, of the queries.
        document_labels: `[N]` int; by default the queries'.

    Returns:
        `[B, N]` bool.

    >>> different_label_mask(jnp.array([0, 1, 0, -100])).astype(int).tolist()
    [[0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]]
    """
    documents = labels if document_labels is None else document_labels
    return (labels[:, None] != documents[None]) | (labels[:, None] == IGNORED)
