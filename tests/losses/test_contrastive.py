"""Losses over embeddings against their formulas in float64, gradients by differences, and what must not count."""

from functools import cache, partial

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft import losses
from jaxft.losses.masks import same_text_groups

RNG = np.random.default_rng(0)
B, D, T = 6, 5, 0.2
X, Y, Z = RNG.standard_normal((3, B, D))
MORE = np.concatenate([Y, RNG.standard_normal((B + 1, D))])  # positives, then seven hard negatives
LABELS = np.array([0, 1, 0, 2, 1, 1])  # class 2 has one member
SOME = np.array([0, 1, -100, 2, 1, -100])
YES, SCORES = np.array([1, 0, 0, 1, 0, 0.3]), np.array([0.1, 0.9, 0.1, 0.5, -0.2, 0.5])
MASK = RNG.random((B, len(MORE))) < 0.6

# the loss, its formula, and the arrays of embeddings that it takes
CASES = {
    "info_nce": ((X, Y), losses.info_nce, formulas.info_nce, {"temperature": T}, {}),
    "info_nce, hard negatives": ((X, MORE), losses.info_nce, formulas.info_nce, {"temperature": T}, {}),
    "info_nce, symmetric": (
        (X, MORE),
        losses.info_nce,
        formulas.info_nce,
        {"temperature": T, "symmetric": True},
        {"symmetric": True},
    ),
    "info_nce, masked": (
        (X, MORE),
        losses.info_nce,
        formulas.info_nce,
        {"temperature": T, "symmetric": True, "mask": MASK},
        {"symmetric": True, "mask": MASK},
    ),
    "info_nce, chunks": (
        (X, MORE),
        losses.info_nce,
        formulas.info_nce,
        {"temperature": T, "symmetric": True, "mask": MASK, "chunk": 4},
        {"symmetric": True, "mask": MASK},
    ),
    "supervised": (
        (X,),
        lambda x, **kw: losses.supervised_contrastive(x, jnp.asarray(LABELS), **kw),
        lambda x: formulas.supervised_contrastive(x, LABELS),
        {"temperature": T},
        {},
    ),
    "supervised, some left out": (
        (X,),
        lambda x, **kw: losses.supervised_contrastive(x, jnp.asarray(SOME), **kw),
        lambda x: formulas.supervised_contrastive(x, SOME),
        {"temperature": T},
        {},
    ),
    "supervised, chunks": (
        (X,),
        lambda x, **kw: losses.supervised_contrastive(x, jnp.asarray(LABELS), **kw),
        lambda x: formulas.supervised_contrastive(x, LABELS),
        {"temperature": T, "chunk": 4},
        {},
    ),
    "nt_xent": ((X, Y), losses.nt_xent, formulas.nt_xent, {"temperature": T}, {}),
    "triplet": (
        (X, Y, Z),
        losses.triplet,
        formulas.triplet,
        {"margin": 0.3},
        {"margin": 0.3, "distance": "euclidean"},
    ),
    "triplet, cosine": (
        (X, Y, Z),
        losses.triplet,
        formulas.triplet,
        {"margin": 0.3, "distance": "cosine"},
        {"margin": 0.3, "distance": "cosine"},
    ),
    "pairwise": (
        (X, Y),
        lambda x, y, **kw: losses.pairwise_contrastive(x, y, jnp.asarray(YES), **kw),
        lambda x, y: formulas.pairwise_contrastive(x, y, YES, 1.2),
        {"margin": 1.2},
        {},
    ),
    "regression": (
        (X, Y),
        lambda x, y, **kw: losses.cosine_regression(x, y, jnp.asarray(SCORES), **kw),
        lambda x, y: formulas.cosine_regression(x, y, SCORES),
        {},
        {},
    ),
}


@cache
def differentiated(name):
    """The mean with its gradients, and the rows, compiled once for a case."""
    arrays, ours, _, options, _ = CASES[name]
    options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    f = jax.value_and_grad(lambda *x: ours(*x, **options), tuple(range(len(arrays))))
    return jax.jit(lambda *x: (*f(*x), ours(*x, **options, reduction="none")))


@pytest.mark.parametrize("name", CASES)
def test_the_formula_and_its_gradient(name):
    arrays, _, formula, _, said = CASES[name]
    rows = formula(*arrays, **said)
    counted = rows != 0 if "supervised" in name else np.ones(len(rows), bool)
    assert (rows != 0).sum() >= 2, "a case that looks at nothing"
    value, grads, each = differentiated(name)(*map(f32, arrays))
    np.testing.assert_allclose(each, rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, rows[counted].mean(), rtol=1e-5)
    for i, grad in enumerate(grads):
        f = lambda x: formula(*arrays[:i], x, *arrays[i + 1 :], **said)[counted].mean()  # noqa: B023
        want = formulas.differences(f, arrays[i])
        np.testing.assert_allclose(grad, want, atol=1e-5 * max(1, np.abs(want).max()), err_msg=str(i))


def test_cosent_is_its_formula():
    f = jax.jit(jax.value_and_grad(lambda x, y: losses.cosent(x, y, jnp.asarray(SCORES)), (0, 1)))
    value, grads = f(f32(X), f32(Y))
    np.testing.assert_allclose(value, formulas.cosent(X, Y, SCORES), rtol=1e-5)
    for i, grad in enumerate(grads):
        f = lambda x: formulas.cosent(*((x, Y) if i == 0 else (X, x)), SCORES)  # noqa: B023
        want = formulas.differences(f, (X, Y)[i])
        np.testing.assert_allclose(grad, want, atol=1e-5 * np.abs(want).max())


def f32(x):
    return jnp.asarray(x, jnp.float32)


def test_by_hand():
    """Cosines 1, 0 and -1 alone."""
    e = np.exp
    rows = lambda f, **options: jax.jit(partial(f, reduction="none", **options))
    q, d = f32([[2, 0], [0, 3]]), f32([[1, 0], [0, 5], [-4, 0]])
    want = [np.log(e(2) + 1 + e(-2)) - 2, np.log(1 + e(2) + 1) - 2]
    np.testing.assert_allclose(rows(losses.info_nce, temperature=0.5)(q, d), want, rtol=1e-6)
    back = [np.log(e(2) + 1) - 2] * 2
    got = rows(losses.info_nce, temperature=0.5, symmetric=True)(q, d)
    np.testing.assert_allclose(got, (np.array(want) + back) / 2, rtol=1e-6)
    z, labels = f32([[1, 0], [1, 0], [0, 1], [-1, 0], [0, 2]]), jnp.array([7, 7, 7, 4, 9])
    first = np.log(e(1) + 1 + e(-1) + 1) - (1 + 0) / 2
    third = np.log(1 + 1 + 1 + e(1)) - 0
    got = rows(losses.supervised_contrastive, temperature=1.0)(z, labels)
    np.testing.assert_allclose(got, [first, first, third, 0, 0], rtol=1e-6)
    x, y = f32([[3, 4], [1, 0], [1, 0]]), f32([[3, 4], [0, 1], [-2, 0]])
    got = rows(losses.triplet, margin=2.0)(f32([[0, 0]] * 3), x, y)
    np.testing.assert_allclose(got, [2, 2, 1], rtol=1e-6)
    got = jax.jit(partial(losses.cosent, temperature=1.0))(x, y, jnp.array([0.0, 0.5, 0.5]))  # cosines 1, 0 and -1
    np.testing.assert_allclose(got, np.log(1 + e(1) + e(2)), rtol=1e-6)


@jax.jit
@jax.value_and_grad
def classes(x, labels):
    return losses.supervised_contrastive(x, labels, temperature=0.07)


@pytest.mark.parametrize(
    ("labels", "anchors"), [([0, 1, 2, 3, 4, 5], 0), ([3] * 6, 6), ([0, 0, 1, 2, 3, 4], 2), ([-100] * 6, 0)]
)
def test_classes_of_one_and_one_class(labels, anchors):
    value, grad = classes(f32(X), jnp.array(labels))
    rows = formulas.supervised_contrastive(X, np.array(labels), 0.07)
    assert (rows != 0).sum() == anchors
    np.testing.assert_allclose(value, rows.sum() / max(anchors, 1), rtol=1e-5, atol=1e-6)
    assert bool(np.isfinite(grad).all()) and bool(np.any(grad)) is (anchors > 0)


def test_one_row():
    x = f32(X[:1])
    for f in (
        lambda x: losses.info_nce(x, f32(Y[:1]), temperature=0.1, symmetric=True),
        lambda x: losses.supervised_contrastive(x, jnp.array([1]), temperature=0.1),
        lambda x: losses.cosent(x, f32(Y[:1]), jnp.array([1.0])),
    ):
        value, grad = jax.jit(jax.value_and_grad(f))(x)
        assert float(value) == 0 and not np.any(grad)


def test_equal_scores_are_not_compared():
    value, grad = jax.jit(jax.value_and_grad(lambda x: losses.cosent(x, f32(Y), jnp.full(B, 0.5))))(f32(X))
    assert float(value) == 0 and not np.any(grad)


@pytest.mark.parametrize("name", CASES)
def test_zero_vectors_and_rows_that_are_equal(name):
    for change in (lambda x: [*x[:1], 0 * x[1], *x[2:]], lambda x: x * 0, lambda x: x * 0 + 1, lambda x: x * 1e-15):
        for leaf in jax.tree.leaves(differentiated(name)(*(f32(np.array(change(x))) for x in CASES[name][0]))):
            assert bool(np.isfinite(leaf).all())


@pytest.mark.parametrize("name", ["info_nce, symmetric", "supervised", "triplet", "regression"])
def test_float32_inside(name):
    """Low-precision embeddings give what the same numbers give in float32; gradients come back as they went in."""
    low = [jnp.asarray(x, jnp.bfloat16) for x in CASES[name][0]]
    (value, grads, each), (want, *_) = differentiated(name)(*low), differentiated(name)(*map(f32, low))
    assert value.dtype == each.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(value, want, rtol=1e-6)


@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, 1e30])
def test_junk_in_what_does_not_count_changes_nothing(junk):
    """A hard negative that is masked everywhere, rows of label -100, rows that a mask leaves out."""
    counted = jnp.array([1, 1, 0, 1, 1, 0])
    out = counted == 0
    mask = jnp.ones((B, len(MORE)), bool).at[:, 7:9].set(False)
    dirty_documents = f32(MORE).at[7:9].set(junk)
    dirty = lambda x: jnp.where(out[:, None], junk, f32(x))
    numbers = lambda x: (f32(x), jnp.where(out, junk, f32(x)))
    pairs = {"info_nce": (lambda d: losses.info_nce(f32(X), d, temperature=T, mask=mask), f32(MORE), dirty_documents)}
    pairs["supervised"] = (
        lambda x: losses.supervised_contrastive(x, jnp.asarray(SOME), temperature=T),
        f32(X),
        dirty(X),
    )
    pairs["triplet"] = (lambda x: losses.triplet(x, x[::1] + 1, f32(Z), mask=counted), f32(X), dirty(X))
    for name, f, numeric in (
        ("pairwise", losses.pairwise_contrastive, YES),
        ("regression", losses.cosine_regression, SCORES),
        ("cosent", losses.cosent, SCORES),
    ):
        clean, other = numbers(numeric)
        pairs[name] = (
            lambda xy, f=f: f(xy[0], f32(Y), xy[1], mask=counted),
            (f32(X), clean),
            (dirty(X), other),
        )
    assert len(pairs) == 6
    for name, (f, clean, junked) in pairs.items():
        f = jax.jit(jax.value_and_grad(f))
        got, want = f(junked), f(clean)
        assert float(want[0]) > 0, name
        jax.tree.map(lambda a, b, name=name: np.testing.assert_array_equal(a, b, err_msg=name), got, want)


def test_a_masked_row_is_a_row_that_is_not_there():
    counted = jnp.array([1, 0, 1, 1, 0, 1])
    kept = np.flatnonzero(counted)
    for f, third in (
        (losses.triplet, Z),
        (losses.pairwise_contrastive, YES),
        (losses.cosine_regression, SCORES),
        (losses.cosent, SCORES),
    ):
        f = jax.jit(f)
        got = f(f32(X), f32(Y), f32(third), mask=counted)
        np.testing.assert_allclose(got, f(f32(X[kept]), f32(Y[kept]), f32(third[kept])), rtol=1e-6)


def test_a_positive_is_never_masked():
    nothing = jnp.zeros((B, B), bool)
    f = jax.jit(jax.value_and_grad(lambda x: losses.info_nce(x, f32(Y), temperature=T, mask=nothing)))
    value, grad = f(f32(X))
    assert float(value) == 0 and not np.any(grad)


def test_a_temperature_that_is_learned():
    f = jax.jit(jax.value_and_grad(lambda t: losses.info_nce(f32(X), f32(Y), temperature=t, symmetric=True)))
    value, grad = f(0.2)
    np.testing.assert_allclose(value, formulas.info_nce(X, Y, 0.2, True).mean(), rtol=1e-6)
    want = formulas.differences(lambda t: formulas.info_nce(X, Y, t[0], True).mean(), np.array([0.2]))
    np.testing.assert_allclose(grad, want[0], rtol=1e-5)
    assert f._cache_size() == 1 and np.isfinite(f(0.5)[0])


def test_equal_texts_are_no_negatives():
    """Row 2 asks what row 0 asks; rows 1 and 3 have one positive; row 4's text is row 3's positive."""
    anchors, positives = jnp.array([10, 11, 10, 13, 21]), jnp.array([20, 21, 22, 21, 24])
    negatives = jnp.array([30, 22, 20, 10, 34])
    mask = losses.different_text_mask(anchors, jnp.concatenate([positives, negatives]))
    want = np.ones((5, 10), int)
    want[np.arange(5), np.arange(5)] = 0
    want[0, 2] = want[2, 0] = 0  # one question
    want[1, 3] = want[3, 1] = 0  # one positive
    want[4, [1, 3]] = 0  # the question itself
    want[[0, 2], 6] = want[[0, 2], 7] = 0  # hard negatives: what answers the question ...
    want[[0, 2], 8] = 0  # ... and the question itself
    np.testing.assert_array_equal(mask.astype(int), want)


def test_an_answer_is_none_wherever_its_text_stands():
    """Rows 0 and 1 ask the same; row 2 asks otherwise, and its positive answers row 1."""
    anchors, positives = jnp.array([10, 10, 12, 13]), jnp.array([20, 21, 21, 23])
    mask = losses.different_text_mask(anchors, jnp.concatenate([positives, jnp.array([21, 20, 34, 35])]))
    want = [[0, 0, 0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1]]
    np.testing.assert_array_equal(mask.astype(int), want)


@pytest.mark.parametrize("seed", range(4))
def test_true_negatives_one_by_one(seed):
    """Few texts, so that every kind of coincidence is there, against its definition."""
    rng = np.random.default_rng(seed)
    anchors, documents = rng.integers(0, 9, 7), rng.integers(0, 9, 21)
    answers = set(zip(anchors, documents[:7], strict=True))
    want = [[(a, d) not in answers and a != d for d in documents] for a in anchors]
    got = losses.different_text_mask(jnp.asarray(anchors), jnp.asarray(documents))
    np.testing.assert_array_equal(got, want)


def test_rows_with_a_text_in_common_are_one_group():
    """In a chain, in which a row is linked by its anchor to the one before and by its positive to the one behind."""
    anchors, positives = jnp.array([4, 3, 3, 9, 2, 8]), jnp.array([4, 2, 1, 7, 0, 9])
    groups = jax.jit(same_text_groups)(jnp.append(anchors, 0), jnp.append(positives, 5))
    assert groups.tolist() == [0, 1, 1, 3, 1, 3, 1]


def test_a_duplicate_costs_nothing_once_it_is_masked():
    """Four pairs, one of them twice: without the mask its other self is a negative."""
    x, y = np.concatenate([X[:4], X[:1]]), np.concatenate([Y[:4], Y[:1]])
    ids = jnp.array([0, 1, 2, 3, 0])
    mask = losses.different_text_mask(ids, ids + 10)
    f = jax.jit(partial(losses.info_nce, temperature=T, reduction="none"))
    got = f(f32(x), f32(y), mask=mask)
    np.testing.assert_allclose(got[0], formulas.info_nce(X[:4], Y[:4])[0], rtol=1e-5)
    np.testing.assert_array_equal(got[0], got[4])
    assert float(f(f32(x), f32(y))[0]) > float(got[0])


def test_labels_mask_their_own_class():
    mask = losses.different_label_mask(jnp.array([0, 1, 0, -100]), jnp.array([0, 1, 0, -100, 1]))
    np.testing.assert_array_equal(mask.astype(int), [[0, 1, 0, 1, 1], [1, 0, 1, 1, 0], [0, 1, 0, 1, 1], [1] * 5])


def test_simclr_is_not_symmetric_info_nce():
    one, other = (differentiated(name)(f32(X), f32(Y))[0] for name in ("nt_xent", "info_nce"))
    assert float(one) > float(other)  # the same side's views are negatives too


BAD = {
    "temperature": (lambda: losses.info_nce(f32(X), f32(Y), temperature=0), "temperature=0: give a number above 0"),
    "text": (lambda: losses.info_nce(f32(X), f32(Y), temperature="0.1"), "temperature='0.1'"),
    "vector": (lambda: losses.cosent(f32(X), f32(Y), f32(SCORES), temperature=f32(YES)), r"temperature is \[6\]"),
    "reduction": (lambda: losses.triplet(f32(X), f32(Y), f32(Z), reduction="sum"), "reduction='sum': choose"),
    "margin": (lambda: losses.triplet(f32(X), f32(Y), f32(Z), margin=-1), "margin=-1: give a number of at least 0"),
    "distance": (lambda: losses.triplet(f32(X), f32(Y), f32(Z), distance="l1"), "choose one of 'euclidean', 'cosine'"),
    "fewer": (lambda: losses.info_nce(f32(X), f32(Y[:3]), temperature=T), "6 queries, but 3 documents"),
    "width": (lambda: losses.info_nce(f32(X), f32(Y[:, :2]), temperature=T), r"one width D; queries is \[6, 5\]"),
    "mask": (lambda: losses.info_nce(f32(X), f32(Y), temperature=T, mask=jnp.ones(6)), r"mask is \[6\]; it must be"),
    "rows": (
        lambda: losses.cosine_regression(f32(X), f32(Y), f32(SCORES[:4])),
        r"6 rows of embeddings, but\n  - scores is \[4\]",
    ),
    "column": (lambda: losses.pairwise_contrastive(f32(X), f32(Y), f32(YES)[:, None]), r"labels is \[6, 1\]"),
    "floats": (lambda: losses.supervised_contrastive(f32(X), f32(YES), temperature=T), "classes are integers"),
    "ids": (lambda: losses.different_text_mask(jnp.arange(3), jnp.arange(2)), "of 3 anchors, but of 2 documents"),
}


@pytest.mark.parametrize(("call", "match"), BAD.values(), ids=BAD)
def test_what_cannot_be(call, match):
    with pytest.raises(jaxft.JaxftError, match=match):
        call()
