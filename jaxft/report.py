"""Pictures of a run."""

import json
from pathlib import Path
from textwrap import fill
from typing import Any

from .errors import RunError


def plot_curves(metrics: Path, picture: Path, title: str = "") -> Path:
    """Draw a run's curves from its `metrics.jsonl`.

    Args:
        metrics: The file.
        picture: Where the PNG goes.
        title: Written above it.

    Returns:
        The picture.

    Raises:
        RunError: Nothing was logged.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "m.jsonl").write_text('{"step": 1, "loss": 2.0, "learning_rate": 0.1}')
    >>> plot_curves(folder / "m.jsonl", folder / "report" / "curves.png").name
    'curves.png'
    """
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last is torn where a run was killed
    if not rows:
        raise RunError(f"{metrics}: nothing was logged, so there is nothing to draw")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, title).savefig(picture, dpi=120)
    return picture


def draw(rows: list[dict[str, Any]], title: str = "") -> Any:
    """Return a matplotlib figure: losses; then accuracy where it was measured, else the learning rate."""
    from matplotlib.figure import Figure  # no pyplot: it keeps figures in a global state, and wants a screen
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    left, right = figure.subplots(1, 2)
    left.plot(*_series(rows, "loss"), color="tab:blue", linewidth=1, marker=".", markersize=3, label="training")
    if any("eval_loss" in row for row in rows):
        left.plot(*_series(rows, "eval_loss"), color="tab:orange", marker="o", label="held out")
    left.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    accuracies = sorted({key for row in rows for key in row if key.startswith("eval_accuracy")})
    for key in accuracies:
        name = key.removeprefix("eval_accuracy").lstrip("/") or "all"
        right.plot(*_series(rows, key), marker="o", label=name, color="tab:green" if name == "all" else None)
    if accuracies:
        right.set(xlabel="step", ylabel="answers exactly right (share)", title="Held-out accuracy", ylim=(-0.03, 1.03))
    else:
        right.plot(*_series(rows, "learning_rate"), color="tab:gray", marker=".", markersize=3)
        right.set(xlabel="step", ylabel="learning rate", title="Learning rate")
        right.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    if title:
        figure.suptitle(fill(title, 100))
    return figure


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]
