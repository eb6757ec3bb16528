"""The pictures of a comparison."""

import math
from collections.abc import Mapping
from typing import Any

STYLES = ("-", "--", ":", "-.")


def draw_methods(found: Mapping[str, Any], title: str = "") -> Any:
    """Return a matplotlib figure: held-out loss over steps, over time, and against what is trained.

    Args:
        found: What `measure` returns.
        title: Written above it.
    """
    good = [run for run in found["runs"] if not run["error"]]
    figure, (left, middle, right) = _figure(3, title)
    colors = _colors(len(good))
    for i, (run, color) in enumerate(zip(good, colors, strict=True)):
        look = {"color": color, "linestyle": STYLES[i % 4], "linewidth": 1.8, "label": run["name"]}
        steps, losses = _curve(run)
        left.plot(steps, losses, **look)
        middle.plot([step * run["step_seconds"] for step in steps], losses, **look)
    left.set(xlabel="step", ylabel=f"held-out loss ({found['unit']})", title="The same steps")
    middle.set(xlabel="seconds of training", title="The same time")
    if found["target_loss"] is not None:
        middle.axhline(found["target_loss"], color="gray", linewidth=0.8, linestyle=":")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=min(len(good), 10)
    )
    _zoom((left, middle), good)
    _scatter(right, good, [run["name"] for run in good], colors)
    return figure


def draw_sweep(found: Mapping[str, Any], title: str = "") -> Any:
    """Return a matplotlib figure of a sweep: final loss by value, against what is trained, and the curves."""
    numbers = all(type(run["value"]) in (int, float) for run in found["runs"])
    runs = [run if numbers else {**run, "value": str(run["value"])} for run in found["runs"]]
    good = [run for run in runs if not run["error"]]
    methods = list(dict.fromkeys(run["method"] for run in good))
    values = list(dict.fromkeys(run["value"] for run in runs))
    figure, (left, middle, right) = _figure(3, title)
    for method, color in zip(methods, _colors(len(methods)), strict=True):
        mine = [run for run in good if run["method"] == method and run["after"]["loss"] is not None]
        x = [run["value"] if numbers else values.index(run["value"]) for run in mine]
        left.plot(x, [run["after"]["loss"] for run in mine], color=color, marker="o", linewidth=1.8, label=method)
    if numbers and min(values) > 0 and max(values) >= 8 * min(values):
        left.set_xscale("log", base=2 if all(math.log2(v).is_integer() for v in values) else 10)
    if not numbers or len(values) < 10:
        left.set_xticks(values if numbers else range(len(values)), [f"{v}" for v in values])
        left.minorticks_off()
    left.set(xlabel=found["key"], ylabel=f"held-out loss ({found['unit']})", title="At the end")
    if len(methods) > 1:
        left.legend(frameon=False, fontsize="small")
    shades = dict(zip(values, _colors(len(values), "viridis"), strict=True))
    for run in good:
        style = STYLES[methods.index(run["method"]) % 4]
        label = str(run["value"]) if run["method"] == methods[0] else None
        middle.plot(*_curve(run), color=shades[run["value"]], linestyle=style, linewidth=1.8, label=label)
    middle.legend(frameon=False, fontsize="small", title=found["key"])
    middle.set(xlabel="step", title="On the way")
    _zoom((middle,), good)
    _scatter(right, good, [str(run["value"]) for run in good], [shades[run["value"]] for run in good])
    return figure


def _figure(panels: int, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: it keeps figures in a global state, and wants a screen
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(5 * panels, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    every = figure.subplots(1, panels)
    for axes in every:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if title:
        figure.suptitle(title)
    return figure, every


def _colors(n: int, name: str = "tab10") -> list[Any]:
    from matplotlib import colormaps

    if name == "tab10":
        return [colormaps["tab10" if n <= 10 else "tab20"](i) for i in range(n)]
    return [colormaps[name](0.9 * i / max(n - 1, 1)) for i in range(n)]


def _curve(run: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    pairs = [(step, loss) for step, loss in run["losses"] if loss is not None]
    return [step for step, _ in pairs], [loss for _, loss in pairs]


def _zoom(every: tuple[Any, ...], runs: list[Any]) -> None:
    """Leave the first part out, where all fall from the same height: it would squeeze what sets them apart."""
    late = [losses[1:] for run in runs if len(losses := _curve(run)[1]) > 3]
    if len(late) == len(runs):
        low, high = min(map(min, late)), max(map(max, late))
        for axes in every:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _scatter(axes: Any, runs: list[Any], names: list[str], colors: list[Any]) -> None:
    """Draw the loss at the end against the share that is trained, each point with its name."""
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = [(run, n, c) for run, n, c in zip(runs, names, colors, strict=True) if run["after"]["loss"] is not None]
    for i, (run, name, color) in enumerate(sorted(shown, key=lambda s: s[0]["after"]["loss"])):
        at = (run["trainable_percent"], run["after"]["loss"])
        axes.plot(*at, marker="o", markersize=8, color=color, linestyle="")
        axes.annotate(name, at, (0, (8, -15)[i % 2]), textcoords="offset points", ha="center", fontsize="small")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.18)
    axes.set(xlabel="trained parameters (% of all)", title="What it costs, what it gives")
