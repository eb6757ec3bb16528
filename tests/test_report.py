"""The picture shows what was logged."""

import json

import pytest

from jaxft.errors import RunError
from jaxft.report import draw, plot_curves

TRAIN = [{"step": n, "loss": 3 / n, "learning_rate": 0.1 * n} for n in (1, 2, 3)]
EVAL = [{"step": 0, "eval_loss": 4.0, "eval_accuracy": 0.0}, {"step": 3, "eval_loss": 1.0, "eval_accuracy": 0.75}]


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_losses_and_accuracy():
    left, right = draw([EVAL[0], *TRAIN, EVAL[1]]).axes
    assert lines(left) == {"training": ([1, 2, 3], [3.0, 1.5, 1.0]), "held out": ([0, 3], [4.0, 1.0])}
    assert lines(right) == {"all": ([0, 3], [0.0, 0.75])}
    assert left.get_legend() is not None
    assert right.get_legend() is None


def test_sources_and_gaps():
    rows = [{"step": 1, "eval_loss": None, "eval_accuracy/zh": 0.5, "eval_accuracy": 0.25}]
    left, right = draw(rows).axes
    assert lines(left)["held out"] == ([], [])
    assert set(lines(right)) == {"all", "zh"}
    assert right.get_legend() is not None


def test_without_evaluation_the_learning_rate():
    left, right = draw(TRAIN[:1]).axes
    assert list(lines(left)) == ["training"]
    assert right.get_ylabel() == "learning rate"


def test_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [EVAL[0], *TRAIN, EVAL[1]]))
    picture = plot_curves(tmp_path / "metrics.jsonl", tmp_path / "report" / "curves.png", "a run")
    raw = picture.read_bytes()
    assert raw.startswith(b"\x89PNG")
    assert 10_000 < len(raw) < 200_000
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="nothing was logged"):
        plot_curves(tmp_path / "metrics.jsonl", picture)
