"""Pictures of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from .errors import RunError

ANSWERS = {"accuracy": "answers exactly right (share)"}


def plot_curves(
    metrics: Path, picture: Path, title: str = "", *, unit: str = "nats per token", shown: Mapping[str, str] = ANSWERS
) -> Path:
    """Draw a run's curves from its `metrics.jsonl`.

    Args:
        metrics: The file.
        picture: Where the PNG goes.
        title: Written above it.
        unit: What the loss is in.
        shown: Figures of the evaluations that the second panel shows, each with its name there.

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
    draw(rows, title, unit=unit, shown=shown).savefig(picture, dpi=120)
    return picture


def draw(
    rows: list[dict[str, Any]], title: str = "", *, unit: str = "nats per token", shown: Mapping[str, str] = ANSWERS
) -> Any:
    """Return a matplotlib figure: losses; then the figures to show where they were measured, else the learning rate."""
    from matplotlib.figure import Figure  # no pyplot: it keeps figures in a global state, and wants a screen
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    left, right = figure.subplots(1, 2)
    left.plot(*_series(rows, "loss"), color="tab:blue", linewidth=1, marker=".", markersize=3, label="training")
    if any("eval_loss" in row for row in rows):
        left.plot(*_series(rows, "eval_loss"), color="tab:orange", marker="o", label="held out")
    left.set(xlabel="step", ylabel=f"loss ({unit})", title="Loss")
    measured = {key.removeprefix("eval_") for row in rows for key in row if key.startswith("eval_")}
    keys = [(name, key) for name in shown for key in sorted(measured) if key.partition("/")[0] == name]
    several = len({name for name, _ in keys}) > 1
    for name, key in keys:
        source = key.partition("/")[2]
        label = " ".join([shown[name], *([source] if source else [])]) if several else source or "all"
        right.plot(*_series(rows, f"eval_{key}"), marker="o", label=label)
    if keys:
        lowest = min([-0.03, *(value for _, key in keys for value in _series(rows, f"eval_{key}")[1])])
        right.set(xlabel="step", ylabel="" if several else shown[keys[0][0]], title="Held out", ylim=(lowest, 1.03))
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
