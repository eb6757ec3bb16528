"""What the runs of a recipe begin with: one whose earlier run is missing is told which, and what makes it."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..config import Config
from ..config.tree import parse
from ..errors import RunError, refuse
from ..run import RunFolder


def check_stages(config: Config, file: str | Path) -> None:
    """Refuse a config that begins with a run which another config beside it makes, and which has not ended.

    Args:
        config: The config.
        file: Where it was read.

    Raises:
        RunError: Each run that is missing or has not ended, and the command that makes it.
    """
    makers: dict[str, Path] = {}
    problems = []
    for key, path in _wanted(config):
        run = RunFolder(path)
        if run.finished or (run.path.exists() and not run.started):
            continue
        makers = makers or dict(_outputs(Path(file)))
        maker = makers.get(os.path.normpath(path))
        if maker is not None:
            state, more = ("has not ended", " --resume") if run.started else ("has not been made yet", "")
            problems.append(f"{key}: the run {path} {state}: jaxft train {maker}{more}")
    refuse(RunError, f"{file} begins with what an earlier stage makes", problems)


def _wanted(config: Config) -> Iterator[tuple[str, str]]:
    """Yield what a config begins with, and the rewards that it names: key and path."""
    if config.model.path is not None:
        yield "model.path", config.model.path
    section = config.ppo if config.task == "ppo" else config.grpo
    for term in () if section is None else section.reward:
        yield f"{config.task}.reward", term.reward


def _outputs(file: Path) -> Iterator[tuple[str, Path]]:
    """Yield the run that each config beside a file makes, and that config."""
    for other in sorted(file.parent.glob("*.yaml")):
        if other.name == file.name:
            continue
        try:
            tree = parse(other.read_text(encoding="utf-8-sig"), str(other))[0]
        except (OSError, UnicodeDecodeError):  # no config that could be trained
            continue
        if isinstance(tree, dict) and isinstance(tree.get("output"), str) and "task" in tree:
            yield os.path.normpath(tree["output"]), other
