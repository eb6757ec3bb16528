"""A model back out as a Hugging Face folder that transformers loads."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import MethodError, refuse
from ..methods.method import adapters
from ..models.base import Model
from ..models.config import HEAD_POOLING, OUR_TYPE
from ..models.heads import LastTokenClassifier
from ..models.hub import whole_shapes
from ..models.names import LEAF_NAMES, Named, parameters, renamed
from ..models.packed import declaration, expresses, pack
from ..models.tensors import replacing, write_tensors
from ..quant import NF4, is_quantized
from .padding import padding_of, padding_with

OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
SHARD_BYTES = 5_000_000_000


def save_model(model: Model, folder: str | Path, tokenizer: Any = None, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write config, weights and tokenizer; the weights in the model's dtype, in one file or, above a size, in shards.

    A classifier whose head reads another vector than its family's (`config.head_pooling`) is of a `model_type` of ours,
    `jaxft_bert` say, which `jaxft.load` reads and transformers refuses. How `pooled` pools, whether embeddings are
    normalised and their length are not in such a folder: `jaxft.save_sentence_transformer` writes these.

    A classifier on a causal model gets a pad token that is not the end token, where the tokenizer has one: by it
    transformers finds the last token of a row.

    Quantised kernels are written as they are, NF4 as bitsandbytes' layout of the hub has it (`models.packed`), which
    transformers reads too, int8 for `jaxft.load` alone; read again, nothing is quantised anew.

    Args:
        model: A model without adapters (`jaxft.merge` folds them in), `state.model` after `Full` say.
        folder: Where to; made if it is not there. Its files are replaced together.
        tokenizer: Written beside it, if given; of a vision model, its `ImageProcessor`.
        shard_bytes: Size of a file at most, where one tensor is not larger by itself.

    Returns:
        The folder.

    Raises:
        MethodError: The model carries adapters, or kernels that are quantised in ways which the layout cannot say.

    >>> import jaxft, tempfile
    >>> sorted(p.name for p in jaxft.save_model(jaxft.testing.tiny_llama(), tempfile.mkdtemp()).iterdir())
    ['config.json', 'model.safetensors']
    """
    if not isinstance(model, Model) or any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model)):
        what = "has shapes for arrays" if isinstance(model, Model) else f"is a {type(model).__name__}"
        raise MethodError(f"a model of jaxft with its weights is expected, this {what} (of a state: state.model)")
    if adapters(model):
        raise MethodError(
            f"the model carries adapters ({', '.join(adapters(model))}): jaxft.merge(model) folds them in"
        )
    places = {
        f"{name}.{LEAF_NAMES[leaf]}": (named, leaf, variable, i)
        for named, leaf, variable in parameters(model)
        for i, name in enumerate(named.names)
    }
    _refuse_unreadable(model, set(places))
    bare = ((rf"^{model.stem}\.", ""),) if getattr(model, "lm_head", model) is None else ()  # as it was read
    places = {renamed(name, (*model.written, *bare)): place for name, place in places.items()}
    sizes = {name: _size(model, *place) for name, place in places.items()}
    shards, config = _shards(sizes, shard_bytes), {**_config(model), **_quantization(model)}
    weight_map: dict[str, str] = {}
    if isinstance(model, LastTokenClassifier) and model.head_pooling is None:
        pad = padding_of(tokenizer, model.config)
        config, tokenizer = {**config, "pad_token_id": pad}, padding_with(tokenizer, pad)
    with replacing(Path(folder)) as scratch:
        for file, names in shards.items():
            tensors = {part: x for name in names for part, x in _tensors(model, name, *places[name]).items()}
            write_tensors(scratch / file, tensors)
            weight_map |= dict.fromkeys(tensors, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        (scratch / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        if model.config.stop_ids:
            stops = {"eos_token_id": list(model.config.stop_ids)}
            (scratch / "generation_config.json").write_text(json.dumps(stops), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    kept = {*shards, *(["model.safetensors.index.json"] if len(shards) > 1 else [])}
    for old in Path(folder).iterdir():
        if OURS.fullmatch(old.name) and old.name not in kept:
            old.unlink()  # of an earlier model in this folder, which a loader would take for this one's
    return Path(folder)


def _refuse_unreadable(model: Model, names: set[str]) -> None:
    """Refuse leaves that a reader of the folder, ours or transformers, would not look for."""
    like = whole_shapes(model.config_class.from_raw(_config(model)))
    readable = {f"{name}.{LEAF_NAMES[leaf]}" for named, leaf, _ in parameters(like) for name in named.names}
    refuse(
        MethodError,
        f"a folder of model_type {model.model_type!r} cannot hold what was merged into this model",
        [f"{name} is no tensor of a {model.model_type}: keep the adapter" for name in sorted(names - readable)],
    )


def _size(model: Model, named: Named, leaf: str, variable: Any, index: int) -> int:
    """Return about how many bytes a leaf's tensors take, of one layer."""
    del leaf, index
    value = variable.get_value()
    whole = value.nbytes if is_quantized(value) else math.prod(value.shape) * np.dtype(model.dtype).itemsize
    return int(whole) // (len(named.names) if named.stacked else 1)


def _tensors(
    model: Model, name: str, named: Named, leaf: str, variable: Any, index: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a leaf, of one layer, by name: one, or the parts of a quantised kernel."""
    value = variable.get_value()
    if is_quantized(value):
        return pack(name, jax.tree.map(lambda x: x[index], value) if named.stacked else value, model.dtype)
    value = np.asarray((value[index] if named.stacked else value).astype(model.dtype))
    return {name: value.T if leaf == "kernel" and variable.get_metadata("transposed") else value}


def _quantization(model: Model) -> dict[str, Any]:
    """Return the key of `config.json` that says how kernels are quantised, if any are.

    Raises:
        MethodError: Kernels that are quantised in ways that no folder can say.
    """
    linear = [(named, variable.get_value()) for named, leaf, variable in parameters(model) if leaf == "kernel"]
    held = {named.path: value for named, value in linear if is_quantized(value)}
    if not held:
        return {}
    ways = {(type(value), getattr(value, "double", None)) for value in held.values()}
    odd = [path for path, value in held.items() if isinstance(value, NF4) and not expresses(value)]
    refuse(
        MethodError,
        "kernels that the layout of quantised folders cannot hold",
        [f"{path} is NF4 in another block or order than jaxft.load(..., quantize='nf4') makes" for path in odd]
        + ([f"there are {len(ways)} ways to quantise in this model, and a folder has one"] if len(ways) > 1 else []),
    )
    like = next(iter(held.values()))
    kept = [name for named, value in linear if not is_quantized(value) for name in named.names]
    if getattr(model, "lm_head", None) is not None and "lm_head" not in kept:
        kept.append("lm_head")
    whole = [renamed(name, model.written) for name in kept]
    kind = "nf4" if isinstance(like, NF4) else "int8"
    return {"quantization_config": declaration(kind, model.dtype, getattr(like, "double", False), whole)}


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Fill files one after the other, each up to the limit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _config(model: Model) -> dict[str, Any]:
    raw = json.loads(model.config.raw)
    gone = ("torch_dtype", "dtype", "_name_or_path", "num_labels", "quantization_config")
    for old in (*gone, *class_keys(("x",)), HEAD_POOLING):
        raw.pop(old, None)
    ours = model.head_pooling is not None  # transformers has no such heads, and refuses a model_type that it has not
    return {
        **raw,
        "architectures": [f"Jaxft{type(model).__name__}" if ours else type(model).__name__],
        "model_type": f"{OUR_TYPE if ours else ''}{model.model_type}",
        "dtype": np.dtype(model.dtype).name,
        **class_keys(model.config.labels),
        **({HEAD_POOLING: model.head_pooling} if ours else {}),
        **model.config_keys(),
    }


def class_keys(labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the keys of `config.json` that name the classes of a head: one alone is a regression's.

    >>> class_keys(("bad", "good"))["label2id"]
    {'bad': 0, 'good': 1}
    """
    if not labels:
        return {}
    kind = "regression" if len(labels) == 1 else "single_label_classification"
    named = {str(i): label for i, label in enumerate(labels)}
    return {"id2label": named, "label2id": {label: int(i) for i, label in named.items()}, "problem_type": kind}
