"""Which documents of a batch are true negatives of a query: what `info_nce` takes as `mask`."""

import jax
import jax.numpy as jnp

from ..errors import BatchError
from .entropy import IGNORED


def different_text_mask(anchor_ids: jax.Array, document_ids: jax.Array) -> jax.Array:
    """Return where a document is another text than the query, and than every positive of it.

    A text that stands twice in a batch is no negative of itself: neither where two rows have one positive, nor where
    two rows ask the same (then either's positive answers both, wherever its text stands), nor where a document repeats
    the query.

    Args:
        anchor_ids: `[B]` int, equal where texts are equal, over all columns of the batch.
        document_ids: `[N]` int, likewise, positives first, then hard negatives.

    Returns:
        `[B, N]` bool; False at every query's own positive, which `info_nce` never masks.

    >>> different_text_mask(jnp.array([1, 2, 1]), jnp.array([5, 6, 7, 5])).astype(int).tolist()
    [[0, 1, 0, 0], [1, 0, 1, 1], [0, 1, 0, 0]]
    """
    rows = len(anchor_ids)
    if len(document_ids) < rows:
        raise BatchError(f"different_text_mask: ids of {rows} anchors, but of {len(document_ids)} documents")
    asked = (anchor_ids[:, None] == anchor_ids[None]).argmax(1)  # [B], the first row that asks the same
    same = document_ids[:rows, None] == document_ids[None]
    text = same.argmax(0)  # [N], the first positive of this text
    answered = jnp.zeros((rows, rows), bool).at[asked, text[:rows]].set(True)
    answers = answered[asked][:, text] & same.any(0)[None]
    return (anchor_ids[:, None] != document_ids[None]) & ~answers


def same_text_groups(anchor_ids: jax.Array, positive_ids: jax.Array) -> jax.Array:
    """Return `[B]` a number that rows share which have a text in common, themselves or through other rows.

    Args:
        anchor_ids: `[B]` int, equal where texts are equal, over both columns.
        positive_ids: `[B]` int, likewise.

    >>> same_text_groups(jnp.array([0, 1, 2, 3, 7]), jnp.array([5, 6, 7, 6, 8])).tolist()
    [0, 1, 2, 1, 2]
    """
    ids = jnp.stack([anchor_ids, positive_ids])
    linked = (ids[:, None, :, None] == ids[None, :, None]).any((0, 1))  # [B, B]

    def lowest(groups: jax.Array) -> jax.Array:
        return jnp.where(linked, groups[None], len(groups)).min(1)

    groups = jnp.arange(len(anchor_ids))
    found, _ = jax.lax.while_loop(
        lambda pair: (pair[0] != pair[1]).any(), lambda pair: (lowest(pair[0]), pair[0]), (lowest(groups), groups)
    )
    return found


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
