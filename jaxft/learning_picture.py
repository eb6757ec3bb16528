"""A picture of learning from rewards: what the answers are worth, and how far the policy has gone."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

PANELS = {
    "reward": ("Reward", "mean reward of an answer"),
    "kl": ("KL to the reference", "nats an answer"),
    "response_length": ("Length", "tokens an answer"),
}


def draw_learning(rows: Sequence[dict[str, Any]], title: str = "") -> Any:
    """Return a matplotlib figure: reward, KL and length of the answers over the steps, in training and held out.

    The band around the held-out rewards is one standard deviation over the prompts.

    Args:
        rows: What a run has logged.
        title: Written above it.

    >>> rows = [{"step": 1, "reward": 0.1, "kl": 0.0}, {"step": 1, "eval_reward": 0.2, "eval_reward_std": 0.1}]
    >>> [axes.get_title() for axes in draw_learning(rows).axes]
    ['Reward', 'KL to the reference']
    """
    from matplotlib.figure import Figure  # no pyplot: it keeps figures in a global state, and wants a screen
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    there = [name for name in PANELS if any(name in row or f"eval_{name}" in row for row in rows)]
    figure = Figure(figsize=(5 * len(there), 4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    for axes, name in zip(figure.subplots(1, len(there), squeeze=False)[0], there, strict=True):
        heading, unit = PANELS[name]
        steps, values = _series(rows, name)
        axes.plot(steps, values, color="tab:blue", linewidth=1, marker=".", markersize=3, label="training")
        steps, values = _series(rows, f"eval_{name}")
        spread = _series(rows, f"eval_{name}_std")[1]
        axes.plot(steps, values, color="tab:orange", marker="o", label="held out")
        if spread:
            ends = ([v + sign * s for v, s in zip(values, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, *ends, color="tab:orange", alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel=unit, title=heading)
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    if title:
        figure.suptitle(fill(title, 100))
    return figure


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]
