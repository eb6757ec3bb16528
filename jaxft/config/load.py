"""A config file in, a `Config` out; or one error that names everything that is wrong with it."""

import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from ..errors import ConfigError, JaxftError, nearest, refuse
from ..methods import METHODS
from .schema import Config, make_one
from .tree import Path, Places, dotted, parse, place_of, put

KINDS = {
    "string_type": "text is expected",
    "int_type": "a whole number is expected",
    "float_type": "a number is expected",
    "bool_type": "true or false is expected",
    "dict_type": "a mapping is expected",
    "model_type": "a mapping is expected",
    "tuple_type": "a list is expected",
}


def load_config(file: str | File, overrides: Sequence[str] = ()) -> Config:
    r"""Read and check a config.

    Args:
        file: A YAML file.
        overrides: `key.sub=value` each, the value as YAML.

    Returns:
        The config, with every default filled in.

    Raises:
        ConfigError: Everything that is wrong, at once: file, line, key, value, and what to do.

    >>> import tempfile
    >>> file = File(tempfile.mkdtemp(), "c.yaml")
    >>> _ = file.write_text("task: sft\nmodel: {path: m}\nmethod: {name: lora, r: 4}\ndata: {train: a.jsonl, "
    ...                     "format: text}\noutput: runs/a\n")
    >>> load_config(file, ["optimizer.learning_rate=1e-4"]).optimizer.learning_rate
    0.0001
    """
    tree, places, problems = parse(_read(File(file)), str(file))
    if not isinstance(tree, dict):
        refuse(ConfigError, "a config that cannot be used", problems)
        raise ConfigError(f"{file}: a config is a mapping of keys ({', '.join(Config.model_fields)})")
    for override in overrides:
        problems += _override(tree, places, override)
    _normal(tree)
    problems += _method_problems(tree, places)
    config: Config | None = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        told = {line.split(": ", 2)[1] for line in problems if line.count(": ") > 1}
        problems += [line for key, line in _explained(error, places) if key not in told]
    refuse(ConfigError, "a config that cannot be used", sorted(set(problems), key=_line))
    assert config is not None
    return config


def dump_config(config: Config) -> str:
    """Return a config as YAML with every value written out, which `load_config` reads into an equal one.

    >>> from jaxft.config import Config
    >>> tree = {"task": "sft", "model": {"path": "m"}, "output": "o",
    ...         "data": {"train": [{"path": "a.csv", "format": "text", "name": "a"}]}}
    >>> dump_config(Config.model_validate(tree)).splitlines()[:3]
    ['task: sft', 'model:', '  path: m']
    """
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.width, yaml.allow_unicode = 4096, True
    text = io.StringIO()
    tree = config.model_dump(mode="json")
    yaml.dump({k: v for k, v in tree.items() if not (k == "method" and v is None)}, text)
    return text.getvalue()


def _read(file: File) -> str:
    if file.is_dir():
        raise ConfigError(f"{file}: this is a folder; give a YAML file")
    if not file.is_file():
        raise ConfigError(f"{file}: no such config")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _override(tree: Any, places: Places, override: str) -> list[str]:
    key, equals, text = override.partition("=")
    where = f"--set {key}"
    if not equals or not all(key.split(".")):
        return [f"--set {override}: give key.sub=value"]
    value, inner, problems = parse(text, where)
    path: Path = tuple(int(step) if step.isdecimal() else step for step in key.split("."))
    if problems:
        return problems
    wrong = put(tree, places, path, value, inner, where)
    return [wrong] if wrong else []


def _normal(tree: dict[str, Any]) -> None:
    """Write short forms out: a source as a list of sources with format and name, one method as a list of one."""
    if isinstance(tree.get("method"), dict):
        tree["method"] = [tree["method"]]
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    for key in ("train", "eval"):
        given = data.get(key)
        sources = [given] if isinstance(given, (str, dict)) else given
        if not isinstance(sources, list):
            continue
        named: dict[str, int] = {}
        for i, source in enumerate(sources):
            source = sources[i] = {"path": source} if isinstance(source, str) else source
            if not isinstance(source, dict):
                continue
            if data.get("format") is not None:
                source.setdefault("format", data["format"])
            stem = File(str(source.get("path", ""))).name.split(".")[0] or "data"
            named[stem] = named.get(stem, 0) + 1
            source.setdefault("name", stem if named[stem] == 1 else f"{stem}_{named[stem]}")
        data[key] = sources


def _method_problems(tree: dict[str, Any], places: Places) -> list[str]:
    """Check each method's name and options, which are the fields of its class."""
    problems = []
    parts = tree.get("method")
    several = ("method", 0) in places
    for i, part in enumerate(parts if isinstance(parts, list) else ()):
        here: Path = ("method", i) if several else ("method",)
        if not isinstance(part, dict):
            problems.append(f"{place_of(here, places)}: {dotted(here)}: a mapping of name and options is expected")
            continue
        name = part.get("name")
        if name not in METHODS:
            what = f"unknown method {name!r}; {nearest(str(name), METHODS)}" if "name" in part else "name is missing"
            problems.append(f"{place_of((*here, 'name'), places)}: {dotted((*here, 'name'))}: {what}")
            continue
        known = [field.name for field in dataclasses.fields(METHODS[name])]
        unknown = [key for key in part if key not in (*known, "name")]
        for key in unknown:
            problems.append(
                f"{place_of((*here, key), places)}: {dotted((*here, key))}: {name} has no such option; "
                f"{nearest(key, known)}"
            )
        try:
            make_one({key: value for key, value in part.items() if key not in unknown})
        except JaxftError as error:
            lines = [line.removeprefix("  - ") for line in str(error).splitlines()]
            for line in lines[1:] or lines:
                key = re.split(r"[=\[:]", line, maxsplit=1)[0]
                where: Path = (*here, key) if key in known else here
                problems.append(f"{place_of(where, places)}: {dotted(where)}: {line}")
        except TypeError as error:
            problems.append(f"{place_of(here, places)}: {dotted(here)}: {error}")
    return problems


def _explained(error: ValidationError, places: Places) -> list[tuple[str, str]]:
    """Return the key and a line for each fault that pydantic has found."""
    lines = []
    for fault in error.errors():
        key = (fault.get("ctx") or {}).get("key")
        loc: Path = (*fault["loc"], *(key.split(".") if key else ()))
        value = fault["input"]
        if fault["type"] == "too_short" and value:
            continue  # its items are wrong, and are named themselves
        if fault["type"] == "extra_forbidden":
            what = f"unknown key; {nearest(str(loc[-1]), _keys(loc[:-1]))}"
        elif fault["type"] == "missing":
            what = "it is missing" + (", here and as data.format" if loc[-1] == "format" else "")
        elif fault["type"] == "literal_error":
            allowed = fault["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
            what = f"{value!r} is not one of {allowed}" if value is not None else f"give one of {allowed}"
        else:
            message = fault["msg"][:1].lower() + fault["msg"][1:]
            what = KINDS.get(fault["type"], message.removeprefix("input "))
            what += "" if fault["type"] == "jaxft" else f", this is {value!r}{_hint(fault['type'], value)}"
        lines.append((dotted(loc), f"{place_of(loc, places)}: {dotted(loc)}: {what}"))
    return lines


def _hint(kind: str, value: Any) -> str:
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[\s+\-.\deE]+", value):
        return " (text: take the quotes away)"
    return ""


def _keys(path: Path) -> list[str]:
    """Return the keys that the section at a path may hold."""
    section: Any = Config
    for step in path:
        if isinstance(step, str) and isinstance(section, type) and issubclass(section, BaseModel):
            section = _section(section.model_fields[step].annotation)
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _section(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section(arg)) is not None), None)


def _line(problem: str) -> tuple[int, str]:
    found = re.match(r".*?:(\d+): ", problem)
    return (int(found[1]) if found else 0, problem)
