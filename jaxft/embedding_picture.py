"""A picture of embeddings before and after training, on their two principal axes."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np

from .errors import RunError
from .similarity import Floats, as_embeddings, normalized

SHOWN = 3000  # more points hide one another
LINES = 150  # more lines too
LEGEND = 12  # more classes cannot be told by colour


def principal_axes(x: Any) -> tuple[Floats, Floats]:
    """Return embeddings on their two principal axes: `(x - mean) V_2`, with `x - mean = U S V^T`.

    The sign of an axis is free: its largest entry is made positive, so that a picture is the same every time.

    Args:
        x: `[N, D]`.

    Returns:
        `[N, 2]`, and the share of the variance on each axis `[2]`; zeros where there is none.

    >>> points, share = principal_axes([[0.0, 0.0], [3.0, 4.0]])
    >>> points.round(3).tolist(), share.round(3).tolist()
    ([[-2.5, 0.0], [2.5, 0.0]], [1.0, 0.0])
    """
    x = as_embeddings(x)
    x = x - x.mean(0)
    _, s, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:2] * np.sign(np.take_along_axis(axes[:2], np.abs(axes[:2]).argmax(1)[:, None], 1))
    points, share = np.zeros((len(x), 2)), np.zeros(2)
    points[:, : len(axes)] = x @ axes.T
    share[: len(axes)] = s[:2] ** 2 / max(np.square(s).sum(), np.finfo(float).tiny)
    return points, share


def draw_embeddings(before: Any, after: Any, labels: Any, names: Sequence[str] = (), title: str = "") -> Any:
    """Return a matplotlib figure: rows of two embeddings, before and after, coloured by class.

    Rows are brought to length 1, as a cosine sees them; each panel stands on its own two principal axes, since those of
    one would show the other from a bad side, and says what share of the variance they hold. Of more than 3,000 rows
    3,000 are drawn; more than 12 classes have no legend.

    Args:
        before: `[N, D]`.
        after: `[N, D]`.
        labels: `[N]` whole numbers.
        names: Name of each class, by number; the number where it has none.
        title: Written above it.

    Raises:
        RunError: Rows that differ in number, or are not finite.
    """
    labels = np.asarray(labels)
    classes, index = np.unique(labels, return_inverse=True)
    colors = _colors(len(classes))
    figure, panels = _panels(before, after, len(labels), title)
    # Drawn in a fixed order at random: sorted by class, the last would lie over all the others.
    shown = np.random.default_rng(0).permutation(len(labels))[:SHOWN]
    for axes, points in panels:
        axes.scatter(*points[shown].T, c=colors[index[shown]], s=_size(len(shown)), alpha=0.75, linewidths=0)
    if len(classes) <= LEGEND:
        from matplotlib.lines import Line2D

        look = {"linestyle": "", "marker": "o", "markersize": 6}
        handles = [Line2D([], [], color=color, **look) for color in colors]  # type: ignore[arg-type]
        written = [str(names[c]) if 0 <= c < len(names) else str(c) for c in classes.tolist()]
        figure.legend(handles, written, loc="outside right center", frameon=False)
    else:
        figure.supxlabel(f"colours: {len(classes)} classes", fontsize="small", color="gray")
    return figure


def draw_pairs(before: tuple[Any, Any], after: tuple[Any, Any], scores: Any = None, title: str = "") -> Any:
    """Return a matplotlib figure: the two texts of each pair as points with a line between, coloured by their score.

    Axes as in `draw_embeddings`. Where training did its work, pairs of a high score have short lines. Of more than 150
    pairs 150 are drawn, those of a high score on top.

    Args:
        before: `[N, D]` of the first texts, `[N, D]` of the second.
        after: The same.
        scores: `[N]`; without them first and second texts have a colour each (anchors and positives).
        title: Written above it.

    Raises:
        RunError: Rows that differ in number, or are not finite.
    """
    rows = len(before[0])
    lengths = [len(x) for x in (*before, *after, *([] if scores is None else [scores]))]
    if set(lengths) != {rows}:
        raise RunError(f"pairs: {lengths} rows: give a first and a second text for each, and as many scores")
    figure, panels = _panels(np.concatenate(before), np.concatenate(after), 2 * rows, title)
    shown = np.random.default_rng(0).permutation(rows)[:LINES]
    values = np.zeros(rows) if scores is None else np.asarray(scores, np.float64)
    shown = shown[np.argsort(values[shown], kind="stable")]
    for axes, points in panels:
        ends = points.reshape(2, rows, 2)[:, shown]
        _draw_lines(axes, ends, None if scores is None else values[shown])
    if scores is not None:
        every = [axes for axes, _ in panels]
        figure.colorbar(every[0].collections[-1], ax=every, label="score", fraction=0.03)
    return figure


def _draw_lines(axes: Any, ends: Floats, values: Floats | None) -> None:
    """Draw pairs, their two ends `[2, N, 2]`."""
    from matplotlib.collections import LineCollection

    look = {"color": "silver"} if values is None else {"array": values, "cmap": "plasma_r"}
    axes.add_collection(LineCollection(list(ends.swapaxes(0, 1)), linewidths=0.9, **look))
    for points, color in zip(ends, ("tab:blue", "tab:orange"), strict=True):
        look = {"color": color} if values is None else {"c": values, "cmap": "plasma_r"}
        axes.scatter(*points.T, s=14, linewidths=0, zorder=2, **look)


def _panels(before: Any, after: Any, rows: int, title: str) -> tuple[Any, list[tuple[Any, Floats]]]:
    from matplotlib.figure import Figure  # no pyplot: it keeps figures in a global state, and wants a screen
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11, 4.8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    panels = []
    for axes, x, name in zip(figure.subplots(1, 2), (before, after), ("Before", "After"), strict=True):
        x = as_embeddings(x, name.lower())
        if len(x) != rows:
            raise RunError(f"{name.lower()}: {len(x)} embeddings for {rows} rows: give one for each")
        points, share = principal_axes(normalized(x))
        axes.set(title=name, aspect="equal", adjustable="datalim")
        axes.set_xlabel(f"first principal axis ({share[0]:.0%} of the variance)")
        axes.set_ylabel(f"second ({share[1]:.0%})")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        panels.append((axes, points))
    if title:
        figure.suptitle(fill(title, 100))
    return figure, panels


def _size(n: int) -> float:
    return float(np.clip(12000 / n, 9, 40))


def _colors(n: int) -> Any:
    """Return n colours `[n, 3]`: well apart where there is a legend, hues in golden steps beyond."""
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb, to_rgb

    if n <= LEGEND:
        return np.array([*(colormaps["tab10"](i)[:3] for i in range(10)), to_rgb("black"), to_rgb("gold")])[:n]
    i = np.arange(n)
    return hsv_to_rgb(np.stack([i * 0.618034 % 1, 0.55 + 0.4 * (i % 2), 0.95 - 0.2 * (i % 3)], 1))
