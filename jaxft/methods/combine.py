"""Ways to make one array of several: weighted sums of arrays thinned out, or of those that agree in sign.

Shapes: n arrays `t_i` of one shape, stacked as `[n, ...]`; weights `[n]`. On the host, in float32.
"""

from typing import Any

import numpy as np

from ..errors import MethodError

Array = np.ndarray[Any, Any]


def prune_smallest(array: Array, density: float) -> Array:
    """Keep the `floor(density size)` entries of largest magnitude, zeros for the rest.

    >>> prune_smallest(np.array([3.0, -1.0, 2.0, -4.0]), 0.5).tolist()
    [3.0, 0.0, 0.0, -4.0]
    """
    kept = int(density * array.size)
    flat, out = array.reshape(-1), np.zeros(array.size, array.dtype)
    largest = np.argpartition(-np.abs(flat), kept - 1)[:kept] if kept else slice(0)
    out[largest] = flat[largest]
    return out.reshape(array.shape)


def drop_and_rescale(array: Array, density: float, rng: np.random.Generator) -> Array:
    """Keep each entry with probability `density`, divided by it, so that the mean stays (DARE, Yu et al. 2024).

    >>> bool(set(drop_and_rescale(np.ones(9), 0.5, np.random.default_rng(0)).tolist()) == {0.0, 2.0})
    True
    """
    return np.where(rng.random(array.shape) < density, array / np.float32(density), np.zeros_like(array))


def weighted_sum(arrays: Array, weights: Array) -> Array:
    """Return `sum_i w_i t_i` (task arithmetic, Ilharco et al. 2023).

    >>> weighted_sum(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1.0, -1.0])).tolist()
    [-2.0, -2.0]
    """
    return np.tensordot(weights.astype(arrays.dtype), arrays, 1)


def elected_sign(arrays: Array, method: str) -> Array:
    """Return +1 or -1 for each entry, the sign of `sum_i t_i` ("total") or of `sum_i sign(t_i)` ("frequency"); 0 is +.

    >>> elected_sign(np.array([[1.0, -9.0], [1.0, 1.0], [-3.0, 1.0]]), "total").tolist()
    [-1, -1]
    >>> elected_sign(np.array([[1.0, -9.0], [1.0, 1.0], [-3.0, 1.0]]), "frequency").tolist()
    [1, 1]
    """
    if method not in ("total", "frequency"):
        raise MethodError(f"majority_sign_method={method!r}: choose 'total' or 'frequency'")
    votes = arrays if method == "total" else np.sign(arrays)
    return np.where(votes.sum(0) >= 0, 1, -1)


def disjoint_mean(arrays: Array, weights: Array, sign: Array) -> Array:
    """Return `sum_i w_i t_i / n` over the n entries whose sign is the elected one (TIES, Yadav et al. 2023).

    An entry that no array has with that sign is 0. The weights are not in the divisor, as in peft.

    >>> arrays = np.array([[1.0, -9.0], [3.0, 1.0]])
    >>> disjoint_mean(arrays, np.array([1.0, 0.5]), np.array([1, -1])).tolist()
    [1.25, -9.0]
    """
    agree = np.sign(arrays) == sign
    return weighted_sum(arrays * agree, weights) / np.maximum(agree.sum(0), 1).astype(arrays.dtype)


def truncated_product(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """Return `(A, B)`, the closest to `a b` that two factors of a rank can come (Eckart and Young 1936).

    `a b = Q_a (R_a R_b^T) Q_b^T`, so the decomposition `U S V^T` is of the small matrix in the middle: `A = Q_a U`
    and `B = S V^T Q_b^T`, cut after `rank`; peft splits S the other way round, with the same product.

    Args:
        a: `[in, k]`.
        b: `[k, out]`.
        rank: r; beyond what a and b have there are zeros.

    >>> a, b = truncated_product(np.diag([3.0, 2.0]), np.eye(2), 1)
    >>> (a @ b).round(6).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    qa, ra = np.linalg.qr(a)
    qb, rb = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(ra @ rb.T, full_matrices=False)
    left, right = (qa @ u)[:, :rank], ((s[:, None] * vt) @ qb.T)[:rank]
    spare = rank - left.shape[1]
    return np.pad(left, ((0, 0), (0, max(spare, 0)))), np.pad(right, ((0, max(spare, 0)), (0, 0)))
