"""Figures of classes: accuracy and F1 of predictions; nearest neighbours and a linear probe of embeddings."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from .errors import RunError, refuse
from .similarity import Floats, as_embeddings, normalized

TOLERANCE = 1e-6


def accuracy(predictions: Any, labels: Any) -> float:
    """Return the share of predictions that are the label.

    Args:
        predictions: `[N]` whole numbers.
        labels: `[N]` whole numbers.

    Raises:
        RunError: Lengths that differ, none at all, or numbers that are not whole.

    >>> accuracy([0, 1, 2, 2], [0, 1, 1, 2])
    0.75
    """
    x, y = _classes(predictions, labels)
    return float((x == y).mean())


def f1_by_class(predictions: Any, labels: Any) -> dict[int, float]:
    """Return `F1 = 2 TP / (2 TP + FP + FN)` of every class that occurs on either side, so that none is 0 / 0.

    Arguments and errors as in `accuracy`.

    >>> f1_by_class([0, 1, 2, 2], [0, 1, 1, 2])
    {0: 1.0, 1: 0.6666666666666666, 2: 0.6666666666666666}
    """
    x, y = _classes(predictions, labels)
    both = np.concatenate([x, y])
    return {
        int(c): 2 * float(((x == c) & (y == c)).sum()) / float((both == c).sum())  # 2 TP + FP + FN: how often it occurs
        for c in np.unique(both)
    }


def f1(predictions: Any, labels: Any, average: str = "macro") -> float:
    """Return F1 over all classes.

    Args:
        predictions: `[N]` whole numbers.
        labels: `[N]` whole numbers.
        average: `"macro"`, the mean over the classes that occur on either side; `"binary"`, that of class 1 of 0 and 1.

    Raises:
        RunError: As in `accuracy`; another `average`; or binary F1 where no row is of class 1.

    >>> f1([1, 1, 0, 0], [1, 0, 1, 0], "binary")
    0.5
    """
    if average not in ("macro", "binary"):
        raise RunError(f"average {average!r}: it is 'macro' or 'binary'")
    each = f1_by_class(predictions, labels)
    if average == "macro":
        return float(np.mean(list(each.values())))
    if not set(each) <= {0, 1}:
        raise RunError(f"binary F1 is of classes 0 and 1, these are {sorted(each)}: take average='macro'")
    if not np.any(np.asarray(labels)):
        raise RunError("binary F1 is undefined: no row has label 1")
    return each[1]


def knn_accuracy(
    train: Any,
    train_labels: Any,
    test: Any = None,
    test_labels: Any = None,
    *,
    k: int = 5,
    cosine: bool = True,
    chunk: int = 256,
) -> float:
    """Return the share of rows whose class most of their k nearest neighbours have.

    Of classes with as many votes the one with the nearest member wins; of neighbours that are as near, the one that
    stands first. Without `test`, each row is asked of all the others (leave one out), where a class of one row is
    always wrong.

    Args:
        train: `[N, D]`.
        train_labels: `[N]` whole numbers.
        test: `[M, D]`.
        test_labels: `[M]` whole numbers.
        k: Neighbours that vote.
        cosine: Nearest by cosine, else by Euclidean distance.
        chunk: Rows at a time; memory is `24 * chunk * N` bytes.

    Raises:
        RunError: Shapes that do not fit, values that are not finite, fewer than k neighbours, labels that no neighbour
            has, or `test` that is `train` itself, where each row would find itself.

    >>> knn_accuracy([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]], [0, 0, 1, 1], k=1)
    1.0
    """
    if test is train:
        raise RunError("test is train, so that each row would find itself: leave test out, and it is left out in turn")
    x, y = _labelled(train, train_labels, "train")
    alone = test is None
    asked, wanted = (x, y) if alone else _labelled(test, test_labels, "test")
    _same_kind(x, y, asked, wanted)
    if not 1 <= k <= len(x) - alone:
        raise RunError(f"k={k}: there are {len(x) - alone} neighbours to vote")
    if cosine:
        x, asked = normalized(x), normalized(asked)
    squares = 0.0 if cosine else (x**2).sum(1)
    right = 0
    for start in range(0, len(asked), chunk):
        part = asked[start : start + chunk]
        distances = squares - 2 * part @ x.T  # but for the square of the row that asks
        if alone:
            distances[range(len(part)), range(start, start + len(part))] = np.inf
        last = np.partition(distances, k - 1, axis=1)[:, k - 1 : k]
        for row, within, label in zip(distances, distances <= last, wanted[start : start + chunk], strict=True):
            near = np.flatnonzero(within)
            near = near[np.argsort(row[near], kind="stable")][:k]
            winner, _ = Counter(y[near].tolist()).most_common(1)[0]  # of equal counts the first met
            right += winner == int(label)
    return right / len(asked)


def linear_probe(
    train: Any, train_labels: Any, test: Any, test_labels: Any, *, l2: float = 1.0, iterations: int = 1000
) -> float:
    """Return the test accuracy of a linear classifier over embeddings that stay as they are.

    Multinomial logistic regression on standardised features (mean 0 and variance 1 over `train`):
    `min_W,b mean_i -log softmax(W x_i + b)[y_i] + l2 / (2 N) |W|^2`, the objective of scikit-learn's `C = 1 / l2`, by
    L-BFGS from zero in float64 until no entry of the gradient is above 1e-6: the same rows give the same figure.

    Args:
        train: `[N, D]`.
        train_labels: `[N]` whole numbers, two classes at least.
        test: `[M, D]`.
        test_labels: `[M]` whole numbers, each in `train_labels`.
        l2: Strength of the penalty, above 0: without it separable classes have no minimum.
        iterations: At most so many.

    Raises:
        RunError: Shapes that do not fit, values that are not finite, one class alone, labels that are not in `train`,
            or no convergence.

    >>> linear_probe([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1], [[0.2], [2.8]], [0, 1])
    1.0
    """
    x, y = _labelled(train, train_labels, "train")
    asked, wanted = _labelled(test, test_labels, "test")
    _same_kind(x, y, asked, wanted)
    classes, index = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise RunError(f"train: every label is {classes[0]}, so there is nothing to tell apart")
    if not l2 > 0:
        raise RunError(f"l2={l2}: a number above 0 is expected")
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 1e-12 * np.abs(x).max(0), spread, 1)  # a constant feature says nothing: it becomes 0
    with jax.enable_x64(True):
        weights, bias, left = _logistic_regression((x - mean) / spread, index, len(classes), l2 / len(x), iterations)
        weights, bias, left = np.asarray(weights), np.asarray(bias), float(left)
    if not left <= TOLERANCE:
        raise RunError(
            f"linear probe: after {iterations} iterations the gradient is {left:.1e}: raise l2 or iterations"
        )
    found = classes[((asked - mean) / spread @ weights + bias).argmax(1)]
    return accuracy(found, wanted)


@jax.jit(static_argnums=(2, 4))
def _logistic_regression(x: Any, y: Any, classes: int, penalty: Any, iterations: int) -> tuple[Any, Any, Any]:
    """Return weights `[D, C]`, bias `[C]`, and the largest entry of the gradient that is left."""

    def objective(params: tuple[Any, Any]) -> Any:
        weights, bias = params
        logits = x @ weights + bias[None]
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss + penalty / 2 * (weights**2).sum()

    solver, with_gradient = optax.lbfgs(), optax.value_and_grad_from_state(objective)

    def left(state: Any) -> Any:
        return optax.tree.max(jax.tree.map(jnp.abs, optax.tree.get(state, "grad")))

    def unfinished(carry: Any) -> Any:
        count = optax.tree.get(carry[1], "count")
        return (count == 0) | ((count < iterations) & (left(carry[1]) > TOLERANCE))

    def advance(carry: Any) -> Any:
        params, state = carry
        value, gradient = with_gradient(params, state=state)
        updates, state = solver.update(gradient, state, params, value=value, grad=gradient, value_fn=objective)
        return optax.apply_updates(params, updates), state

    start = jnp.zeros((x.shape[1], classes)), jnp.zeros(classes)
    (weights, bias), state = jax.lax.while_loop(unfinished, advance, (start, solver.init(start)))
    return weights, bias, left(state)


def _classes(predictions: Any, labels: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    x, y = np.asarray(predictions), np.asarray(labels)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise RunError(f"predictions {list(x.shape)} against labels {list(y.shape)}: give one for each")
    for name, v in (("predictions", x), ("labels", y)):
        if v.dtype.kind not in "iu":
            raise RunError(f"{name}: whole numbers are expected, one a class, these are {v.dtype}")
    return x, y


def _labelled(x: Any, labels: Any, what: str) -> tuple[Floats, npt.NDArray[Any]]:
    x, y = as_embeddings(x, what), np.asarray(labels)
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise RunError(f"{what}: labels {list(y.shape)} {y.dtype} for {len(x)} rows: give a whole number for each")
    return x, y


def _same_kind(x: Floats, y: npt.NDArray[Any], asked: Floats, wanted: npt.NDArray[Any]) -> None:
    if x.shape[1] != asked.shape[1]:
        raise RunError(f"train has {x.shape[1]} numbers a row, test {asked.shape[1]}: one model must have made both")
    unknown = [f"row {row}: {wanted[row]}" for row in np.flatnonzero(~np.isin(wanted, y))]
    refuse(RunError, "test has labels that no row of train has", unknown)
