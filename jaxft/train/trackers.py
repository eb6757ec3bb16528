"""Where a run's figures go: a file always, TensorBoard and Weights & Biases if asked for."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import RunError, nearest


class Tracker(Protocol):
    """What takes figures."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step."""

    def finish(self) -> None:
        """Write what is still to be written."""


class JsonLines:
    r"""A file of one JSON object a call, on the disk when the call returns; what is not finite is `null`.

    Args:
        file: Where to; what is in it stays.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
    >>> tracker = JsonLines(file)
    >>> tracker.log(3, {"loss": 0.5, "grad_norm": float("nan")})
    >>> tracker.finish()
    >>> file.read_text()
    '{"step": 3, "loss": 0.5, "grad_norm": null}\n'
    """

    def __init__(self, file: Path):
        self.file = file.open("a", encoding="utf-8")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append an object."""
        plain = {name: float(x) if math.isfinite(x) else None for name, x in figures.items()}
        self.file.write(json.dumps({"step": step, **plain}) + "\n")
        self.file.flush()

    def finish(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """Event files that `tensorboard --logdir` shows.

    Args:
        folder: Where to.

    Raises:
        RunError: The package is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise RunError("trackers: tensorboard needs a package: pip install 'jaxft[tensorboard]'") from None
        self.writer = SummaryWriter(str(folder))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write each figure as a scalar."""
        for name, x in figures.items():
            self.writer.add_scalar(name, x, step)

    def finish(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases; its own variables rule it: WANDB_PROJECT (else "jaxft"), WANDB_MODE=offline, ...

    Args:
        folder: Where its files lie; its name is the run's.
        config: Shown beside the run.

    Raises:
        RunError: The package is not installed, or wandb will not begin.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise RunError("trackers: wandb needs a package: pip install 'jaxft[wandb]'") from None
        project = os.environ.get("WANDB_PROJECT", "jaxft")
        try:
            self.run = wandb.init(project=project, dir=str(folder), name=folder.name, config=config)
        except wandb.Error as error:
            raise RunError(
                f"trackers: wandb will not begin ({error}): log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures."""
        self.run.log(dict(figures), step=step)

    def finish(self) -> None:
        """Send what is left."""
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": lambda run, _: TensorBoard(run / "tensorboard"),
    "wandb": WandB,
}


def make_trackers(names: Sequence[str], run: Path, config: dict[str, Any]) -> list[Tracker]:
    """Return the trackers of a run: its `metrics.jsonl`, and those named.

    Raises:
        RunError: A name that there is none of, or a package that is not installed.

    >>> import tempfile, pathlib
    >>> trackers = make_trackers([], pathlib.Path(tempfile.mkdtemp()), {})
    >>> [(type(t).__name__, t.finish()) for t in trackers]
    [('JsonLines', None)]
    """
    for name in names:
        if name not in TRACKERS:
            raise RunError(f"trackers: {name!r} is unknown; {nearest(name, TRACKERS)}")
    asked = [TRACKERS[name](run, config) for name in names]  # first: where one refuses, no file is left open
    return [JsonLines(run / "metrics.jsonl"), *asked]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed, before anything is written."""
    from importlib.util import find_spec

    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if name in names and find_spec(package) is None:
            raise RunError(f"trackers: {name} needs a package: pip install 'jaxft[{name}]'")
