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


@pytest.mark.parametrize("n", [1, 3])
def test_without_evaluation_the_learning_rate(n):
    left, right = draw(TRAIN[:n]).axes
    assert lines(left) == {"training": ([1, 2, 3][:n], [3.0, 1.5, 1.0][:n])}
    assert right.get_ylabel() == "learning rate"
    (rate,) = right.lines
    assert list(rate.get_ydata()) == [row["learning_rate"] for row in TRAIN[:n]]
    assert rate.get_marker() != "None"  # a single point without one is not seen
    assert all(tick == int(tick) for tick in left.get_xticks())


def test_nothing_overlaps():
    figure = draw([EVAL[0], *TRAIN, EVAL[1]], "a/very/long/name/" * 12)
    figure.draw_without_rendering()
    left, right = (axes.get_tightbbox() for axes in figure.axes)
    title = figure._suptitle.get_window_extent()
    assert left.x1 < right.x0
    assert max(left.y1, right.y1) <= title.y0
    assert 0 <= title.x0 < title.x1 <= figure.bbox.x1


def test_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [EVAL[0], *TRAIN, EVAL[1]]))
    picture = plot_curves(tmp_path / "metrics.jsonl", tmp_path / "report" / "curves.png", "a run")
    raw = picture.read_bytes()
    assert raw.startswith(b"\x89PNG")
    assert 10_000 < len(raw) < 200_000
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert plot_curves(tmp_path / "metrics.jsonl", tmp_path / "again.png", "a run").read_bytes() == raw
    with pytest.raises(RunError, match=r"none\.jsonl: nothing was logged"):
        plot_curves(tmp_path / "none.jsonl", picture)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="nothing was logged"):
        plot_curves(tmp_path / "metrics.jsonl", picture)
