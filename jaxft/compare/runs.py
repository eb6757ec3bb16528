"""The runs of a comparison, one after the other, each in a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import dump_config
from ..run import RunFolder, write_whole
from ..train.stop import Stop, Stopped
from .contestants import Contestant

LEFT = (75, 130)  # how `jaxft train` ends where it was asked to


def run_all(made: Sequence[Contestant], say: Callable[[str], None] = print) -> dict[str, str]:
    """Train what has not been trained yet; go on with what has begun.

    Each run is `jaxft train OUTPUT/NAME.yaml`, in a process of its own: its peak memory is its own, and a crash ends
    this run alone. What it prints goes to `OUTPUT/NAME.log`.

    Args:
        made: The runs.
        say: Gets lines for a person to read.

    Returns:
        What went wrong, by name.

    Raises:
        Stopped: This was asked for, of the comparison or of a run of it; the run's steps are saved.
    """
    errors = {}
    for i, one in enumerate(made):
        run, where = RunFolder(one.config.output), f"{i + 1} of {len(made)}, {one.name}"
        if run.finished:
            say(f"{where}: has been trained")
            continue
        say(f"{where}: {'goes on' if run.started else 'begins'}; it writes to {run.path}.log")
        run.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(f"{run.path}.yaml"), dump_config(one.config))
        code = _train(run)
        text = Path(f"{run.path}.log").read_text(encoding="utf-8", errors="replace")
        if code in LEFT or code == -signal.SIGINT:
            raise Stopped(f"{one.name}: stopped")
        if code:
            errors[one.name] = _reason(code, text)
            say(f"{where}: failed: {errors[one.name]}")
    return errors


def _train(run: RunFolder) -> int:
    """Train in a process of its own, and return its exit code."""
    command = [sys.executable, "-m", "jaxft.cli", "train", f"{run.path}.yaml"]
    command += ["--resume"] if run.started else []
    with Path(f"{run.path}.log").open("wb") as log, Stop() as stop:
        # in a session of its own: a Ctrl-C is for this process, which asks the run to stop and waits for it
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            with stop.at_once():
                code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    return code


def _reason(code: int, log: str) -> str:
    """Return the error that a run has told, or how it ended."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (", often too little memory" if code == -9 else "")
    lines = [line.strip() for line in log.splitlines() if line.strip()] or [f"exit code {code}"]
    told = next((i for i in reversed(range(len(lines))) if lines[i].startswith("error: ")), len(lines) - 1)
    return " ".join(lines[told:]).removeprefix("error: ")
