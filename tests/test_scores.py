"""Scores against numbers worked out by hand."""

import pytest

from jaxft.errors import RunError
from jaxft.scores import SCORES, bleu, check_scores, exact_match, rouge


def test_exact_match():
    assert exact_match([" a\n", "A", "a b"], ["a", "a", "a  b"]) == pytest.approx(1 / 3)


def test_bleu():
    """Of 6, 5, 4, 3 n-grams 5, 3, 2, 1 are right; as long as the reference, so no penalty."""
    pytest.importorskip("sacrebleu")
    found = bleu(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert bleu(["我喜欢红色的苹果"], ["我喜欢红色的苹果"]) == pytest.approx(100)
    assert 0 < bleu(["我喜欢绿色的苹果"], ["我喜欢红色的苹果"]) < 100  # as one word it would be 0


def test_rouge():
    """The longest common subsequence of 6 and 6 words is 5: precision, recall and F are 5/6."""
    pytest.importorskip("rouge_score")
    assert rouge(["the cat sat on a mat"], ["the cat sat on the mat"]) == pytest.approx(5 / 6)
    assert rouge(["我喜欢绿色的苹果"], ["我喜欢红色的苹果"]) == pytest.approx(7 / 8)


@pytest.mark.parametrize("score", [exact_match, *SCORES.values()])
def test_one_for_each(score):
    with pytest.raises(RunError, match="1 texts against 2 expected ones"):
        score(["a"], ["a", "b"])


def test_a_missing_package_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr("jaxft.scores.find_spec", lambda name: None)
    check_scores([])
    with pytest.raises(RunError, match=r"bleu needs a package: pip install 'jaxft\[scores\]'"):
        check_scores(["bleu"])
