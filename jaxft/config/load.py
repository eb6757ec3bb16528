"""A config file in, a `Config` out; or one error that names everything that is wrong with it."""

import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path as File
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML

from ..errors import ConfigError, JaxftError, nearest, refuse
from ..methods import METHODS
from .preferences import Grpo
from .schema import FORMATS, Config, Train, frozen, keys_at, make_one
from .tree import Path, Places, dotted, parse, path_of, place_of, put

ADAPTER = "name: lora, target_modules: all-linear"
KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "tuple_type": "a list",
    "too_short": "at least one item",
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
    _normal(tree, places)
    faults = [*_method_problems(tree, places), *_together(tree, places)]
    problems += [f"{place_of(path, places)}: {dotted(path)}: {what}" for path, what in faults]
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
    except OSError as error:
        raise ConfigError(f"{file}: it cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _override(tree: Any, places: Places, override: str) -> list[str]:
    key, equals, text = override.partition("=")
    where = f"--set {key}"
    if not equals or not all(key.split(".")):
        return [f"--set {override}: give key.sub=value"]
    path = path_of(key)
    value, inner, problems = parse(text, where, path)
    if problems:
        return problems
    wrong = put(tree, places, path, value, inner, where)
    return [wrong] if wrong else []


def _normal(tree: dict[str, Any], places: Places) -> None:
    """Write short forms out: a source as a list of sources with format and name, one method as a list of one."""
    for holder in _holders(tree).values():
        method = holder.get("method")
        holder["method"] = method if method is None or isinstance(method, list) else [method]
    for task in ("ppo", "grpo"):
        section = tree.get(task)
        if isinstance(section, dict) and isinstance(section.get("reward"), (str, dict, list)):
            terms = _listed(section["reward"], (task, "reward"), places)
            section["reward"] = [{"reward": term} if isinstance(term, str) else term for term in terms]
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    for key in ("train", "eval"):
        given = data.get(key)
        if given is None:
            continue
        given = _listed(given, ("data", key), places)
        sources: list[Any] = [{"path": source} if isinstance(source, str) else source for source in given]
        data[key] = sources
        fields = [source for source in sources if isinstance(source, dict)]
        taken = [source.get("name") for source in fields]
        for source in fields:
            if source.get("format") is None:
                source["format"] = data.get("format")
            if source["format"] is None:
                del source["format"]
            if source.get("name") is None:
                stem = File(str(source.get("path", ""))).name.split(".")[0] or "data"
                names = [stem, *(f"{stem}_{n}" for n in range(2, len(sources) + 2))]
                source["name"] = next(name for name in names if name not in taken)
                taken.append(source["name"])


def _listed(given: Any, path: Path, places: Places) -> list[Any]:
    """Return what may be one or a list as a list; what is inside the one is found under its place in the list too."""
    if isinstance(given, list):
        return given
    n = len(path)
    places |= {(*path, 0, *p[n:]): where for p, where in [*places.items()] if p[:n] == path}
    return [given]


def _holders(tree: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Return what may hold a method, by path: the config itself, and what is compared."""
    compared = tree.get("compare")
    entries = compared.items() if isinstance(compared, dict) else ()
    return {(): tree, **{("compare", name): entry for name, entry in entries if isinstance(entry, dict)}}


def _method_problems(tree: dict[str, Any], places: Places) -> Iterator[tuple[Path, str]]:
    for path, holder in _holders(tree).items():
        several = (*path, "method", 0) in places
        for i, part in enumerate(holder["method"] or ()):
            here: Path = (*path, "method", i) if several else (*path, "method")
            yield from (((*here, *key), what) for key, what in _option_problems(part))
        if path and holder["method"] is None and path[-1] not in METHODS:
            yield path, f"method is missing, and {path[-1]!r} is no method's name; {nearest(str(path[-1]), METHODS)}"
    section = tree.get("ppo")
    critic = section.get("critic") if isinstance(section, dict) else None
    if isinstance(critic, dict):
        yield from ((("ppo", "critic", *key), what) for key, what in _option_problems(critic))


def _option_problems(part: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield what is wrong with one method: the key inside it, () for the whole, and a sentence."""
    if not isinstance(part, dict):
        yield (), f"a mapping of name and options is expected, this is {part!r}"
        return
    name = part.get("name")
    if not isinstance(name, str) or name not in METHODS:
        what = f"unknown method {name!r}" if "name" in part else "name is missing"
        yield ("name",), f"{what}; {nearest(str(name), METHODS)}"
        return
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    hints = get_type_hints(METHODS[name])
    sound = {"name": name}
    for key, value in part.items():
        if key not in (*known, "name"):
            yield (key,), f"{name} has no such option; {nearest(key, known) if known else 'it has none'}"
        elif key != "name" and (wrong := _mistyped(frozen(value), hints[key])):
            yield (key,), wrong
        else:
            sound[key] = value
    try:
        make_one(sound)
    except JaxftError as error:  # its own checks: of several, each on a line that begins with the option
        lines = [line.removeprefix("  - ") for line in str(error).splitlines()]
        for line in lines[1:] or lines:
            key = re.split(r"[=\[:]", line, maxsplit=1)[0]
            yield ((key,) if key in known else ()), line


def _mistyped(value: Any, hint: Any) -> str:
    """Return how a value is not of the type that the field has, "" if it is."""
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        faults = error.errors()
        depth = max(len(fault["loc"]) for fault in faults)  # of "text or a list of text", the one that came furthest
        deepest = [fault for fault in faults if len(fault["loc"]) == depth]
        kinds = dict.fromkeys(KINDS.get(fault["type"], fault["msg"]) for fault in deepest)
        given = deepest[0]["input"]
        return f"{' or '.join(kinds)} is expected, this is {list(given) if isinstance(given, tuple) else given!r}"
    return ""


def _together(tree: dict[str, Any], places: Places) -> Iterator[tuple[Path, str]]:
    """Check what must fit across sections; on the tree, so that another fault in one of them hides nothing."""
    sections = (tree.get(key) for key in ("data", "optimizer", "train", "evaluation"))
    data, optimizer, train, evaluation = (section if isinstance(section, dict) else {} for section in sections)
    model = tree.get("model")
    if isinstance(model, dict):
        if model.get("path") is None and model.get("config") is None:
            yield ("model", "path"), "it is missing (or model.config, a shape without weights, for jaxft plan)"
        if model.get("config") is not None and model.get("init") == "random":
            yield ("model", "config"), "random weights take the shape of model.path: leave it out"
        if model.get("quantize") is not None:
            yield from _of_quantized(tree, model["quantize"], places)
    yield from _of_task(tree, data, evaluation)
    warmup, steps = optimizer.get("warmup_steps"), train.get("steps")
    if type(warmup) is int and type(steps) is int and 1 <= steps <= warmup:
        yield ("optimizer", "warmup_steps"), f"{warmup} of {steps} steps: none would be left"
    if data.get("eval") is None and (evaluation.get("exact_match") is True or evaluation.get("scores")):
        yield ("evaluation",), "answers are compared on held-out rows: set data.eval"


def _of_quantized(tree: dict[str, Any], kind: Any, places: Places) -> Iterator[tuple[Path, str]]:
    """Check that nothing is to be trained that a quantised base holds."""
    found = {(*path, "method"): holder.get("method") for path, holder in _holders(tree).items()}
    found |= {path: [tree["ppo"].get("critic")] for path in [("ppo", "critic")] if isinstance(tree.get("ppo"), dict)}
    for path, parts in found.items():
        for i, part in enumerate(parts or ()):
            if isinstance(part, dict) and part.get("name") == "full":
                at: Path = (*path, i, "name") if (*path, i) in places else (*path, "name")
                what = f"full trains every kernel, and those of a base with model.quantize: {kind} are codes without a "
                yield at, f"{what}gradient: train an adapter ({ADAPTER}), or leave model.quantize out"


def _of_task(tree: dict[str, Any], data: Any, evaluation: Any) -> Iterator[tuple[Path, str]]:
    """Check that formats, sections and options are those of the task."""
    task = tree.get("task")
    if not isinstance(task, str) or task not in FORMATS:
        return
    for key in ("train", "eval"):
        sources = data.get(key)
        for i, source in enumerate(sources if isinstance(sources, list) else ()):
            form = source.get("format") if isinstance(source, dict) else None
            if isinstance(form, str) and form not in FORMATS[task] and any(form in known for known in FORMATS.values()):
                at: Path = ("data", key, i, "format")
                yield at, f"task {task} reads {', '.join(FORMATS[task])}, this is {form!r}"
    for name in FORMATS:
        if name != task and tree.get(name) is not None:
            yield (name,), f"this section is for task: {name}, and the task is {task}"
    grpo, train = (section if isinstance(section := tree.get(key), dict) else {} for key in ("grpo", "train"))
    size = grpo.get("group_size", Grpo.model_fields["group_size"].default)
    rows = train.get("batch_size", Train.model_fields["batch_size"].default)
    if task == "grpo" and type(size) is int and type(rows) is int and size > 1 and rows % size:
        what = f"{rows} answers are no whole number of groups of {size} (grpo.group_size): take a multiple of {size}"
        yield ("train", "batch_size"), what
    dpo, reward = (section if isinstance(section := tree.get(key), dict) else {} for key in ("dpo", "reward"))
    if task == "dpo" and dpo.get("kind") in ("hinge", "ipo") and dpo.get("label_smoothing"):
        what = f"{dpo['kind']} has none: leave it out, or take kind sigmoid or robust"
        yield ("dpo", "label_smoothing"), what
    if task == "reward" and reward.get("margin") and "ranking" in _formats(data):
        yield ("reward", "margin"), "rows of format ranking have none; leave it out"
    if task in ("ppo", "grpo") and tree.get(task) is None:
        yield (task,), f"it is missing: answers need a reward, as in `{task}: {{reward: runs/reward}}`"
    if task != "sft":
        if data.get("packing") is True:
            yield ("data", "packing"), f"only task: sft packs rows, and the task is {task}"
        if data.get("template") is not None:
            yield ("data", "template"), f"only task: sft has instructions, and the task is {task}"
        for key in ("exact_match", "scores"):
            if evaluation.get(key):
                yield ("evaluation", key), f"it compares written answers, which task: {task} has none of"


def _formats(data: Any) -> list[Any]:
    """Return the formats of all sources."""
    listed = [sources for key in ("train", "eval") if isinstance(sources := data.get(key), list)]
    return [source.get("format") for sources in listed for source in sources if isinstance(source, dict)]


def _explained(error: ValidationError, places: Places) -> list[tuple[str, str]]:
    """Return the key and a line for each fault that pydantic has found."""
    lines = []
    for fault in error.errors():
        key = (fault.get("ctx") or {}).get("key")
        loc: Path = (*fault["loc"], *(path_of(key) if key else ()))
        value = fault["input"]
        if fault["type"] == "too_short" and value:
            continue  # its items are wrong, and are named themselves
        inner = loc[2:] if loc[0] == "compare" else loc
        if inner[:1] == ("method",) and len(inner) > 1:
            continue  # named by its own check
        if loc[-1] == "format" and loc not in places and fault["type"] != "missing":
            continue  # it came from data.format, which is named itself
        if fault["type"] == "extra_forbidden":
            what = f"unknown key; {nearest(str(loc[-1]), keys_at(loc[:-1]))}"
        elif fault["type"] == "missing":
            what = "it is missing" + (", here and as data.format" if loc[-1] == "format" else "")
        elif fault["type"] == "literal_error":
            allowed = fault["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
            what = f"{value!r} is not one of {allowed}" if value is not None else f"give one of {allowed}"
        else:
            message = fault["msg"][:1].lower() + fault["msg"][1:]
            kind = KINDS.get(fault["type"])
            what = f"{kind} is expected" if kind else message.removeprefix("input ")
            what += "" if fault["type"] == "jaxft" else f", this is {value!r}{_hint(fault['type'], value)}"
        lines.append((dotted(loc), f"{place_of(loc, places)}: {dotted(loc)}: {what}"))
    return lines


def _hint(kind: str, value: Any) -> str:
    number = r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(number, value):
        return " (text: take the quotes away)"
    return ""


def _line(problem: str) -> tuple[int, str]:
    found = re.match(r".*?:(\d+): ", problem)
    return (int(found[1]) if found else 0, problem)
