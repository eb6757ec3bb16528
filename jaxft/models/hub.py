"""A Hugging Face folder or hub id in, a model out: a walk over the mirrored names, tensor by tensor into place."""

import dataclasses
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..errors import CheckpointError, MethodError, refuse
from ..quant import is_quantized
from ..quant import quantize as quantized
from ..quant.model import KINDS
from . import CLASSIFIERS, FAMILIES
from .assemble import assemble, disk_shape
from .base import Model
from .config import OUR_TYPE, class_names, token_ids, unnamed
from .layers import normal
from .names import LEAF_NAMES, parameters, renamed
from .packed import declared, fold
from .placement import place
from .seams import number
from .sentence_folder import read_sentence_folder
from .tensors import CONVERT, Tensors, read_json
from .ways import as_packed, ways_declared, ways_on_disk

log = logging.getLogger("jaxft")

NEEDED = ["*.json", "*.model", "*.txt", "*.jinja", "*.safetensors"]


def resolve(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """Return the folder of a model: the one given, or a snapshot from the hub (downloaded, or from its cache)."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and model.safetensors")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=NEEDED if weights else NEEDED[:-1]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path_or_hub_id}: no such folder here, and the hub gave none ({type(error).__name__}: {reason}). "
            "Check the spelling; a run must have been trained first; for a private model log in with `hf auth login`; "
            "offline, give a local folder"
        ) from None


def read_config(folder: Path, **options: Any) -> Any:
    """Read a folder's `config.json` into the record of its family, stop tokens of the generation config added.

    Of a sentence-transformers folder its pooling and length too. Options as of `read_shape`.
    """
    said = read_sentence_folder(folder)
    folder = said.transformer
    config = read_shape(folder / "config.json", **{"source": str(folder), **options}).replace(**said.fields)
    if (folder / "generation_config.json").is_file():
        more = token_ids(read_json(folder / "generation_config.json").get("eos_token_id"))
        config = dataclasses.replace(config, stop_ids=tuple(dict.fromkeys((*config.stop_ids, *more))))
    return config


def read_shape(
    file: Path,
    *,
    dtype: Any = None,
    remat: str = "none",
    mesh: Mesh | None = None,
    source: str = "",
    labels: Sequence[str] | None = None,
) -> Any:
    """Read a `config.json` by itself; dtype and classes are those that it declares, if no others are given."""
    raw = read_json(file)
    family = FAMILIES.get(str(raw.get("model_type")).removeprefix(OUR_TYPE))
    if family is None:
        known = ", ".join(FAMILIES)
        what = "an adapter: load its base model, then jaxft.load_adapter" if "peft_type" in raw else "not supported"
        raise CheckpointError(f"{file}: model_type {raw.get('model_type')!r} is {what}; there are {known}")
    dtype = config_dtype(raw) if dtype is None else float_dtype(dtype)
    options: dict[str, Any] = {"dtype": dtype, "remat": remat, "mesh": mesh, "source": source or str(file)}
    if labels is not None:
        options["labels"] = checked_labels(labels)
    return family.config_class.from_raw(raw, **options)


def family_of(config: Any) -> type[Model]:
    """Return the class of a config's model: with a classification head where there are labels."""
    table = CLASSIFIERS if config.labels else FAMILIES
    family = next((f for f in table.values() if f.config_class is type(config)), None)
    if family is None:
        raise CheckpointError(f"labels {list(config.labels)}: there is no classification head for this family")
    return family


def abstract_model(config: Any, quantize: str | None = None) -> Model:
    """Return the model of a config with shapes for arrays: no memory, no weights.

    Args:
        config: The config. Where its `config.json` says that kernels are quantised, these are.
        quantize: `"nf4"` or `"int8"`: quantise them so, where they are not yet.

    Raises:
        CheckpointError: They are quantised in another way.
    """
    model, raw = whole_shapes(config), json.loads(config.raw)
    there = declared(raw)
    check_kind(config.source, there, quantize)
    if there is not None:
        as_packed(model, ways_declared(model, raw), config.source)
        return place(model)
    return model if quantize is None else quantized(model, quantize)


def whole_shapes(config: Any) -> Model:
    """Return the model of a config with shapes for arrays, nothing of it quantised."""
    family: Any = family_of(config)
    model = jax.eval_shape(lambda: family(config, rngs=nnx.Rngs(0)))
    shaped = lambda s: jax.ShapeDtypeStruct(s.shape, config.dtype)  # noqa: E731
    return place(jax.tree.map(shaped, model))


def fresh_model(config: Any, seed: int = 0) -> Any:
    """Return the model of a config with random parameters, in the config's dtype, on the config's mesh."""
    model = _maker(config, config.raw, config.source)(jax.random.key(seed))
    mark_new(model, family_of(config).heads)
    return model


@lru_cache(maxsize=64)
def _maker(config: Any, raw: str, source: str) -> Any:
    """Return the compiled draw of a config's parameters, of a key; configs that differ in these alone are equal."""
    del raw, source
    family: Any = family_of(config)
    where = jax.tree.map(lambda s: s.sharding, whole_shapes(config))

    @partial(jax.jit, out_shardings=where)
    def make(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(config.dtype), family(config, rngs=nnx.Rngs(key)))

    return make


def load_model(
    folder: Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
    remat: str = "none",
    abstract: bool = False,
    source: str = "",
    labels: Sequence[str] | None = None,
) -> Model:
    """Read a checkpoint folder into its family's model. Arguments, result and errors as of `jaxft.load`."""
    at = read_sentence_folder(folder).transformer
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter: load its base model, then jaxft.load_adapter(model, {str(folder)!r})"
        )
    options: dict[str, Any] = {"dtype": dtype, "remat": remat, "mesh": mesh, "source": source or str(folder)}
    config = read_config(folder, **options, labels=labels)
    raw = json.loads(config.raw)
    said = declared(raw)
    check_kind(folder, said, quantize)
    there = readable_classes(raw)
    kept = labels is None or (there is not None and same_classes(there, config.labels))
    if there and config.labels and not kept:
        log.warning("%s: its head for %s is discarded for a new one for %s", folder, list(there), list(config.labels))
    if abstract:
        model = abstract_model(config, quantize)
        mark_new(model, () if kept else tuple(path for path in model.heads if not path.startswith(f"{model.prefix}.")))
        return model
    cls = (raw.get("architectures") or ["AutoModel"])[0]  # which keeps the checkpoint's own head
    with Tensors(at, convert=CONVERT.replace("AutoModel", str(cls))) as tensors:
        tensors.packed = fold(tensors, said)
        model = whole_shapes(config.replace(dtype=tensors.dtype if dtype is None else float_dtype(dtype)))
        if tensors.packed:
            as_packed(model, ways_on_disk(tensors, disk_names(model, tensors)), folder)
            model = place(model)
        elif quantize is not None:
            model = quantized(model, quantize)
        fill(model, tensors, keep_head=kept, asked=labels is not None)
    return model


def check_kind(folder: Path | str, there: str | None, wanted: str | None) -> None:
    """Refuse an unknown way to quantise, and one that a checkpoint is not quantised in already.

    Raises:
        CheckpointError: It is one.
    """
    if wanted not in (None, *KINDS):
        raise CheckpointError(f"quantize={wanted!r}: choose one of {', '.join(map(repr, KINDS))}, or None")
    if there is not None and wanted not in (None, there):
        raise CheckpointError(
            f"{folder}: it is quantised as {there} already, and {wanted} is asked for: load the checkpoint that is not "
            "quantised, or leave quantize out"
        )


def checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return names of classes; refuse what are none, or are there twice."""
    if isinstance(labels, str) or not isinstance(labels, Iterable) or not all(isinstance(x, str) and x for x in labels):
        raise CheckpointError(
            f"labels={labels!r}: give the names of the classes, one for a regression, none for no head"
        )
    twice = sorted({x for x in labels if list(labels).count(x) > 1})
    refuse(CheckpointError, "labels: each class has one name", [f"{x!r} is there twice" for x in twice])
    return tuple(labels)


def readable_classes(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes of a checkpoint's head, () without one, None of one that is not supported."""
    try:
        return class_names(raw)
    except CheckpointError:
        return None


def same_classes(there: Sequence[str], wanted: Sequence[str]) -> bool:
    """Tell whether a checkpoint's head is for the classes that are wanted, as far as it names them.

    >>> same_classes(("LABEL_0", "LABEL_1"), ("bad", "good")), same_classes(("good", "bad"), ("bad", "good"))
    (True, False)
    """
    nameless = all(name == unnamed(i) for i, name in enumerate(there))
    return len(there) == len(wanted) and (nameless or tuple(there) == tuple(wanted))


def config_dtype(raw: dict[str, Any]) -> Any:
    """Return the dtype that a `config.json` declares; float32 where it declares none."""
    return float_dtype(raw.get("dtype") or raw.get("torch_dtype") or "float32")


def float_dtype(dtype: Any) -> Any:
    """Return a floating dtype given as one or by name; refuse anything else."""
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or not jnp.issubdtype(parsed, jnp.floating):
        raise CheckpointError(f"dtype {dtype!r}: give float32, bfloat16 or float16")
    return parsed


def fill(model: Model, tensors: Tensors, keep_head: bool = True, asked: bool = False) -> None:
    """Put every tensor of a checkpoint into its place in an abstract model; refuse what does not fit, all at once.

    A head that was asked for is made anew where the checkpoint has nothing of it, or one for other classes.

    Args:
        model: The model; its arrays become real.
        tensors: The checkpoint.
        keep_head: Whether a classification head that the checkpoint has is the one that is wanted, if any is.
        asked: Whether a head is asked for, so that it may be new.
    """
    on_disk = disk_names(model, tensors)
    leave_out(model, on_disk)
    own = getattr(model, "lm_head", None)
    others = () if keep_head or model.config.labels else CLASSIFIERS[model.model_type].heads  # a head not wanted
    bare = bool(others) or headless(model, tensors)
    if bare and "lm_head.weight" not in on_disk and own is not None and own.kernel is not None:
        setattr(model, "lm_head", nnx.data(None))  # noqa: B010 - not every model has the attribute
    everything = {
        f"{name}.{LEAF_NAMES[leaf]}": (named, leaf, variable)
        for named, leaf, variable in parameters(model)
        for name in named.names
    }

    there = {path for path in model.heads if any(name.startswith(f"{path}.") for name in on_disk)}
    new = tuple(
        path
        for path in model.heads
        if asked and (path not in there or not (keep_head or path.startswith(f"{model.prefix}.")))
    )
    begin_heads(model, new)
    dropped = tuple(f"{path}." for path in (*new, *others))
    on_disk = {name: disk for name, disk in on_disk.items() if not name.startswith(dropped)}
    wanted = {name: spot for name, spot in everything.items() if not name.startswith(dropped)}
    head: Any = getattr(model, "lm_head", None)
    spare = {"lm_head.weight"} if getattr(head, "kernel", head) is None and head is not None else set()
    disposable = re.compile(model.disposable)
    extra = [n for n in on_disk if n not in wanted and n not in spare and not disposable.fullmatch(n)]
    refuse(
        CheckpointError,
        f"{tensors.folder}: its tensors are not those of a {model.model_type} with this config.json "
        f"({model.config.num_hidden_layers} layers)",
        [f"{name} is missing" for name in wanted if name not in on_disk]
        + [f"{name} is not a tensor of this model" for name in extra]
        + [f"{n} is {tensors.kinds[on_disk[n]]}; weights are floats" for n in wanted if tensors.integer(on_disk.get(n))]
        + [
            f"{name} is {tensors.shapes[on_disk[name]]} on disk, {disk_shape(*spot)} by config.json"
            for name, spot in wanted.items()
            if name in on_disk and tensors.shapes[on_disk[name]] != disk_shape(*spot, on_disk[name] in tensors.packed)
        ],
    )
    untied = spare & set(on_disk) and not same_table(tensors, on_disk["lm_head.weight"], on_disk[table_name(model)])
    if untied:
        raise CheckpointError(
            f"{tensors.folder}: config.json says tie_word_embeddings, but lm_head.weight differs from the embedding: "
            "set tie_word_embeddings to false there"
        )
    poisoned = []
    for named, leaf, variable in parameters(model):
        if variable.get_metadata("new", False):
            continue
        sources = [on_disk[f"{name}.{LEAF_NAMES[leaf]}"] for name in named.names]
        try:
            variable.set_value(assemble(tensors, sources, variable, model.dtype))
            sound = is_quantized(variable.get_value()) or bool(_all_finite(variable.get_value()))
        except MethodError:  # of values that cannot be quantised
            sound = False
        if not sound:
            found = [f"{s} has {n} values that are NaN or infinite" for s in sources if (n := tensors.non_finite(s))]
            narrow = f"{named.path}.{leaf} has values too large for {model.dtype}: load a wider dtype"
            poisoned += found or [narrow]
    refuse(CheckpointError, f"{tensors.folder}: damaged weights; export or download the checkpoint again", poisoned)


def disk_names(model: Model, tensors: Tensors) -> dict[str, str]:
    """Return the names of a checkpoint's tensors by what they are called in the model's tree.

    Old names are translated, and the backbone's name is put in front, or taken off, where the checkpoint was written
    with another head than the model has.
    """
    stem, found = f"{model.stem}.", {}
    bare = headless(model, tensors)
    for disk in tensors.shapes:
        name = renamed(disk, model.renames)
        if not model.prefix:
            name = name.removeprefix(stem)
        elif bare and not hasattr(model, name.split(".")[0]):
            name = f"{stem}{name}"
        found[name] = disk
    return found


def headless(model: Model, tensors: Tensors) -> bool:
    """Tell whether a checkpoint is a backbone that was saved by itself."""
    return not any(name.startswith(f"{model.stem}.") for name in tensors.shapes)


def begin_heads(model: Model, paths: Sequence[str]) -> None:
    """Give new heads of an abstract model their first values: kernels from N(0, 0.02^2), biases zero.

    The seed is fixed by a module's path: a head begins alike whatever the run's seed.
    """
    mark_new(model, paths)
    for named, leaf, variable in parameters(model):
        if variable.get_metadata("new", False):
            there, rngs = variable.get_value(), nnx.Rngs(number(named.path))
            value = normal(rngs, there.shape) if leaf == "kernel" else jnp.zeros(there.shape)
            value = value.astype(there.dtype)
            variable.set_value(value if there.sharding is None else jax.device_put(value, there.sharding))


def mark_new(model: Model, paths: Sequence[str]) -> None:
    """Mark the parameters of the modules under these paths as new: whatever the method, they are trained."""
    for named, _, variable in parameters(model):
        if any(f"{named.path}.".startswith(f"{path}.") for path in paths):
            variable.set_metadata(new=True)


def leave_out(model: Model, on_disk: Mapping[str, str]) -> None:
    """Take those modules off an abstract model that it can do without and a checkpoint lacks."""
    for path in model.optional:
        if not any(name.startswith(f"{path}.") for name in on_disk):
            setattr(model, path, nnx.data(None))


def table_name(model: Model) -> str:
    """Return the name of the embedding that a tied head calls."""
    table = model.backbone.input_embedding()
    return next(f"{n.names[0]}.weight" for n, _, _ in parameters(model) if n.module is table)


def same_table(tensors: Tensors, one: str, other: str) -> bool:
    """Tell whether two tensors of a checkpoint are equal."""
    return tensors.shapes[one] == tensors.shapes[other] and np.array_equal(tensors.read(one), tensors.read(other))


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()
