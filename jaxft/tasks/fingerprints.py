"""What a run was begun with: fingerprints of rows, files and leaves, which an interrupted run must find again."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..data import Dataset
from ..errors import RunError, refuse
from ..methods.partition import leaves
from ..models.hub import NEEDED, resolve
from ..models.sentence_folder import MODULES
from ..models.tensors import read_json
from ..rewards.functions import is_function
from ..run import RunFolder
from ..train.state import TrainState
from .task import Data

BLOCK = 1 << 20
BLOCKS = 16  # of a file that are looked at: all of a tokenizer, a sample of a model's shard

Fingerprints = dict[str, dict[str, Any]]


def fingerprints(config: Config, data: Data, state: TrainState) -> Fingerprints:
    """Return what tells the rows, files and leaves of a run from others: `{kind: {name: what}}`.

    Rows are taken as the model sees them, so template, tokenizer and cut are in them too.
    """
    sources = [("data.train", d) for d in data.train] + [("data.eval", d) for d in data.held_out]
    model = {**leaves(state.frozen), **leaves(state.trainable)}
    return {
        "rows": {f"{kind}: {source.name}": {"rows": len(source), "sha256": _rows(source)} for kind, source in sources},
        "files": {name: file_digest(file) for name, file in (*_files(config.model.source), *_reward_files(config))},
        "leaves": {path: f"{getattr(x, 'dtype', type(x).__name__)} {tuple(x.shape)}" for path, x in model.items()},
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in which things two fingerprints differ, each in a sentence.

    >>> changes({"rows": {"data.train: a": {"rows": 3, "sha256": "x"}}}, {"rows": {"data.train: a": {"rows": 4}}})
    ['data.train: a has 4 rows, and had 3']
    """
    said = []
    for kind in ("rows", "files", "leaves"):
        before, after = then.get(kind, {}), now.get(kind, {})
        said += [f"{name} is not there any more" for name in before if name not in after]
        said += [f"{name} was not there" for name in after if name not in before]
        both = [name for name in before if name in after and before[name] != after[name]]
        said += [f"{name} {_how(kind, before[name], after[name])}" for name in both]
    return said


def check_same(run: RunFolder, now: Fingerprints) -> None:
    """Refuse to go on with a run on other rows, files or leaves than it was begun with.

    Raises:
        RunError: Each that has changed, or that nothing tells what they were.
    """
    if not run.fingerprints.is_file() and not any(p.name.isdecimal() for p in run.checkpoints.glob("*")):
        return  # stopped before anything was written down
    try:
        then = json.loads(run.fingerprints.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{run.fingerprints}: it tells what the run was begun with, and cannot be read ({error})"
        ) from None
    said = changes(then, now)
    headline = f"{run.path}: what the run was begun with has changed; put it back, or begin another run"
    refuse(RunError, headline, said, limit=len(said))


def _how(kind: str, before: Any, after: Any) -> str:
    if kind == "leaves":
        return f"is {after}, and was {before}"
    if kind == "files":
        return "holds something else than it did"
    if before["rows"] != after["rows"]:
        return f"has {after['rows']:,} rows, and had {before['rows']:,}"
    return f"has {after['rows']:,} rows as before, but other ones, or in another order, or cut or tokenised otherwise"


def _rows(source: Dataset) -> str:
    found = hashlib.sha256()
    for row in source.examples:
        for part in row.parts():
            found.update(part)
    return found.hexdigest()


def file_digest(file: Path) -> str:
    """Return the sha256 of a file's size and of blocks spread over it, which are all of a file up to 16 MiB."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for i in range(BLOCKS):
            opened.seek(max(i * BLOCK, i * (size - BLOCK) // (BLOCKS - 1)))
            found.update(opened.read(BLOCK))
    return found.hexdigest()


def _reward_files(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield what makes the rewards of a config: files of functions, and of models."""
    section = config.ppo or config.grpo
    for term in section.reward if section is not None else ():
        file = Path(term.reward.rpartition(":")[0]) if is_function(term.reward) else None
        if file is not None:
            yield f"reward: {file}", file
        elif Path(term.reward).exists():
            yield from _files(term.reward)


def _files(path: str) -> Iterator[tuple[str, Path]]:
    """Yield what makes the model and tokenizer a config begins with, through the runs it goes on from: name and file.

    Of a folder of sentence-transformers the folders of its modules count too.
    """
    run = RunFolder(path)
    if not run.started:
        folder = resolve(path)
    elif run.model.is_dir():
        folder = run.model
    else:
        folder = run.adapter
        yield from _files(run.config().model.source)
    origin = str(folder) if run.started else path  # a snapshot of the hub lies elsewhere on every machine
    modules = read_json(folder / MODULES, list) if (folder / MODULES).is_file() else []
    for place in sorted({folder, *(folder / module.get("path", "") for module in modules)}):
        for file in (file for pattern in NEEDED for file in sorted(place.glob(pattern))):
            yield f"{origin}: {file.relative_to(folder).as_posix()}", file
