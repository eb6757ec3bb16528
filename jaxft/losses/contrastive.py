"""Losses that pull positives together and push the rest of the batch away. Shapes: B rows, N documents, D width."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..errors import BatchError, refuse
from ..parallel.rules import constrain
from .cached import in_chunks
from .entropy import IGNORED
from .vectors import LOWEST, check_options, check_rows, check_vectors, products, reduced, unit


def info_nce(
    queries: jax.Array,
    documents: jax.Array,
    *,
    temperature: Any,
    symmetric: bool = False,
    mask: jax.Array | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
) -> jax.Array:
    """Return `-log (exp(s_ii / t) / sum_n exp(s_in / t))`, s the cosines: each query picks its document among N.

    InfoNCE (van den Oord et al. 2018) with in-batch negatives (Henderson et al. 2017), as sentence-transformers'
    MultipleNegativesRankingLoss with `scale = 1 / temperature`. With `symmetric` each positive also picks its query
    among the B, and the two are averaged (CLIP, Radford et al. 2021); there it is `directions=("query_to_doc",
    "doc_to_query")` with `partition_mode="per_direction"`.

    Args:
        queries: `[B, D]`, any float dtype; normalised here.
        documents: `[N, D]`, N >= B: the positive of query i is document i, the rest of the N are hard negatives.
        temperature: t, a number or a scalar array (one that is learned).
        symmetric: Whether documents pick their queries too.
        mask: `[B, N]`, zero where a document is no true negative of a query (`different_text_mask`): it leaves the
            sum. A positive is never masked. What stands in a hard negative that is masked everywhere, NaN included,
            changes nothing.
        reduction: `"mean"`, or `"none"`: `[B]`.
        chunk: Rows of the table `[B, N]` of cosines that are formed at a time; None: all.

    Returns:
        A float32 scalar, or `[B]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> x = jnp.eye(2)
    >>> f"{info_nce(x, x, temperature=1.0):.4f}"  # log(1 + 1 / e)
    '0.3133'
    """
    check_options("info_nce", reduction=reduction, temperature=temperature)
    losses, _ = picked(queries, documents, temperature, symmetric=symmetric, mask=mask, chunk=chunk)
    return reduced(losses, jnp.ones(len(losses), bool), reduction)


def picked(
    queries: jax.Array,
    documents: jax.Array,
    temperature: Any,
    *,
    symmetric: bool = False,
    mask: jax.Array | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the losses `[B]` of `info_nce`, and `[B]` whether a query is nearer to its document than to any other."""
    check_vectors("info_nce", queries=queries, documents=documents)
    rows, number = len(queries), len(documents)
    if number < rows:
        raise BatchError(f"info_nce: {rows} queries, but {number} documents; the first {rows} are their positives")
    if mask is not None:
        if mask.shape != (rows, number):
            raise BatchError(f"info_nce: mask is {list(mask.shape)}; it must be [queries, documents] = {rows, number}")
        mask = mask != 0
        used = mask.any(0) | (jnp.arange(number) < rows)
        documents = jnp.where(used[:, None], documents, 0)
    queries, documents = unit(queries), unit(documents)
    losses, hits = _pick(queries, documents, temperature, mask, chunk, mesh)
    if symmetric:
        back = None if mask is None else mask[:, :rows].T
        losses = (losses + _pick(documents[:rows], queries, temperature, back, chunk, mesh)[0]) / 2
    return losses, hits


def _pick(
    left: jax.Array, right: jax.Array, temperature: Any, mask: jax.Array | None, chunk: int | None, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """Return the cross-entropy `[B]` of each row of `left` picking its own row of `right`, and whether it does."""
    right = constrain(right, mesh, None, None)  # the whole batch's, on every device

    def some(rows: Any, _: Any) -> tuple[jax.Array, jax.Array]:
        left, i, mask = rows
        scores = products(left, right) / temperature
        own = i[:, None] == jnp.arange(len(right))[None]
        others = jnp.where(~own if mask is None else ~own & mask, scores, LOWEST)
        positive = jnp.where(own, scores, 0).sum(1)
        loss = jax.nn.softplus(jax.nn.logsumexp(others, 1) - positive)  # small losses to their last digits
        return loss, positive > others.max(1)

    return in_chunks(some, (left, jnp.arange(len(left)), mask), chunk=chunk, mesh=mesh)


def supervised_contrastive(
    embeddings: jax.Array, labels: jax.Array, *, temperature: Any, reduction: str = "mean", chunk: int | None = None
) -> jax.Array:
    """Return the mean over anchors i of `-1/|P(i)| sum_{p in P(i)} log (exp(s_ip / t) / sum_{a != i} exp(s_ia / t))`.

    SupCon, the form L_out of Khosla et al. 2020: s are cosines, P(i) the other rows of i's class. A row whose class has
    no other member is no anchor, but a negative of others; where there is no anchor at all the loss is 0.

    Args:
        embeddings: `[B, D]`, any float dtype; normalised here.
        labels: `[B]` int; a row of label -100 is left out altogether, whatever it holds.
        temperature: t, a number or a scalar array.
        reduction: `"mean"` over the anchors, or `"none"`: `[B]`, zeros at rows that are none.
        chunk: Rows of the table `[B, B]` of cosines that are formed at a time; None: all.

    Returns:
        A float32 scalar, or `[B]`.

    Raises:
        BatchError: Shapes that do not fit, or labels that are no integers.
        MethodError: An option out of range.

    >>> x = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    >>> f"{supervised_contrastive(x, jnp.array([5, 5, 7]), temperature=1.0):.4f}"  # log(1 + 1 / e)
    '0.3133'
    """
    check_options("supervised_contrastive", reduction=reduction, temperature=temperature)
    losses, anchors, _ = by_class(embeddings, labels, temperature, chunk=chunk)
    return reduced(losses, anchors, reduction)


def by_class(
    embeddings: jax.Array, labels: jax.Array, temperature: Any, *, chunk: int | None = None, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return of `supervised_contrastive` the losses, which rows are anchors, and whose nearest is of its class."""
    check_vectors("supervised_contrastive", embeddings=embeddings)
    check_rows("supervised_contrastive", len(embeddings), labels=labels)
    wrong = [] if jnp.issubdtype(labels.dtype, jnp.integer) else [f"labels are {labels.dtype}; classes are integers"]
    refuse(BatchError, "supervised_contrastive", wrong)
    real = labels != IGNORED
    every = constrain(unit(jnp.where(real[:, None], embeddings, 0)), mesh, None, None)

    def some(rows: Any, _: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        own, mine, i = rows
        others = real[None] & (i[:, None] != jnp.arange(len(every))[None])
        positives = others & (mine[:, None] == labels[None])
        scores = products(own, every) / temperature
        compared = jnp.where(others, scores, LOWEST)
        number = positives.sum(1)
        mean = jnp.where(positives, scores, 0).sum(1) / jnp.maximum(number, 1)
        loss = jnp.where(number > 0, jax.nn.logsumexp(compared, 1) - mean, 0)
        near = jnp.where(positives, scores, LOWEST).max(1) > jnp.where(positives, LOWEST, compared).max(1)
        return loss, number > 0, near & (number > 0)

    return in_chunks(some, (every, labels, jnp.arange(len(every))), chunk=chunk, mesh=mesh)


def nt_xent(
    view1: jax.Array, view2: jax.Array, *, temperature: Any, reduction: str = "mean", chunk: int | None = None
) -> jax.Array:
    """Return the loss of SimCLR (Chen et al. 2020): each of 2 B views picks the other one of its row among 2 B - 1.

    Not `info_nce` with `symmetric`, where a view is compared with the other side's alone. It is SupCon with classes
    of two, and computed so.

    Args:
        view1: `[B, D]`, any float dtype; normalised here.
        view2: `[B, D]`, another view of the same rows.
        temperature: As for `info_nce`.
        reduction: `"mean"`, or `"none"`: `[2 B]`, those of `view1` first.
        chunk: As for `supervised_contrastive`.

    Returns:
        A float32 scalar, or `[2 B]`.

    >>> x = jnp.eye(2)
    >>> f"{nt_xent(x, x, temperature=1.0):.4f}"  # log(1 + 2 / e)
    '0.5514'
    """
    check_rows("nt_xent", len(view1), view2=view2)
    both, rows = jnp.concatenate([view1, view2]), jnp.tile(jnp.arange(len(view1)), 2)
    return supervised_contrastive(both, rows, temperature=temperature, reduction=reduction, chunk=chunk)
