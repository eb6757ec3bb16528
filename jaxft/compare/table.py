"""What a comparison has found: figures of each run, as an object and as a table."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..run import SUMMARY, RunFolder
from ..tasks.registry import task_of
from .contestants import Contestant

KIB = 1024


def measure(
    made: Sequence[Contestant], errors: Mapping[str, str], *, key: str | None = None, target: float | None = None
) -> dict[str, Any]:
    """Return the figures of a comparison.

    Args:
        made: The runs.
        errors: What went wrong, by name.
        key: The key that was swept.
        target: Loss that the time is measured to; by default the highest of the runs' lowest held-out losses, which
            every run has reached.

    Returns:
        `key`, `unit` (what the loss is in), `target_loss`, `devices`, and `runs`, each with

        - `name`, `method`, `value`, `error` (then nothing else);
        - `before`: the held-out loss before training, of the model with its adapter;
        - `trainable_parameters`, `trainable_percent`, `learning_rate`;
        - `after`: the figures on the held-out rows at the end; `losses`: pairs (step, held-out loss);
        - `step_seconds`: the median over what was logged, the first left out, which compiles;
        - `peak_memory_bytes`: of the fullest device where it tells, else of the process;
        - `disk_bytes`: of the adapter or the model that was written;
        - `steps_to_target`, `seconds_to_target`: the first evaluation at or below the target, and as many steps times
          `step_seconds`: compiling and evaluating do not count.

    Raises:
        RunError: The runs did not see the same rows.
    """
    runs = [_figures(one, errors.get(one.name)) for one in made]
    good = [run for run in runs if not run["error"]]
    _check_rows(made, {run["name"] for run in good})
    lowest = [min(losses) for run in good if (losses := [loss for _, loss in run["losses"] if loss is not None])]
    if target is None:
        target = max(lowest, default=None)
    for run in good:
        hit = (step for step, loss in run["losses"] if None not in (loss, target) and loss <= target)
        steps = run["steps_to_target"] = next(hit, None)
        run["seconds_to_target"] = None if steps is None else steps * run["step_seconds"]
    return {
        "key": key,
        "unit": task_of(made[0].config).unit,
        "target_loss": target,
        "devices": sorted({run["device"] for run in good}),
        "runs": runs,
    }


def _figures(one: Contestant, error: str | None) -> dict[str, Any]:
    named = {"name": one.name, "method": one.method, "value": one.value, "error": error}
    if error:
        return named
    run = RunFolder(one.config.output)
    summary = json.loads((run.path / SUMMARY).read_text(encoding="utf-8"))
    rows = run.records(run.metrics)
    times = [row["step_seconds"] for row in rows if "step_seconds" in row]
    made = Path(run.model if run.model.is_dir() else run.adapter)
    return {
        **named,
        "trainable_parameters": summary["trainable_parameters"],
        "trainable_percent": summary["trainable_percent"],
        "learning_rate": one.config.optimizer.learning_rate,
        "after": {name.removeprefix("eval_"): value for name, value in summary["after"].items()},
        "before": next((row["eval_loss"] for row in rows if "eval_loss" in row), None),
        "losses": [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row],
        "step_seconds": statistics.median(times[1:] or times),
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "disk_bytes": sum(file.stat().st_size for file in made.rglob("*") if file.is_file()),
        "device": summary["device"],
    }


def _check_rows(made: Sequence[Contestant], names: set[str]) -> None:
    """Refuse to compare runs that were trained or evaluated on other rows: a file may have changed between two."""
    first: tuple[str, Any] | None = None
    for one in made:
        if one.name in names:
            rows = json.loads(RunFolder(one.config.output).fingerprints.read_text(encoding="utf-8"))["rows"]
            first = first or (one.name, rows)
            if rows != first[1]:
                raise RunError(
                    f"{one.config.output}: it did not see the same rows as {first[0]}; remove the folder of the one "
                    "that is out of date, and compare again"
                )


def as_markdown(found: Mapping[str, Any]) -> str:
    """Return the table of a comparison; the lowest loss is in bold."""
    good = [run for run in found["runs"] if not run["error"]]
    extra = sorted({name for run in good for name in run["after"]} - {"loss"})
    lowest = min((loss for run in good if (loss := run["after"]["loss"]) is not None), default=None)
    heads = ["method", *([found["key"]] if found["key"] else []), "trained", "%", "rate", "loss", *extra]
    heads += ["ms a step", "peak MiB", "KiB on disk", f"s to {_number(found['target_loss'], '.3f')}"]
    table = [heads]
    for run in found["runs"]:
        first = [run["method"], *([str(run["value"])] if found["key"] else [])]
        if run["error"]:
            table.append([*first, "failed", *[""] * (len(heads) - len(first) - 1)])
            continue
        loss = _number(run["after"]["loss"], ".3f")
        table.append(
            [
                *first,
                f"{run['trainable_parameters']:,}",
                f"{run['trainable_percent']:.3g}",
                f"{run['learning_rate']:g}",
                f"**{loss}**" if run["after"]["loss"] == lowest else loss,
                *(_number(run["after"].get(name), ".3f") for name in extra),
                f"{1e3 * run['step_seconds']:.1f}",
                f"{run['peak_memory_bytes'] / KIB**2:,.0f}",
                f"{run['disk_bytes'] / KIB:,.0f}",
                _number(run["seconds_to_target"], ".1f"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in table]  # fmt: skip
    lines.insert(1, [f"{'-' * (w - 1)}:" if i else "-" * w for i, w in enumerate(widths)])
    starts = {_number(run["before"], ".3f") for run in good}
    said = " to ".join(sorted(starts)[:: max(len(starts) - 1, 1)])
    before = f"Held-out loss before training {said}; {', '.join(found['devices'])}."
    failed = [f"{run['name']}: {run['error']}" for run in found["runs"] if run["error"]]
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + ["", *([before] if good else []), *failed]) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
