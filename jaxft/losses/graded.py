"""Losses of triplets, and of pairs that have a label or a score. Shapes: B rows, D width."""

from typing import Any

import jax
import jax.numpy as jnp

from ..errors import MethodError
from .vectors import LOWEST, check_options, check_rows, check_vectors, cosines, counted_rows, reduced


def euclidean(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return `|left - right|` of each row, float32; where they are equal it is 0 and has no gradient.

    >>> euclidean(jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))).tolist()
    [5.0]
    """
    square = jnp.square(left.astype(jnp.float32) - right.astype(jnp.float32)).sum(-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def cosine_distance(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return one minus the cosine of each row with its counterpart."""
    return 1 - cosines(left, right)


DISTANCES = {"euclidean": euclidean, "cosine": cosine_distance}


def triplet(
    anchors: jax.Array,
    positives: jax.Array,
    negatives: jax.Array,
    *,
    margin: float = 5.0,
    distance: str = "euclidean",
    mask: jax.Array | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return `max(d(anchor, positive) - d(anchor, negative) + margin, 0)` (Weinberger and Saul 2009).

    The defaults are those of sentence-transformers' TripletLoss. Cosine distances lie between 0 and 2: give them a
    smaller margin.

    Args:
        anchors: `[B, D]`, any float dtype; not normalised for euclidean distances.
        positives: `[B, D]`.
        negatives: `[B, D]`.
        margin: By how much a negative should be farther away.
        distance: `"euclidean"`, or `"cosine"`: one minus the cosine.
        mask: `[B]`, zero at rows that do not count, whatever they hold.
        reduction: `"mean"` over the rows that count, or `"none"`: `[B]`, zeros at others.

    Returns:
        A float32 scalar, or `[B]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> x = jnp.eye(3)
    >>> float(triplet(x, x, x[::-1], margin=1.0, distance="cosine"))  # 0, 1 and 0
    0.3333333432674408
    """
    check_options("triplet", reduction=reduction, margin=margin)
    check_vectors("triplet", anchors=anchors, positives=positives, negatives=negatives)
    check_rows("triplet", len(anchors), positives=positives, negatives=negatives, mask=mask)
    nearer, farther, counted = distances(anchors, positives, negatives, distance, mask)
    return reduced(jax.nn.relu(nearer - farther + margin), counted, reduction)


def distances(
    anchors: jax.Array, positives: jax.Array, negatives: jax.Array, distance: str, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return how far positives and negatives are from their anchors, `[B]` each, and which rows count."""
    if distance not in DISTANCES:
        raise MethodError(f"triplet: distance={distance!r}: choose one of {', '.join(map(repr, DISTANCES))}")
    counted, anchors, positives, negatives = counted_rows(mask, anchors, positives, negatives)
    d = DISTANCES[distance]
    return d(anchors, positives), d(anchors, negatives), counted


def pairwise_contrastive(
    left: jax.Array,
    right: jax.Array,
    labels: jax.Array,
    *,
    margin: float = 0.5,
    mask: jax.Array | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return `(y d^2 + (1 - y) max(margin - d, 0)^2) / 2`, d one minus the cosine (Hadsell et al. 2006).

    As sentence-transformers' ContrastiveLoss.

    Args:
        left: `[B, D]`, any float dtype.
        right: `[B, D]`.
        labels: `[B]`, y: 1 for a pair that belongs together, 0 for one that does not; between them both terms count.
        margin: Distance from which on a pair that does not belong together costs nothing.
        mask: As for `triplet`.
        reduction: As there.

    Returns:
        A float32 scalar, or `[B]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> x, y = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> pairwise_contrastive(x, y, jnp.array([1, 0]), reduction="none").tolist()
    [0.5, 0.125]
    """
    check_options("pairwise_contrastive", reduction=reduction, margin=margin)
    check_vectors("pairwise_contrastive", left=left, right=right)
    check_rows("pairwise_contrastive", len(left), right=right, labels=labels, mask=mask)
    counted, left, right, y = counted_rows(mask, left, right, labels.astype(jnp.float32))
    d = cosine_distance(left, right)
    return reduced((y * d**2 + (1 - y) * jax.nn.relu(margin - d) ** 2) / 2, counted, reduction)


def cosine_regression(
    left: jax.Array,
    right: jax.Array,
    scores: jax.Array,
    *,
    mask: jax.Array | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Return `(cos - score)^2`, as sentence-transformers' CosineSimilarityLoss (Reimers and Gurevych 2019).

    Args:
        left: `[B, D]`, any float dtype.
        right: `[B, D]`.
        scores: `[B]`, between -1 and 1.
        mask: As for `triplet`.
        reduction: As there.

    Returns:
        A float32 scalar, or `[B]`.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> x, y = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> cosine_regression(x, y, jnp.array([0.5, 1.0]), reduction="none").tolist()
    [0.25, 0.0]
    """
    check_options("cosine_regression", reduction=reduction)
    check_vectors("cosine_regression", left=left, right=right)
    check_rows("cosine_regression", len(left), right=right, scores=scores, mask=mask)
    counted, left, right, scores = counted_rows(mask, left, right, scores.astype(jnp.float32))
    return reduced((cosines(left, right) - scores) ** 2, counted, reduction)


def cosent(
    left: jax.Array, right: jax.Array, scores: jax.Array, *, temperature: Any = 0.05, mask: jax.Array | None = None
) -> jax.Array:
    """Return `log(1 + sum over (i, k) with score_i > score_k of exp((cos_k - cos_i) / t))`: order, not size, counts.

    CoSENT (Huang et al. 2024), as sentence-transformers' CoSENTLoss with `scale = 1 / temperature`. Pairs of equal
    scores are not compared; where all are equal the loss is 0.

    Args:
        left: `[B, D]`, any float dtype.
        right: `[B, D]`.
        scores: `[B]`.
        temperature: t, a number or a scalar array.
        mask: `[B]`, zero at rows that are not compared, whatever they hold.

    Returns:
        A float32 scalar: one for the batch, which is neither a sum nor a mean over rows.

    Raises:
        BatchError: Shapes that do not fit.
        MethodError: An option out of range.

    >>> x, y = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> f"{cosent(x, y, jnp.array([1.0, 0.0]), temperature=1.0):.4f}"  # log(1 + e)
    '1.3133'
    """
    check_options("cosent", temperature=temperature)
    check_vectors("cosent", left=left, right=right)
    check_rows("cosent", len(left), right=right, scores=scores, mask=mask)
    counted, left, right, scores = counted_rows(mask, left, right, scores.astype(jnp.float32))
    cos = cosines(left, right) / temperature
    differences = jnp.where(ordered(scores, counted), cos[None] - cos[:, None], LOWEST)
    return jax.nn.logsumexp(jnp.append(differences.reshape(-1), 0))


def ordered(scores: jax.Array, counted: jax.Array) -> jax.Array:
    """Return `[B, B]` bool: whether i and k count, and i has the higher score."""
    return (scores[:, None] > scores[None]) & counted[:, None] & counted[None]
