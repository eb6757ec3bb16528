"""YAML 1.2 as a plain tree, with the line of every key, and nothing taken silently."""

import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

Path = tuple[str | int, ...]
Places = dict[Path, str]
TAG = "tag:yaml.org,2002:"
KINDS = ("null", "bool", "int", "float", "str", "timestamp", "map", "seq")


def parse(text: str, where: str, root: Path | None = None) -> tuple[Any, Places, list[str]]:
    """Read YAML.

    Args:
        text: The YAML.
        where: What it is called: a file's name, to which `:line` is added, or, where `root` is given, a flag.
        root: The path of what the text is the value of.

    Returns:
        The tree of dicts, lists and scalars; the place of every key and item, by path; and what is wrong, a line each:
        broken syntax, a key that stands twice, a number that other readers take for another one.

    >>> tree, places, problems = parse("train: {steps: 5, seed: 010}", "c.yaml")
    >>> tree, places["train", "steps"], problems
    ({'train': {'steps': 5, 'seed': None}}, 'c.yaml:1', \
['c.yaml:1: train.seed: 010 is 8 to some readers of YAML and 10 to others: write 10'])
    """
    places: Places = {}
    problems: list[str] = []

    def at(line: int) -> str:
        return f"{where}:{line + 1}" if root is None else where

    def wrong(node: Any, path: Path, what: str) -> None:
        problems.append(": ".join([at(node.start_mark.line), *([dotted(path)] if path else []), what]))

    def build(node: Any, path: Path) -> Any:
        places.setdefault(path, at(node.start_mark.line))
        if str(node.tag).removeprefix(TAG) not in KINDS:
            wrong(node, path, f"the tag {node.tag} is not known: leave it out")
        if isinstance(node, MappingNode):
            found: dict[str, Any] = {}
            for key, value in node.value:
                if not isinstance(key, ScalarNode) or key.tag == TAG + "merge":
                    wrong(key, path, "a key is a plain word (and a text that begins with { stands in quotes)")
                    continue
                inner = (*path, key.value)
                if key.value in found:
                    wrong(key, inner, f"the key stands twice; the first is {places[inner]}")
                    continue
                places[inner] = at(key.start_mark.line)
                found[key.value] = build(value, inner)
            return found
        if isinstance(node, SequenceNode):
            return [build(item, (*path, i)) for i, item in enumerate(node.value)]
        value, what = _scalar(node)
        if what:
            wrong(node, path, what)
        return value

    old = re.search(r"^%YAML\s+1\.[01]\b", text, re.MULTILINE)
    if old:  # its `on` would be true and its 010 would be 8
        return None, places, [f"{at(text.count(chr(10), 0, old.start()))}: not YAML 1.2: take the line {old[0]} away"]
    try:
        node = YAML(typ="rt", pure=True).compose(text)
        return None if node is None else build(node, root or ()), places, problems
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return None, places, [f"{at(mark.line)}: not valid YAML: {error.problem or error.context}"]
    except ReaderError as error:
        return None, places, [f"{at(text.count(chr(10), 0, error.position))}: not valid YAML: {error.reason}"]
    except RecursionError:
        return None, places, [f"{where}: nested too deeply, or an alias (*) to what it stands in"]


def _scalar(node: ScalarNode) -> tuple[Any, str]:
    """Return a scalar's value, and what is wrong with how it is written."""
    kind, text = str(node.tag).removeprefix(TAG), node.value
    if kind == "null":
        return None, ""
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true", ""
    if kind not in ("bool", "int", "float"):
        return text, ""
    if kind == "int" and re.fullmatch(r"[+-]?0\d+", text):
        plain = text.lstrip("+-").lstrip("0") or "0"
        return None, f"{text} is {_octal(text)} to some readers of YAML and {plain} to others: write {plain}"
    if "_" in text:
        return None, f"{text}: write the number without _"
    try:
        return int(text, 0) if kind == "int" else float(re.sub(r"\.(?=inf|nan)", "", text.lower())), ""
    except ValueError:  # a tag that is not true (!!int abc), or more digits than Python reads
        return None, f"{text[:40]!r} cannot be read as {kind}"


def _octal(text: str) -> str:
    digits = text.lstrip("+-")
    return str(int(digits, 8)) if set(digits) <= set("01234567") else "text"


def dotted(path: Path) -> str:
    """Write a path as `data.train.0.path`."""
    return ".".join(map(str, path))


def path_of(text: str) -> Path:
    """Return the path that `dotted` has written.

    >>> path_of("data.train.0.path")
    ('data', 'train', 0, 'path')
    """
    return tuple(int(step) if re.fullmatch(r"[0-9]+", step) else step for step in text.split("."))


def place_of(path: Path, places: Places) -> str:
    """Return the place of a path, or of the nearest one above it that is written."""
    while path and path not in places:
        path = path[:-1]
    return places.get(path, "")


def put(tree: Any, places: Places, path: Path, value: Any, inner: Places, where: str) -> str:
    """Set one value in a tree, as `--set` does; return what is wrong with the path, "" if nothing is."""
    at, real = tree, list(path)
    for i, step in enumerate(path):
        last = i == len(path) - 1
        if isinstance(at, list):
            if not isinstance(step, int) or step >= len(at):
                return f"{where}: {dotted(path[:i])} is a list of {len(at)}; give a number below that"
        elif isinstance(at, dict):
            step = real[i] = str(step)
            if not last and at.get(step) is None:
                at[step], places[tuple(real[: i + 1])] = {}, where
        else:
            return f"{where}: {dotted(path[:i])} is {at!r}, which has no {step!r} in it"
        if last:
            at[step] = value
        else:
            at = at[step]
    done = tuple(real)
    for old in [p for p in places if p[: len(path)] == done]:
        del places[old]
    places |= {(*done, *p[len(path) :]): where for p in inner} | {done: where}
    return ""
