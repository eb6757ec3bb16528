"""The folder of a run: what lies where, and when it may be written to."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RunError
from .train.lock import holder, locked

if TYPE_CHECKING:  # its packages are for runs alone
    from .config import Config

CONFIG, SUMMARY = "config.yaml", "summary.json"


class RunFolder:
    """A run's folder: `config.yaml`, `metrics.jsonl`, `samples.jsonl`, `checkpoints/`, `report/`, and at the end
    `adapter/` or `model/` and `summary.json`.

    Args:
        path: Where it is, or will be.

    >>> import tempfile
    >>> RunFolder(tempfile.mkdtemp()).finished
    False
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics, self.samples = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self.checkpoints, self.report = self.path / "checkpoints", self.path / "report"
        self.adapter, self.model = self.path / "adapter", self.path / "model"
        self.fingerprints, self.lock = self.checkpoints / "fingerprints.json", self.checkpoints / ".lock"

    @property
    def started(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / CONFIG).is_file() and not (self.path / "config.json").is_file()  # no model's folder

    @property
    def finished(self) -> bool:
        """Whether a run has ended here."""
        return self.started and (self.path / SUMMARY).is_file()

    def check_free(self, config: "Config", *, resume: bool) -> None:
        """Refuse to write over what is there.

        Raises:
            RunError: A run, finished or not, or other files; or with `resume` a run of another config, or none.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: this is a file; give another `output`")
        if self.started:
            if not resume:
                state = "a finished run" if self.finished else "a run that has not finished (go on with --resume)"
                raise RunError(f"{self.path}: it holds {state}. Give another `output` (--output), or remove it first")
            self._check_same(config)
        elif resume:
            raise RunError(f"{self.path}: there is no run to go on with; leave --resume out to begin one")
        elif self.path.is_dir() and any(p.is_file() and p != self.lock for p in self.path.rglob("*")):
            raise RunError(f"{self.path}: the folder holds other files; give an empty or a new one as `output`")

    def _check_same(self, config: "Config") -> None:
        before, now = _flat(self.config().model_dump()), _flat(config.model_dump())
        other = [
            f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted({*before, *now} - {"output"})  # a folder may be moved
            if before.get(key) != now.get(key)
        ]
        if other:
            raise RunError(
                f"{self.path}: the run was begun with another config, so it cannot go on with this one:\n  - "
                + "\n  - ".join(other)
            )

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Be the one process that writes here, while the context lasts.

        Raises:
            RunError: Another one is.
        """
        with locked(self.lock) as other:
            self._refuse_another(other)
            yield

    def check_idle(self) -> None:
        """Refuse a run that another process is at; nothing is written."""
        self._refuse_another(holder(self.lock))

    def _refuse_another(self, other: str | None) -> None:
        if other is not None:
            raise RunError(f"{self.path}: {other} is at this run; wait for its end, or give another `output`")

    def begin(self, config: "Config", fingerprints: Mapping[str, Any]) -> None:
        """Write the config, and the fingerprints of what the run begins with."""
        from .config import dump_config

        write_whole(self.path / CONFIG, dump_config(config))
        write_whole(self.fingerprints, json.dumps(fingerprints, indent=2, ensure_ascii=False) + "\n")

    def config(self) -> "Config":
        """Return the config that the run was begun with."""
        from .config import load_config

        return load_config(self.path / CONFIG)

    def records(self, file: Path, *, up_to: int | None = None) -> list[dict[str, Any]]:
        """Return what was logged in a file of one object a line, up to a step."""
        if not file.is_file():
            return []
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
        return [row for row in rows if up_to is None or row["step"] <= up_to]

    def add_samples(self, rows: list[dict[str, Any]]) -> None:
        """Add answers that the model wrote to `samples.jsonl`."""
        with self.samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def rewind(self, step: int) -> None:
        """Forget what was logged after a step, which will be logged again."""
        for file in (self.metrics, self.samples):
            kept = self.records(file, up_to=step)
            if file.is_file():
                write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished."""
        write_whole(self.path / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    scratch = file.with_name(f".{file.name}.writing")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    if not isinstance(tree, (dict, list, tuple)):
        return {prefix.rstrip("."): tree}
    return {k: v for key, value in pairs for k, v in _flat(value, f"{prefix}{key}.").items()}
