"""Correlations and ranks against numbers worked out by hand, scipy and plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxft.errors import RunError
from jaxft.similarity import (
    mean_reciprocal_rank,
    paired_cosine,
    pearson,
    recall_at_k,
    retrieval_ranks,
    spearman,
)


def test_cosine_of_pairs():
    found = paired_cosine([[3, 4], [1, 0], [0, 0]], [[6, 8], [-2, 0], [1, 1]])
    np.testing.assert_allclose(found, [1, -1, 0], atol=1e-15)
    small = jnp.full((1, 4), 1e-3, jnp.bfloat16)
    assert paired_cosine(small, 1000 * small)[0] == pytest.approx(1, abs=1e-2)


def test_correlations_by_hand():
    """x - mean is (-4, -1, 5) / 3 and y - mean (-1, 0, 1): 3 / sqrt(42/9 * 2); the ranks agree."""
    assert pearson([1, 2, 4], [1, 2, 3]) == pytest.approx(3 / (42 / 9 * 2) ** 0.5)
    assert spearman([1, 2, 4], [1, 2, 3]) == pytest.approx(1)
    assert pearson([3, 2, 1], [1, 2, 3]) == pytest.approx(-1)
    # ranks (1.5, 1.5, 3) and (1, 2, 3): covariance 1.5, variances 1.5 and 2
    assert spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


def test_correlations_are_those_of_scipy():
    draw = np.random.default_rng(0)
    for n in (3, 8, 50):
        x, y = draw.normal(size=n).astype(np.float32), draw.integers(0, 6, n) + np.arange(n)
        assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x.astype(np.float64), y).statistic, abs=1e-12)
        ranks = scipy.stats.rankdata(x), scipy.stats.rankdata(y)
        assert spearman(x, y) == pytest.approx(scipy.stats.pearsonr(*ranks).statistic, abs=1e-12)
    assert pearson(1e6 + x, y) == pytest.approx(pearson((1e6 + x).astype(np.float64), y), abs=1e-9)


@pytest.mark.parametrize("score", [pearson, spearman])
def test_what_has_no_correlation(score):
    """A collapsed model's cosines count as 0; references that are all the same are an error."""
    for collapsed in ([0.3] * 3, [0.0] * 3, np.float64(0.7) + np.array([0, 1e-16, 2e-16])):
        assert score(collapsed, [1, 2, 3]) == 0.0
    with pytest.raises(RunError, match="references: every score is 2, so no correlation is defined"):
        score([1, 2, 3], [2, 2, 2])
    with pytest.raises(RunError, match=r"scores \[2\] against \[3\]"):
        score([1, 2], [1, 2, 3])
    with pytest.raises(RunError, match="two at least"):
        score([1], [1])
    with pytest.raises(RunError, match=r"predictions: 1 of 3 scores are not finite, row 1 the first \(nan\)"):
        score([1, np.nan, 2], [1, 2, 3])
    with pytest.raises(RunError, match=r"references: 2 of 3 .* \(inf\)"):
        score([1, 2, 3], [1, np.inf, np.nan])


DOCUMENTS = [[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]


def test_ranks_by_hand():
    """Cosines of the query (1, 0): 1, 0.8, 0, -1; of (0, 2): 0, 0.6, 1, 0."""
    queries = [[1.0, 0.0], [0.0, 2.0]]
    assert retrieval_ranks(queries, DOCUMENTS, [1, 2]).tolist() == [2, 1]
    assert retrieval_ranks(queries, DOCUMENTS).tolist() == [1, 2]  # of the same row
    assert retrieval_ranks(queries, DOCUMENTS, [{3, 2}, [3, 1]]).tolist() == [3, 2]  # the better of two
    assert retrieval_ranks(queries, DOCUMENTS, [2, 0]).tolist() == [3, 4]  # the document 3 is as near as 0


def test_ties_are_against_us():
    same = np.full((5, 3), 0.3, np.float32)
    assert retrieval_ranks(same, same).tolist() == [5] * 5
    draw = np.random.default_rng(0)
    documents = draw.normal(size=(40, 64)).astype(np.float32)
    twice = np.concatenate([documents, documents])
    scaled = np.concatenate([documents, 3 * documents])  # the same direction, and other bits
    for d in (twice, scaled):
        assert retrieval_ranks(documents, d).tolist() == [2] * 40


def test_copies_of_the_right_text_are_right():
    documents = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[2]]
    assert retrieval_ranks([[1.0, 0.0]], documents, [2]).tolist() == [2]
    assert retrieval_ranks([[1.0, 0.0]], documents, [2], document_ids=[7, 1, 7, 3]).tolist() == [1]
    assert retrieval_ranks([[1.0, 0.0]], documents, [[3, 1]]).tolist() == [3]
    assert retrieval_ranks([[1.0, 0.0]], documents, [[3, 1]], document_ids=[3, 9, 5, 3]).tolist() == [2]
    assert retrieval_ranks([[1.0, 0.0]], documents, [[3, 1]], document_ids=[3, 5, 5, 3]).tolist() == [1]


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_ranks_are_those_of_a_loop(chunk):
    draw = np.random.default_rng(1)
    queries, documents = draw.normal(size=(23, 5)), draw.integers(-1, 2, (31, 5)).astype(float)
    documents[3] = 0
    ids = draw.integers(0, 25, 31)
    right = [set(draw.integers(0, 31, draw.integers(1, 4)).tolist()) for _ in range(23)]
    found = retrieval_ranks(queries, documents, right, document_ids=ids, chunk=chunk)
    seen = 0
    for query, mine, rank in zip(queries, right, found, strict=True):
        cosines = [query @ d / (np.linalg.norm(query) * max(np.linalg.norm(d), 1e-30)) for d in documents]
        good = [j for j in range(31) if any(ids[j] == ids[m] for m in mine)]
        best = max(cosines[j] for j in good)
        assert rank == 1 + sum(cosines[j] >= best - 1e-12 for j in range(31) if j not in good)
        seen += rank > 1
    assert seen > 10


def test_recall_and_reciprocal_rank():
    ranks = retrieval_ranks([[1.0, 0.0], [0.0, 2.0]], DOCUMENTS, [1, 2])
    assert [recall_at_k(ranks, k) for k in (1, 2, 10)] == [0.5, 1, 1]
    assert mean_reciprocal_rank(ranks) == 0.75
    assert mean_reciprocal_rank([1, 3, 20]) == pytest.approx((1 + 1 / 3 + 1 / 20) / 3)


WRONG = [
    (([[1.0, 2.0]], [[1.0]]), {}, "queries of 2 numbers, documents of 1"),
    (([1.0], [[1.0]]), {}, r"queries: \[N, D\] is expected, with at least one row, this is \[1\]"),
    (([[1.0]], np.zeros((0, 1))), {}, "documents: .* at least one row"),
    (([[1.0], [np.nan]], [[1.0]]), {}, "queries: 1 of 2 rows are not finite, row 1 the first"),
    (([[1.0]] * 2, [[1.0]]), {}, "query 1: its document is 1, and there are 1, from 0"),
    (([[1.0]] * 2, [[1.0]], [0]), {}, "2 queries, and right documents for 1"),
    (
        ([[1.0]] * 3, [[1.0]], [[], -1, 0.5]),
        {},
        r"query 0 has no right document\n.*query 1: .* -1, .*\n.*query 2: .* 0.5,",
    ),
    (([[1.0]], [[1.0]], [0]), {"document_ids": [1, 2]}, r"document_ids \[2\] for 1 documents"),
]


@pytest.mark.parametrize(("args", "options", "match"), WRONG)
def test_what_cannot_be_ranked(args, options, match):
    with pytest.raises(RunError, match=match):
        retrieval_ranks(*args, **options)


def test_what_has_no_figure():
    with pytest.raises(RunError, match="k is at least 1"):
        recall_at_k([1], 0)
    for ranks in ([], [0, 1]):
        with pytest.raises(RunError, match="the first place is 1"):
            mean_reciprocal_rank(ranks)
    with pytest.raises(RunError, match=r"pairs of \[1, 2\] and \[2, 2\]"):
        paired_cosine([[1, 2]], [[1, 2], [3, 4]])
