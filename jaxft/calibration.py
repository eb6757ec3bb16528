"""How far scores can be trusted: whether pairs that a reward model is sure of are pairs that it has right."""

from typing import Any

import numpy as np

from .errors import RunError

Array = np.ndarray[Any, Any]
BINS = 10


def pair_margins(scores: Any, there: Any) -> Array:
    """Return, of every pair of a better and a worse answer, by how much the better one is scored higher.

    Args:
        scores: `[N, K]`, of the answers of each row, best first.
        there: `[N, K]`, zero where a row has no answer.

    Returns:
        `[P]` float64, of all rows one after the other.

    >>> pair_margins([[3.0, 1.0, 2.0], [0.5, 0.0, 9.0]], [[1, 1, 1], [1, 1, 0]]).tolist()
    [2.0, 1.0, -1.0, 0.5]
    """
    scores, there = np.asarray(scores, float), np.asarray(there) != 0
    better, worse = np.triu_indices(scores.shape[1], 1)
    return np.asarray((scores[:, better] - scores[:, worse])[there[:, better] & there[:, worse]])


def reliability(margins: Any, bins: int = BINS) -> tuple[Array, Array, Array]:
    """Sort pairs by how sure the model is of them: `sigmoid(|margin|)`, the probability of the order it gives.

    Args:
        margins: `[P]`.
        bins: Bins of equal width from 1/2, not sure at all, to 1.

    Returns:
        Of each bin, `[bins]`: the mean probability, the share of pairs that are right (a tie is half right), both NaN
        in an empty bin, and the number of pairs.

    >>> [x.round(4).tolist() for x in reliability([0.0, 5.0, 5.0], bins=2)]
    [[0.5, 0.9933], [0.5, 1.0], [1.0, 2.0]]
    """
    margins = _some(margins)
    sure = _sigmoid(np.abs(margins))
    right = np.where(margins == 0, 0.5, margins > 0)
    place = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    counts, sums, hits = (np.bincount(place, weights=w, minlength=bins) for w in (np.ones(len(sure)), sure, right))
    some = np.where(counts > 0, counts, np.nan)
    return sums / some, hits / some, counts


def expected_calibration_error(margins: Any, bins: int = BINS) -> float:
    """Return `sum over bins of n_b / P |right_b - sure_b|` (Naeini et al. 2015), of the bins of `reliability`.

    >>> expected_calibration_error([100.0, -100.0])  # quite sure, and right every second time
    0.5
    """
    sure, right, counts = reliability(margins, bins)
    return float(np.nansum(counts * np.abs(right - sure)) / counts.sum())


def brier_score(margins: Any) -> float:
    """Return the mean of `(1 - sigmoid(margin))^2` (Brier 1950): 1/4 for scores that are all the same, 0 at best.

    >>> brier_score([0.0, 0.0])
    0.25
    """
    return float(np.mean(_sigmoid(-_some(margins)) ** 2))


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _some(margins: Any) -> Array:
    found = np.asarray(margins, float)
    if not found.size or not np.isfinite(found).all():
        raise RunError(f"margins of {found.size} pairs, of which {np.isfinite(found).sum()} are finite: give some")
    return found
