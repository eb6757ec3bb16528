"""Figures of classes against numbers worked out by hand, scipy and plain loops."""

from collections import defaultdict

import numpy as np
import pytest
import scipy.optimize

from jaxft import probes
from jaxft.errors import RunError
from jaxft.probes import accuracy, f1, f1_by_class, knn_accuracy, linear_probe


def test_accuracy_and_f1():
    """Class 0: 2 right, 1 too many, 0 missed: 4/5. Class 1: 1, 0, 2: 2/4. Class 4: only predicted, 5: only there: 0."""
    predictions, labels = [0, 0, 0, 1, 4, 4], [0, 0, 1, 1, 1, 5]
    assert accuracy(predictions, labels) == 0.5
    assert f1_by_class(predictions, labels) == {0: 0.8, 1: 0.5, 4: 0, 5: 0}
    assert f1(predictions, labels) == pytest.approx(1.3 / 4)
    assert f1([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], "binary") == pytest.approx(2 / 3)
    assert f1([0, 0], [1, 0], "binary") == 0
    assert f1([7], [7]) == 1


def test_f1_is_that_of_precision_and_recall():
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 5, 60), draw.integers(0, 5, 60)
    for c, found in f1_by_class(x, y).items():
        hits = np.sum((x == c) & (y == c))
        precision, recall = hits / np.sum(x == c), hits / np.sum(y == c)
        assert found == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("score", [accuracy, f1, f1_by_class])
def test_one_whole_number_for_each(score):
    with pytest.raises(RunError, match=r"predictions \[1\] against labels \[2\]"):
        score([1], [1, 2])
    with pytest.raises(RunError, match="give one for each"):
        score([], [])
    with pytest.raises(RunError, match="labels: whole numbers are expected, one a class, these are float64"):
        score([1], [0.5])


def test_binary_f1_has_two_classes():
    with pytest.raises(RunError, match=r"of classes 0 and 1, these are \[0, 2\]"):
        f1([0], [2], "binary")
    with pytest.raises(RunError, match="undefined: no row has label 1"):
        f1([1, 0], [0, 0], "binary")
    with pytest.raises(RunError, match="average 'micro'"):
        f1([0], [0], "micro")


def test_neighbours_by_hand():
    train, labels = [[0.0], [1.0], [2.0], [10.0], [11.0]], [0, 0, 1, 1, 1]
    ask = lambda x, y, k: knn_accuracy(train, labels, [[x]], [y], k=k, cosine=False)
    assert ask(1.4, 0, 1) == 1
    assert ask(1.4, 0, 3) == 1  # 0, 1, 0
    assert ask(1.6, 1, 2) == 1  # 1 and 0: the nearest wins
    assert ask(1.4, 0, 2) == 1  # 0 and 1: the same
    assert ask(0.0, 1, 5) == 1  # three of five
    assert ask(1.5, 0, 1) == 1  # as near: the one that stands first
    assert knn_accuracy([[1.0], [-1.0], [-1.0]], [0, 1, 1], [[0.0]], [0], k=1, cosine=False) == 1  # and it alone votes
    # each asked of the others: 0 -> 1 right, 1 -> 0 right, 2 -> 1 wrong, 10 -> 11, 11 -> 10
    assert knn_accuracy(train, labels, k=1, cosine=False) == 0.8
    assert knn_accuracy(train, labels, np.array(train), labels, k=1, cosine=False) == 1


def test_cosine_and_distance_differ():
    train, labels = [[1.0, 0.0], [0.0, 9.0]], [0, 1]
    assert knn_accuracy(train, labels, [[1.0, 2.0]], [1], k=1) == 1
    assert knn_accuracy(train, labels, [[1.0, 2.0]], [0], k=1, cosine=False) == 1
    zero = [[0.0, 0.0], [1.0, 0.2]]  # a row of zeros is at right angles to all, and no neighbour
    assert knn_accuracy(zero, [0, 1], [[0.3, 1.0], [1.0, -0.1]], [1, 1], k=1) == 1


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_neighbours_are_those_of_a_loop(cosine, chunk):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(40, 3)), draw.integers(0, 3, 40)
    test, wanted = draw.normal(size=(25, 3)), draw.integers(0, 3, 25)

    def loop(rows, classes, alone):
        right = 0
        for i, (row, want) in enumerate(zip(rows, classes, strict=True)):
            cos = x @ row / np.linalg.norm(x, axis=1) / np.linalg.norm(row)
            far = -cos if cosine else np.linalg.norm(x - row, axis=1)
            near = [j for j in np.argsort(far, kind="stable") if not (alone and i == j)][:4]
            votes = defaultdict(list)
            for place, j in enumerate(near):
                votes[y[j]].append(place)
            right += want == min(votes, key=lambda c: (-len(votes[c]), votes[c][0]))
        return right / len(rows)

    assert knn_accuracy(x, y, test, wanted, k=4, cosine=cosine, chunk=chunk) == loop(test, wanted, False)
    assert knn_accuracy(x, y, k=4, cosine=cosine, chunk=chunk) == loop(x, y, True)
    assert loop(test, wanted, False) != loop(x, y, True)


def made(n, seed):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 3, n)
    means = np.array([[0, 0, 0, 0], [1, 0, 2, 0], [0, 1, 0, 3]])
    return (means[y] + draw.normal(size=(n, 4))) * [1, 100, 0.01, 1] + [0, 5, 0, 0], y * 10 + 7


def test_the_probe_finds_the_minimum(monkeypatch):
    """The same weights as scipy's own minimiser on the same objective, and the same answers."""
    x, y = made(60, 0)
    z, index = (x - x.mean(0)) / x.std(0), (y - 7) // 10

    def objective(flat, l2=0.7):
        w, b = flat[:12].reshape(4, 3), flat[12:]
        logits = z @ w + b
        loss = np.mean(scipy.special.logsumexp(logits, axis=1) - logits[np.arange(60), index])
        return loss + l2 / 120 * (w**2).sum()

    best = scipy.optimize.minimize(objective, np.zeros(15), tol=1e-10).x
    found, minimise = [], probes._logistic_regression
    monkeypatch.setattr(probes, "_logistic_regression", lambda *a: found.append(minimise(*a)) or found[-1])
    test, wanted = made(50, 1)
    share = linear_probe(x, y, test, wanted, l2=0.7)
    w, b, left = map(np.asarray, found[0])
    np.testing.assert_allclose(w.ravel(), best[:12], atol=1e-4)
    np.testing.assert_allclose(b - b.mean(), best[12:] - best[12:].mean(), atol=1e-4)
    numeric = scipy.optimize.approx_fprime(np.concatenate([w.ravel(), b]), objective, 1e-6)
    assert np.abs(numeric).max() < 1e-5
    assert w.dtype == np.float64 and left <= 1e-6

    logits = (test - x.mean(0)) / x.std(0) @ best[:12].reshape(4, 3) + best[12:]
    by_hand = np.mean(np.unique(y)[logits.argmax(1)] == wanted)
    assert 0.6 < by_hand < 1
    assert share == by_hand


def test_the_probe_does_not_see_the_scale():
    x, y = made(60, 0)
    test, wanted = made(50, 1)
    plain = linear_probe(x, y, test, wanted)
    moved = np.array([1e3, -1e-3, 1, 7])
    constant = np.full((60, 1), 0.1), np.full((50, 1), 3.0)
    assert linear_probe(x * moved + 5, y, test * moved + 5, wanted) == plain
    assert linear_probe(np.hstack([x, constant[0]]), y, np.hstack([test, constant[1]]), wanted) == plain


X, Y = np.eye(3), [0, 1, 1]
WRONG = [
    (lambda: knn_accuracy(X, Y, X, Y), "test is train, so that each row would find itself"),
    (lambda: knn_accuracy(X, Y, k=3), "k=3: there are 2 neighbours to vote"),
    (lambda: knn_accuracy(X, Y, k=0), "k=0"),
    (lambda: knn_accuracy(X, Y, X[:, :2], Y, k=1), "train has 3 numbers a row, test 2"),
    (lambda: knn_accuracy(X, Y, X[:2], [0, 5], k=1), r"labels that no row of train has\n  - row 1: 5"),
    (lambda: knn_accuracy(X, Y[:2]), r"train: labels \[2\] int64 for 3 rows"),
    (lambda: knn_accuracy(X / 0.0, Y), "train: 3 of 3 rows are not finite"),
    (lambda: linear_probe(X, Y, X, [0, 1, 2]), r"labels that no row of train has\n  - row 2: 2"),
    (lambda: linear_probe(X, [1, 1, 1], X, [1, 1, 1]), "every label is 1, so there is nothing to tell apart"),
    (lambda: linear_probe(X, Y, X, Y, l2=0), "l2=0: a number above 0"),
    (lambda: linear_probe(X, Y, X, Y, iterations=1), "after 1 iterations the gradient is .*: raise l2 or iterations"),
    (lambda: linear_probe(X, Y, X, [0.0, 1.0, 1.0]), r"test: labels \[3\] float64 for 3 rows"),
]


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize(("call", "match"), WRONG)
def test_what_cannot_be_asked(call, match):
    with pytest.raises(RunError, match=match):
        call()
