"""How far scores can be trusted, on margins made by hand."""

import numpy as np
import pytest

from jaxft.calibration import brier_score, expected_calibration_error, pair_margins, reliability
from jaxft.calibration_picture import draw_margins
from jaxft.errors import RunError

LOGIT = lambda p: float(np.log(p / (1 - p)))


def test_scores_that_say_how_often_they_are_right_are_calibrated():
    """Of ten pairs that a model gives 72 : 28 seven are right, of ten that it gives 93 : 7 nine."""
    margins = [LOGIT(0.72)] * 7 + [-LOGIT(0.72)] * 3 + [LOGIT(0.93)] * 9 + [-LOGIT(0.93)]
    assert expected_calibration_error(margins) == pytest.approx((0.02 + 0.03) / 2, abs=1e-9)
    sure, right, counts = reliability(margins)
    some = counts > 0
    assert counts.tolist() == [0, 0, 0, 0, 10, 0, 0, 0, 10, 0]
    np.testing.assert_allclose(sure[some], [0.72, 0.93])
    np.testing.assert_allclose(right[some], [0.7, 0.9])
    want = (7 * 0.28**2 + 3 * 0.72**2 + 9 * 0.07**2 + 0.93**2) / 20
    assert brier_score(margins) == pytest.approx(want)


def test_too_sure_and_not_sure_at_all():
    assert expected_calibration_error([1e6, -1e6, 1e6, -1e6]) == 0.5
    assert expected_calibration_error([0.0]) == 0  # a tie is half right, and said to be
    assert brier_score([1e6, 1e6]) == 0 and brier_score([-1e6]) == 1


def test_pairs_of_lists_without_their_padding():
    scores = np.array([[1.0, 0.0, -1.0], [2.0, np.nan, np.nan]])
    assert pair_margins(scores, [[1, 1, 1], [1, 0, 0]]).tolist() == [1.0, 2.0, 1.0]


def test_no_pairs_and_the_picture():
    for margins in ([], [np.nan, 1.0]):
        with pytest.raises(RunError, match=f"margins of {len(margins)} pairs"):
            brier_score(margins)
    figure = draw_margins({"before": [0.0, 0.0], "after": [2.0, -1.0]}, "title")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["before", "after"]
    assert len(right.lines) == 3
