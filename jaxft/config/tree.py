"""YAML 1.2 as a plain tree, with the line of every key, and nothing taken silently."""

import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

Path = tuple[str | int, ...]
Places = dict[Path, str]
TAG = "tag:yaml.org,2002:"


def parse(text: str, where: str) -> tuple[Any, Places, list[str]]:
    """Read YAML.

    Args:
        text: The YAML.
        where: What its lines are called: a file's name, to which `:line` is added, or a flag, as it is.

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

    def at(node: Any) -> str:
        return f"{where}:{node.start_mark.line + 1}" if where.endswith((".yaml", ".yml")) else where

    def build(node: Any, path: Path) -> Any:
        places.setdefault(path, at(node))
        if isinstance(node, MappingNode):
            found: dict[Any, Any] = {}
            for key, value in node.value:
                inner = (*path, str(key.value))
                if key.value in found:
                    problems.append(f"{at(key)}: {dotted(inner)}: the key stands twice; the first is {places[inner]}")
                    continue
                if not isinstance(key, ScalarNode) or key.tag == TAG + "merge":
                    problems.append(f"{at(key)}: a key is a plain word")
                    continue
                places[inner] = at(key)
                found[key.value] = build(value, inner)
            return found
        if isinstance(node, SequenceNode):
            return [build(item, (*path, i)) for i, item in enumerate(node.value)]
        value, wrong = _scalar(node)
        if wrong:
            problems.append(f"{at(node)}: {dotted(path)}: {wrong}")
        return value

    try:
        root = YAML(typ="rt", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark if where.endswith((".yaml", ".yml")) else None
        line = f":{mark.line + 1}" if mark is not None else ""
        return None, places, [f"{where}{line}: not valid YAML: {error.problem}"]
    except YAMLError as error:
        return None, places, [f"{where}: not valid YAML: {str(error).splitlines()[0]}"]
    tree = None if root is None else build(root, ())
    return tree, places, problems


def _scalar(node: ScalarNode) -> tuple[Any, str]:
    """Return a scalar's value, and what is wrong with how it is written."""
    kind, text = str(node.tag).removeprefix(TAG), node.value
    if kind == "null":
        return None, ""
    if kind == "bool":
        return text.lower() == "true", ""
    if kind == "float":
        return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").lower()), ""
    if kind == "int":
        if re.fullmatch(r"[+-]?0\d+", text):
            plain = text.lstrip("+-").lstrip("0") or "0"
            return None, f"{text} is {_octal(text)} to some readers of YAML and {plain} to others: write {plain}"
        if "_" in text:
            return None, f"{text}: write the number without _"
        return int(text, 0), ""
    return text, ""


def _octal(text: str) -> str:
    digits = text.lstrip("+-")
    return str(int(digits, 8)) if set(digits) <= set("01234567") else "text"


def dotted(path: Path) -> str:
    """Write a path as `data.train.0.path`."""
    return ".".join(map(str, path))


def place_of(path: Path, places: Places) -> str:
    """Return the place of a path, or of the nearest one above it that is written."""
    while path and path not in places:
        path = path[:-1]
    return places.get(path, "")


def put(tree: Any, places: Places, path: Path, value: Any, inner: Places, where: str) -> str:
    """Set one value in a tree, as `--set` does; return what is wrong with the path, "" if nothing is."""
    at = tree
    for i, step in enumerate(path[:-1]):
        if isinstance(at, list):
            if not isinstance(step, int) or step >= len(at):
                return f"{where}: {dotted(path[:i])} is a list of {len(at)}; give a number below that"
            at = at[step]
        elif isinstance(at, dict):
            if at.get(str(step)) is None:
                at[str(step)] = {}
            at = at[str(step)]
        else:
            return f"{where}: {dotted(path[:i])} is {at!r}, which has no {step!r} in it"
    last = path[-1]
    if isinstance(at, dict):
        at[str(last)] = value
    elif isinstance(at, list) and isinstance(last, int) and last < len(at):
        at[last] = value
    else:
        return f"{where}: {dotted(path[:-1])} is {at!r}, which has no {last!r} in it"
    for old in [p for p in places if p[: len(path)] == path]:
        del places[old]
    places |= {(*path, *more): where for more in inner} | {path: where}
    return ""
