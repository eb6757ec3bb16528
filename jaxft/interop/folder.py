"""Adapter folders: peft's or the adapters library's where they know the method, else one that only jaxft reads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError, MethodError, refuse
from ..methods import ADDED, METHODS, Adapter, Full, Method
from ..methods.heads import copied_heads, copy_heads, drop_heads, trained
from ..methods.method import adapters, attach, copy_tree, parts_of, register
from ..methods.partition import attached
from ..methods.switch import all_off, set_adapter
from ..models.hub import same_classes
from ..models.layers import Embed
from ..models.names import named_modules
from ..models.placement import place
from ..models.tensors import Tensors, read_json, replacing, write_tensors
from . import adapters as library
from .entries import PREFIX, Entry, entries, fill_entries
from .peft import FORMATS, common, config_of, heads_of, key_of, method_of, without_heads

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LABELS = "labels.json"  # beside the copy of a head: names of its classes and what it reads, which peft does not look at
CONVERT = "PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"


def save_adapter(model_or_state: Any, folder: str | Path, *, name: str | None = None) -> Path:
    """Write an adapter: what its method trains, and nothing else.

    Where peft knows the method (LoRA, IA3, prefixes, prompts) the folder is peft's, and its
    `PeftModel.from_pretrained` gives the same numbers; what peft would lose (the encoder that makes a prompt) stands
    beside it, for `load_adapter` alone. Of `Adapter` it is the adapters library's, where that has the family (GPT-2,
    Llama, Mistral, BERT, RoBERTa) and the option: read it there with
    `model.load_adapter(folder, use_safetensors=True)`. For what neither knows (BitFit, compositions) it looks as
    peft's, names the method, and only `load_adapter` reads it. The copy of a new head stands where each of these puts
    it; the names of its classes, and how what it reads is pooled, in `labels.json`. On an error the folder's old
    files stay.

    Args:
        model_or_state: A `TrainState`, or a model that carries the adapter.
        folder: Where to; made if it is not there.
        name: The adapter's name; by default the state's, or "default".

    Returns:
        The folder.

    Raises:
        MethodError: There is no such adapter, the method trains the whole model (`jaxft.save_model` writes that) or is
            your own and not registered, or the model has shapes for arrays.

    >>> import jaxft, tempfile
    >>> model = jaxft.attach(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2))
    >>> sorted(p.name for p in jaxft.save_adapter(model, tempfile.mkdtemp()).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    model, name, method = chosen(model_or_state, name)
    if any(isinstance(part, Full) for part in parts_of(method)):
        raise MethodError("Full trains the whole model, so there is no adapter: write it with jaxft.save_model")
    weights, form, heads = WEIGHTS, form_of(method, model, name), copied_heads(model, name)
    if isinstance(method, Adapter) and form == "adapters":
        weights, config = library.WEIGHTS, library.config_of(method, model, name)
    elif form == "peft":
        lacking = own_config(method, model) if FORMATS[type(method)].lacks(method) else {}
        config = {**lacking, **config_of(method, model, heads)}
    else:
        config = {**own_config(method, model), **({"modules_to_save": list(heads)} if heads else {})}
    flags = trained(model, method, name)
    places = entries(model, name, lambda path, _: flags[path])
    theirs = weights == library.WEIGHTS
    tensors = library.files(places, name) if theirs else {weights: renamed(places, config)}
    texts = {CONFIG: config}
    if heads:
        texts[LABELS] = {"labels": model.config.labels, "head_pooling": model.head_pooling}
    if library.HEAD in tensors:
        texts[library.HEAD_CONFIG] = library.head_config(model)
    with replacing(Path(folder)) as scratch:
        for file, held in tensors.items():
            write_tensors(scratch / file, {key: entry.read() for key, entry in held.items()})
        for file, text in texts.items():
            (scratch / file).write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for old in {WEIGHTS, LABELS, library.WEIGHTS, library.HEAD, library.HEAD_CONFIG} - {*tensors, *texts}:
        (Path(folder) / old).unlink(missing_ok=True)  # of an earlier adapter, which the new config does not describe
    return Path(folder)


def form_of(method: Method, model: Any, name: str) -> str:
    """Return whose folder an adapter is written as: `"peft"`, `"adapters"`, or `"jaxft"` where neither can say it.

    Neither can say that a head reads another vector than its family's.
    """
    if copied_heads(model, name) and model.head_pooling is not None:
        return "jaxft"
    if isinstance(method, Adapter) and library.expresses(method, model):
        return "adapters"
    form = FORMATS.get(type(method))
    return "peft" if form is not None and form.says(method) else "jaxft"


def chosen(model_or_state: Any, name: str | None) -> tuple[Any, str, Method]:
    """Return the model, and name and method of the adapter of it that is meant.

    Raises:
        MethodError: There is no such adapter, or the model has shapes for arrays.
    """
    is_state = hasattr(model_or_state, "trainable")
    model = model_or_state.model if is_state else model_or_state
    name = name or (model_or_state.name if is_state else "default")
    method = adapters(model).get(name) or (model_or_state.method if is_state and name == model_or_state.name else None)
    if method is None:
        raise MethodError(f"no adapter {name!r} to save; the model carries {sorted(adapters(model)) or 'none'}")
    check_whole(model, "save its adapters")
    return model, name, method


def check_whole(model: Any, purpose: str) -> None:
    """Refuse a model that has shapes for arrays."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        raise MethodError(f"this model has shapes for arrays (abstract=True): load it whole to {purpose}")


def load_adapter(model: Any, folder: str | Path, *, name: str = "default") -> Any:
    """Return a new model with an adapter from a folder of jaxft's, of peft's or of the adapters library's.

    It becomes active if no other adapter is; else it waits for `set_adapter`. Nothing of the others changes.

    Args:
        model: The base that the adapter was trained on, with or without other adapters.
        folder: The folder that holds `adapter_config.json`.
        name: The name it gets here.

    Returns:
        The new model; the given one stays as it is.

    Raises:
        CheckpointError: Files missing or damaged, options that are not supported or do not fit this model, tensors that
            are missing, left over, of another shape or not finite: each is named.
        MethodError: The name is taken or no name, or the model has shapes for arrays.
        SelectionError: A name in the config matches nothing in this model.

    >>> import jaxft, tempfile
    >>> base = jaxft.testing.tiny_llama()
    >>> folder = jaxft.save_adapter(jaxft.attach(base, jaxft.LoRA(r=2)), tempfile.mkdtemp())
    >>> jaxft.adapters(jaxft.load_adapter(base, folder, name="french"))["french"].r
    2
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the one that holds {CONFIG}")
    config = read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    theirs = library.is_folder(config)
    if config.get("task_type") == "SEQ_CLS" and getattr(model, "task_type", "SEQ_CLS") != "SEQ_CLS":
        raise CheckpointError(
            f"{where}: the adapter of a classifier, and this {type(model).__name__} has no head: load its base with "
            "jaxft.load(..., labels=...)"
        )
    if theirs:
        method: Method = library.method_of(config, model, where)
    else:
        plain = without_heads(config, model)
        method = (own_method(config, where) if "jaxft_method" in config else method_of(plain, where)).loaded()
    if name in adapters(model):
        raise MethodError(f"the model already has an adapter {name!r}: give another name, or jaxft.detach it first")
    attach(model, Method(), name=name)  # nothing: what is wrong with the model or the name is not the folder's mistake
    check_whole(model, "load an adapter")
    try:
        fresh = copy_tree(attached(all_off(model), method, name=name))
    except MethodError as error:
        raise CheckpointError(f"{where}: {error}") from None
    heads = library.heads_of(folder, model) if theirs else heads_of(config, model)
    if heads:
        check_classes(folder, model)
        check_pooling(folder, model)
        copy_heads(fresh, method, name, heads)
    else:
        drop_heads(fresh, name)  # it was trained on a model without one
    if name not in adapters(fresh):
        register(fresh, name, method)
    flags = trained(fresh, method, name)
    places = entries(fresh, name, lambda path, _: flags[path])
    files = library.files(places, config["name"]) if theirs else {WEIGHTS: renamed(places, config)}
    for weights, held in files.items():
        with Tensors(folder, weights, library.CONVERT if theirs else CONVERT) as tensors:
            if weights == library.WEIGHTS:
                library.check_names(tensors, config["name"], where)
                library.check_head(folder, fresh)
            spots = held if theirs else _bare(held, tensors, getattr(fresh, "prefix", ""))
            check_tensors(tensors, spots, fresh, folder / weights)
            fill_entries(spots, tensors.read)
    fresh = place(fresh)
    if name not in adapters(fresh):
        return fresh
    old = model.adapter_weights.get_value() if adapters(model) else jnp.zeros(0)
    mine = jnp.full((*old.shape[:-1], 1), 0.0 if bool((old != 0).any()) else 1.0)
    return set_adapter(fresh, jnp.concatenate([old, mine], -1))


def renamed(places: dict[str, Entry], config: dict[str, Any]) -> dict[str, Entry]:
    """Return the entries by the names that they have in a folder of this config."""
    return {key_of(key, config): entry for key, entry in places.items()}


def read_labels(folder: Path) -> tuple[str, ...] | None:
    """Return the names of the classes of the head that an adapter's folder has a copy of; None where it says none."""
    if not (folder / LABELS).is_file():
        return None
    return tuple(map(str, read_json(folder / LABELS).get("labels") or ())) or None


def check_classes(folder: Path, model: Any) -> None:
    """Refuse a head for other classes than the model's, or for them in another order, as far as both have names."""
    named, labels = read_labels(folder) or library.read_labels(folder), model.config.labels
    if named and not same_classes(named, labels) and not same_classes(labels, named):
        raise CheckpointError(
            f"{folder}: its head is for the classes {list(named)}, this model's for {list(labels)}: load the base with "
            f"jaxft.load(..., labels={named!r})"
        )


def check_pooling(folder: Path, model: Any) -> None:
    """Refuse a head that reads another vector than this model's does."""
    said = read_json(folder / LABELS).get("head_pooling") if (folder / LABELS).is_file() else None
    if said == model.head_pooling:
        return
    own = f"what {type(model).__name__} itself reads"
    theirs, ours = (own if mode is None else f"a vector pooled by {mode!r}" for mode in (said, model.head_pooling))
    give = (
        "give jaxft.loading.with_config(model, head_pooling=None)"
        if said is None
        else f"give jaxft.loading.with_pooling(model, {said!r}); in a run's config it is model.pooling"
    )
    raise CheckpointError(f"{folder}: its head reads {theirs}, this model's {ours}: {give}")


def _bare(places: dict[str, Entry], tensors: Tensors, prefix: str) -> dict[str, Entry]:
    """Return the entries without the backbone's name, where the file is of an adapter on a backbone alone."""
    whole = f"{PREFIX}{prefix}."
    if not prefix or any(name.startswith(whole) for name in tensors.shapes):
        return places
    return {PREFIX + k.removeprefix(whole) if k.startswith(whole) else k: e for k, e in places.items()}


def check_tensors(tensors: Tensors, places: dict[str, Entry], model: Any, file: Path) -> None:
    """Refuse an adapter file whose tensors are not those of its config and this base."""
    repeated = {k: base for k in tensors.shapes if (base := _repeated(k, model)) is not None and k not in places}
    shapes = tensors.shapes
    refuse(
        CheckpointError,
        f"{file} does not fit its {CONFIG} and this base model",
        [
            f"{k} is {shapes[k]} in the file, {e.shape} in this model"
            for k, e in places.items()
            if shapes.get(k, e.shape) != e.shape
        ]
        + [f"{k} is missing" for k in places if k not in shapes]
        + [f"{k} is {tensors.kinds[k]}; weights are floats" for k in places if tensors.integer(k)]
        + [f"{k} belongs to no module that the config names" for k in shapes if k not in places and k not in repeated]
        + [f"{k} differs from the base model's tensor" for k, base in repeated.items() if not _same(tensors, k, base)],
    )
    poisoned = {k: n for k in places if (n := tensors.non_finite(k))}
    refuse(
        CheckpointError,
        f"{file}: damaged weights",
        [f"{k} has {n} values that are NaN or infinite" for k, n in poisoned.items()],
    )


def _repeated(key: str, model: Any) -> Any:
    """Return the base's own table, if a tensor is only peft's copy of it beside an adapted embedding or head."""
    if not key.endswith(".base_layer.weight"):
        return None
    module = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    if module == "lm_head" and hasattr(model, "tied_kernel"):
        kernel = model.tied_kernel() if model.lm_head.kernel is None else model.lm_head.kernel.get_value()
        return kernel.T
    tables = [n.module for n in named_modules(model) if n.path == module and isinstance(n.module, Embed)]
    return tables[0].embedding.get_value() if tables else None


def _same(tensors: Tensors, key: str, base: Any) -> bool:
    return tensors.shapes[key] == base.shape and np.array_equal(tensors.read(key), np.asarray(base, np.float32))


def own_config(method: Method, model: Any) -> dict[str, Any]:
    """Return the `adapter_config.json` of a method that peft does not know."""
    names = {cls: key for key, cls in {**METHODS, **ADDED}.items()}
    unnamed = [type(part).__name__ for part in parts_of(method) if type(part) not in names]
    if unnamed:
        raise MethodError(f"{', '.join(unnamed)} has no entry in jaxft.methods.METHODS, so no folder can name it")
    parts = [{"name": names[type(part)], **dataclasses.asdict(part)} for part in parts_of(method)]
    return {**common("JAXFT", model), "jaxft_method": parts}


def own_method(config: dict[str, Any], where: str) -> Method:
    """Return the method that an own `adapter_config.json` names."""
    made = []
    parts = config["jaxft_method"]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{where}: jaxft_method is a list of methods, each with its name and options")
    for part in parts:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in part.items() if k != "name"}
        try:
            made.append({**METHODS, **ADDED}[part["name"]](**options))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: no method of jaxft is made by {part!r} ({error})") from None
        except MethodError as error:
            raise CheckpointError(f"{where}: {error}") from None
    if any(isinstance(part, Full) for part in made):
        raise CheckpointError(f"{where}: Full trains the whole model, which no adapter's folder holds: use jaxft.load")
    whole = made[0]
    for part in made[1:]:
        whole = whole | part
    return whole
