"""Which runs a comparison is made of: each method, or each at every value of one key; all else is the same."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Config, load_config
from ..config.tree import parse
from ..errors import ConfigError, RunError, nearest, refuse
from ..methods import METHODS
from ..run import RunFolder


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One run of a comparison.

    Attributes:
        name: Of its folder.
        method: What it is called among the methods.
        value: Of the key that is swept; None without a sweep.
        config: Of the run, an ordinary one.
    """

    name: str
    method: str
    value: Any
    config: Config


def contestants(
    file: str | Path,
    methods: str | None = None,
    sweep: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Contestant]:
    """Return the runs of a comparison, every one checked as far as a config can be without data and model.

    Args:
        file: A config. Its `output` is the folder that the runs' folders lie in. `compare` says what a name stands
            for, `{NAME: {method, learning_rate}}`; where it gives no method, the config's own of that name is meant,
            else the method of that name with its defaults. Methods want different learning rates: with one for all,
            what is compared is the rate. Where the best one is not known, sweep it.
        methods: Names with commas between them, of methods or of what `compare` lists. None: all that `compare` lists;
            where a key is swept, the config's own method.
        sweep: `key.sub=value,value,...`: every method at every value.
        overrides: `key.sub=value` each, for all runs.

    Returns:
        The runs: the methods in order, the values of each in order.

    Raises:
        ConfigError: A name that is no method's, a key that is none, a value that the key does not take.
        RunError: A folder that holds another run, or is in use.
    """
    base = load_config(file, overrides)
    if not base.data.eval:
        raise ConfigError(f"{file}: data.eval: methods are compared on held-out rows: set data.eval")
    key, values = _swept(sweep)
    made = []
    for method in _names(base, methods, swept=bool(key)):
        for text, value in values:
            name = method if text is None else "-".join([method, re.sub(r"[^\w.+-]", "_", f"{key}-{text}")])
            made.append(Contestant(name, method, value, load(file, base, method, name, overrides, key, text)))
    _check_folders(base, made)
    return made


def load(
    file: str | Path, base: Config, method: str, folder: str, overrides: Sequence[str], key: str, text: str | None
) -> Config:
    """Return the config of one run."""
    changes = ["compare={}", f"output={json.dumps(str(Path(base.output) / folder))}"]
    entry = base.compare.get(method)
    if entry is not None and entry.method is not None:
        changes.append(f"method={_plain(entry.method)}")
    elif method != _own_name(base):
        changes.append(f"method={_plain([{'name': method}])}")
    if entry is not None and entry.learning_rate is not None:
        changes.append(f"optimizer.learning_rate={entry.learning_rate!r}")
    if text is None:
        return load_config(file, [*overrides, *changes])
    try:
        return load_config(file, [*overrides, *changes, f"{key}={text}"])
    except ConfigError as error:  # without the sweep it is good: `load_config` has loaded it as `base`
        raise ConfigError(str(error).replace(f"--set {key}", f"--sweep {key}")) from None


def _own_name(config: Config) -> str | None:
    return "+".join(str(part["name"]) for part in config.method) if config.method else None


def _plain(parts: Sequence[dict[str, Any]]) -> str:
    return json.dumps(parts[0] if len(parts) == 1 else list(parts))


def _swept(sweep: str | None) -> tuple[str, list[tuple[str | None, Any]]]:
    """Return the key and its values, each as it was given and as it is read."""
    if sweep is None:
        return "", [(None, None)]
    key, equals, listed = sweep.partition("=")
    texts = [text.strip() for text in listed.split(",")]
    if key in ("output", "compare", "evaluation.rows") or (key.startswith("data.") and key != "data.packing"):
        raise ConfigError(
            f"--sweep {key}: runs are compared on the same rows, each in a folder of its own; sweep another"
        )
    if not equals or not all(key.split(".")) or not all(texts):
        raise ConfigError(f"--sweep {sweep}: give key.sub=value,value,... such as method.r=1,2,4")
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise ConfigError(f"--sweep {sweep}: {', '.join(twice)} stands twice")
    read = [parse(text, f"--sweep {key}", ()) for text in texts]
    refuse(ConfigError, "values that cannot be read", [what for _, _, problems in read for what in problems])
    return key, [(text, value) for text, (value, _, _) in zip(texts, read, strict=True)]


def _names(config: Config, methods: str | None, *, swept: bool) -> list[str]:
    own = _own_name(config)
    if methods is None:
        names = [own] if swept and own else list(config.compare)
        if not names:
            raise ConfigError("nothing to compare: give --methods full,lora,... or a section `compare` in the config")
        return names
    names = [name.strip() for name in methods.split(",")]
    known = {*METHODS, *config.compare, *([own] if own else [])}
    unknown = [f"unknown method {name!r}; {nearest(name, known)}" for name in names if name not in known]
    twice = [f"{name!r} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    refuse(ConfigError, f"--methods {methods}", [*unknown, *twice])
    return names


def _check_folders(base: Config, made: list[Contestant]) -> None:
    """Refuse folders that hold something else than runs of these very configs."""
    folders = [one.config.output for one in made]
    problems = [f"two runs would share {f}: give other values" for f in dict.fromkeys(folders) if folders.count(f) > 1]
    if RunFolder(base.output).started:
        problems.append(f"{base.output}: it holds a run; give the comparison an `output` of its own (--output)")
    for one in made:
        run = RunFolder(one.config.output)
        try:
            run.check_idle()
            run.check_free(one.config, resume=run.started)
        except RunError as error:
            problems.append(str(error).replace("\n  - ", "; "))
    refuse(RunError, "a comparison that cannot be made here", problems)
