"""Figures of similarity: correlation with graded scores, and the rank of the right document."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import RunError, refuse

Floats = npt.NDArray[np.float64]
TIE = 1e-12  # cosines that differ by less are equal: two copies of a vector differ by rounding alone


def as_embeddings(x: Any, what: str = "embeddings") -> Floats:
    """Return embeddings as float64.

    Args:
        x: `[N, D]` of any float dtype.
        what: What they are, for the error.

    Raises:
        RunError: Another shape, no row, or a value that is not finite.
    """
    x = np.asarray(x).astype(np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise RunError(f"{what}: [N, D] is expected, with at least one row, this is {list(x.shape)}")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if bad.size:
        raise RunError(f"{what}: {bad.size} of {len(x)} rows are not finite, row {bad[0]} the first")
    return x


def normalized(x: Floats) -> Floats:
    """Return rows of length 1; a row of zeros stays one, and has cosine 0 with every other.

    >>> normalized(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def paired_cosine(first: Any, second: Any) -> Floats:
    """Return the cosine of each row with the same row of the other: `a_i . b_i / (|a_i| |b_i|)`.

    Args:
        first: `[N, D]`.
        second: `[N, D]`.

    Returns:
        `[N]` float64; 0 where one of the two is all zeros.

    Raises:
        RunError: Shapes that differ, or values that are not finite.

    >>> paired_cosine([[1.0, 0.0], [1.0, 1.0]], [[2.0, 0.0], [1.0, -1.0]]).tolist()
    [1.0, 0.0]
    """
    a, b = as_embeddings(first, "first"), as_embeddings(second, "second")
    if a.shape != b.shape:
        raise RunError(f"pairs of {list(a.shape)} and {list(b.shape)}: give one of the second for each of the first")
    return np.einsum("nd,nd->n", normalized(a), normalized(b))


def pearson(predictions: Any, references: Any) -> float:
    """Return Pearson's correlation: `cov(x, y) / (std(x) std(y))`, -1 to 1, by scipy.

    It is undefined where one side is constant. Constant predictions (a model that has collapsed) say nothing of the
    references and count as 0.0, so that a run's evaluation goes on; constant references are an error.

    Args:
        predictions: `[N]`, what the model says, cosines for example.
        references: `[N]`, what people say.

    Raises:
        RunError: Lengths that differ, fewer than two, values that are not finite, or constant references.

    >>> round(pearson([1, 2, 4], [1, 2, 3]), 4)
    0.982
    """
    x, y = _scores(predictions, references)
    from scipy.stats import pearsonr

    return 0.0 if _constant(x) else float(pearsonr(x, y).statistic)


def spearman(predictions: Any, references: Any) -> float:
    """Return Spearman's correlation: Pearson's of the ranks, where equal values share their mean rank, by scipy.

    Arguments, errors and constant predictions as in `pearson`.

    >>> spearman([0.1, 0.2, 0.9], [1, 2, 3])
    1.0
    """
    x, y = _scores(predictions, references)
    from scipy.stats import spearmanr

    return 0.0 if _constant(x) else float(spearmanr(x, y).statistic)


def retrieval_ranks(
    queries: Any,
    documents: Any,
    right: Sequence[int | Collection[int]] | None = None,
    *,
    document_ids: Any = None,
    chunk: int = 512,
) -> npt.NDArray[np.int64]:
    """Return the place of each query's best right document by cosine: `1 + |{wrong d: cos(q, d) >= max_right cos}|`.

    Ties are broken against us: a wrong document that is as near as the right one stands before it, so that a model
    whose embeddings are all the same is last everywhere and not first.

    Args:
        queries: `[Q, D]`.
        documents: `[M, D]`.
        right: For each query the index of its document, or several of which any is right; the same row by default.
        document_ids: `[M]` whole numbers, equal where the texts are: a copy of a right document is right too.
        chunk: Queries at a time; memory is about `20 * chunk * M` bytes, whatever Q.

    Returns:
        `[Q]` int64, 1 to M.

    Raises:
        RunError: Shapes that do not fit, values that are not finite, a query without a document or with one that is
            not there.

    >>> retrieval_ranks([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.1], [0.9, 0.1]], [0, 1]).tolist()
    [1, 1]
    """
    q, d = normalized(as_embeddings(queries, "queries")), normalized(as_embeddings(documents, "documents"))
    if q.shape[1] != d.shape[1]:
        raise RunError(f"queries of {q.shape[1]} numbers, documents of {d.shape[1]}: one model must have made both")
    sets = _right(range(len(q)) if right is None else right, len(q), len(d))
    if document_ids is not None:
        sets = _with_copies(sets, np.asarray(document_ids), len(d))
    ranks = np.empty(len(q), np.int64)
    for start in range(0, len(q), chunk):
        part = slice(start, start + chunk)
        cosines = q[part] @ d.T
        mine = np.zeros(cosines.shape, bool)
        for row, indices in zip(mine, sets[part], strict=True):
            row[indices] = True
        best = np.where(mine, cosines, -np.inf).max(1, keepdims=True)
        ranks[part] = 1 + ((cosines >= best - TIE) & ~mine).sum(1)
    return ranks


def recall_at_k(ranks: Any, k: int) -> float:
    """Return the share of queries with a right document among the first k: `mean(rank <= k)`.

    Where a query has several, one of them is enough (what sentence-transformers calls accuracy@k).

    Args:
        ranks: `[Q]`, what `retrieval_ranks` returns.
        k: At least 1.

    Raises:
        RunError: No query, or k below 1.

    >>> recall_at_k([1, 2, 5, 1], 2)
    0.75
    """
    if k < 1:
        raise RunError(f"recall at k={k}: k is at least 1")
    return float((_ranks(ranks) <= k).mean())


def mean_reciprocal_rank(ranks: Any) -> float:
    """Return `mean(1 / rank)`, over all ranks and not the first ten alone.

    >>> mean_reciprocal_rank([1, 2, 4])
    0.5833333333333334
    """
    return float((1 / _ranks(ranks)).mean())


def _ranks(ranks: Any) -> npt.NDArray[Any]:
    ranks = np.asarray(ranks)
    if not ranks.size or ranks.min() < 1:
        raise RunError("ranks: at least one is expected, and the first place is 1")
    return ranks


def _scores(predictions: Any, references: Any) -> tuple[Floats, Floats]:
    x, y = (np.asarray(v).astype(np.float64) for v in (predictions, references))
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise RunError(f"scores {list(x.shape)} against {list(y.shape)}: give one for each, two at least")
    for name, v in (("predictions", x), ("references", y)):
        bad = np.flatnonzero(~np.isfinite(v))
        if bad.size:
            raise RunError(
                f"{name}: {bad.size} of {len(v)} scores are not finite, row {bad[0]} the first ({v[bad[0]]})"
            )
    if _constant(y):
        raise RunError(f"references: every score is {y[0]:g}, so no correlation is defined: give rows that differ")
    return x, y


def _constant(x: Floats) -> bool:
    """Tell whether all are the same but for rounding (where scipy calls its own result meaningless)."""
    return bool(np.linalg.norm(x - x.mean()) <= 1e-13 * np.abs(x).max() * len(x) ** 0.5)


def _right(right: Sequence[int | Collection[int]], queries: int, documents: int) -> list[npt.NDArray[np.int64]]:
    """Return the indices of each query's right documents."""
    if len(right) != queries:
        raise RunError(f"{queries} queries, and right documents for {len(right)}: give them for each")
    listed = right if isinstance(right, (list, tuple, range)) else np.asarray(right).tolist()
    sets = [np.atleast_1d(np.array(list(r) if isinstance(r, Collection) else r)) for r in listed]
    problems = [f"query {i} has no right document" for i, s in enumerate(sets) if not s.size]
    problems += [
        f"query {i}: its document is {j}, and there are {documents}, from 0"
        for i, s in enumerate(sets)
        for j in s.tolist()
        if not (isinstance(j, int) and 0 <= j < documents)
    ]
    refuse(RunError, "right documents that cannot be", problems)
    return sets


def _with_copies(
    sets: list[npt.NDArray[np.int64]], ids: npt.NDArray[Any], documents: int
) -> list[npt.NDArray[np.int64]]:
    """Add to each set the documents of the same id."""
    if ids.shape != (documents,):
        raise RunError(f"document_ids {list(ids.shape)} for {documents} documents: give one for each")
    _, group = np.unique(ids, return_inverse=True)
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group))[:-1])
    return [np.concatenate([members[g] for g in np.unique(group[s])]) for s in sets]
