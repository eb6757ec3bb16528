"""The picture of a reward model's scores."""

from textwrap import fill
from typing import Any

import numpy as np

from .calibration import expected_calibration_error, reliability

COLOURS = {"before": "tab:gray", "after": "tab:blue"}


def draw_margins(margins: dict[str, Any], title: str = "") -> Any:
    """Return a matplotlib figure: by how much the better answers are scored higher, and how often that is right.

    Args:
        margins: `{"before": [P], "after": [P]}`, or one of them, as of `calibration.pair_margins`.
        title: Written above it.

    >>> len(draw_margins({"after": [0.5, 1.0, -0.2]}).axes)
    2
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(10, 4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    left, right = figure.subplots(1, 2)
    every = np.concatenate([np.asarray(x, float) for x in margins.values()])
    edges = np.linspace(every.min(), every.max() + 1e-6, 41)
    for name, found in margins.items():
        left.hist(found, edges, histtype="stepfilled", alpha=0.5, color=COLOURS[name], label=name)
        sure, hit, counts = reliability(found)
        error = expected_calibration_error(found)
        some = counts > 0
        right.plot(sure[some], hit[some], marker="o", color=COLOURS[name], label=f"{name}, off by {error:.3f}")
    left.axvline(0, color="black", linewidth=0.8)
    left.set(xlabel="score of the better answer - of the worse", ylabel="pairs", title="Held-out pairs")
    right.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8, linestyle="--")
    right.set(xlabel="how sure the model is", ylabel="share that is right", title="Calibration", ylim=(-0.03, 1.03))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    if title:
        figure.suptitle(fill(title, 100))
    return figure
