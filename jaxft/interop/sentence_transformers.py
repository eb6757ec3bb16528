"""A model out as a sentence-transformers folder, in the layout of old, which its versions from 2 to 6 load."""

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..embedding import longest
from ..errors import MethodError
from ..methods import IA3, LoRA
from ..methods.method import adapters
from ..models.sentence_folder import FLAGS, MODULES, SETTINGS, THEIRS, TRANSFORMER, read_sentence_folder
from ..models.tensors import Tensors, read_json, replacing, write_tensors
from . import adapters as library
from .entries import PREFIX
from .export import OURS, save_model
from .folder import CONFIG, LABELS, WEIGHTS, save_adapter

NAMING = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "feedforward_modules",
)


def save_sentence_transformer(
    model: Any, folder: str | Path, tokenizer: Any = None, *, prompts: Mapping[str, str] | None = None
) -> Path:
    """Write a folder of which `SentenceTransformer(folder)` makes the same vectors as `jaxft.embed`.

    A model that carries an adapter is written as that library writes one: the adapter (a LoRA or IA3 of peft's) in the
    folder's root, and the name of the base, where that was loaded from. `jaxft.merge(model)` writes a whole model.

    Args:
        model: A model of texts, with one adapter or none. Pooling, normalisation and length are those of its config.
        folder: Where to; made if it is not there.
        tokenizer: Written beside it, with a pad token where it has none; without one only jaxft reads the folder.
        prompts: Texts to be put before texts, by their names, for `encode_query` and its like.

    Returns:
        The folder.

    Raises:
        MethodError: A model of images, one with several adapters, or with one that peft does not know.

    >>> import jaxft, tempfile
    >>> folder = save_sentence_transformer(jaxft.testing.tiny_bert(), tempfile.mkdtemp())
    >>> sorted(p.name for p in folder.iterdir() if p.suffix != ".safetensors")
    ['1_Pooling', 'config.json', 'config_sentence_transformers.json', 'modules.json', 'sentence_bert_config.json']
    >>> jaxft.load(folder)[0].config.pooling
    'mean'
    """
    folder, carried = Path(folder), adapters(model)
    if "input_ids" not in getattr(model, "inputs", ()):
        raise MethodError(f"a {type(model).__name__} reads no texts, which this folder is for: use jaxft.save_model")
    tokenizer = None if tokenizer is None else _padding(tokenizer)
    if carried:
        _save_adapter(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        others = ("config.json", LABELS, library.WEIGHTS, library.HEAD, library.HEAD_CONFIG)
        stale = [f.name for f in folder.iterdir() if f.name in others or OURS.fullmatch(f.name)]
    else:
        save_model(model, folder, tokenizer)
        if model.head_pooling is not None:  # they read the backbone alone, which is their own family's
            config = read_json(folder / "config.json")
            own = {"model_type": model.model_type, "architectures": [type(model).__name__]}
            _write(folder, {"config.json": {**config, **own}})
        stale = [CONFIG, WEIGHTS]
    for name in stale:
        (folder / name).unlink(missing_ok=True)  # of an earlier model, which would be taken for this one's
    kinds = ["Transformer", "Pooling", *(["Normalize"] if model.config.normalize else [])]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    mode = THEIRS.get(model.config.pooling, model.config.pooling)
    flags = {flag: theirs == mode for flag, theirs in FLAGS.items()}
    _write(folder / "1_Pooling", {"config.json": {"word_embedding_dimension": model.config.hidden_size, **flags}})
    if model.config.normalize:
        _write(folder / "2_Normalize", {"config.json": {}})
    said = {"max_seq_length": _length(model), "do_lower_case": _lowers(tokenizer)}
    settings = {"prompts": dict(prompts or {}), "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(folder, {TRANSFORMER[0]: said, SETTINGS: settings, MODULES: listed})
    return folder


def _save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter of a model by the names that its modules have in the backbone alone."""
    carried, prefix = adapters(model), f"{model.prefix}." if model.prefix else ""
    if len(carried) > 1 or not isinstance(next(iter(carried.values())), (LoRA, IA3)):
        what = ", ".join(f"{name} ({type(method).__name__})" for name, method in carried.items())
        raise MethodError(f"such a folder holds one adapter, a LoRA or IA3, and this model has {what}: merge it first")
    if not model.config.source:
        raise MethodError("the base was loaded from no folder that the adapter could name: merge it first")
    ((name, method),) = carried.items()
    if prefix and any(isinstance(getattr(method, key, None), str) for key in NAMING):
        raise MethodError("target_modules is a regular expression on names that differ there: give names, or merge it")
    with tempfile.TemporaryDirectory() as scratch:  # nothing is written to the folder before all is known to fit
        save_adapter(model, scratch, name=name)
        config = read_json(Path(scratch) / CONFIG)
        with Tensors(Path(scratch), WEIGHTS) as tensors:
            read = {key: tensors.read(key) for key in tensors.shapes}
    outside = [key for key in read if not key.startswith(PREFIX + prefix)]
    if outside:
        raise MethodError(f"{outside[0]} is no tensor of the backbone, which is all that this folder holds: merge it")
    base = Path(config["base_model_name_or_path"])
    config["base_model_name_or_path"] = (
        str(read_sentence_folder(base).transformer.resolve()) if base.is_dir() else str(base)
    )
    config["task_type"] = "FEATURE_EXTRACTION"
    with replacing(folder) as scratch:
        write_tensors(scratch / WEIGHTS, {PREFIX + key.removeprefix(PREFIX + prefix): x for key, x in read.items()})
        config |= {key: _bare(config[key], prefix) for key in NAMING if key in config}
        text = json.dumps(config, indent=2, sort_keys=True)
        (scratch / CONFIG).write_text(text + "\n", encoding="utf-8")


def _bare(value: Any, prefix: str) -> Any:
    """Return names of modules, or a table by them, without the name of the backbone."""
    if isinstance(value, dict):
        return {key.removeprefix(prefix): x for key, x in value.items()}
    return [name.removeprefix(prefix) for name in value] if isinstance(value, (list, tuple)) else value


def _padding(tokenizer: Any) -> Any:
    """Return a tokenizer that can pad, on the right, where every family counts its positions from."""
    made = copy.deepcopy(tokenizer)
    made.padding_side = "right"
    if made.pad_token is None:
        made.pad_token = made.eos_token or made.unk_token
    return made


def _lowers(tokenizer: Any) -> bool:
    """Tell whether a tokenizer is one of `do_lower_case`."""
    normalizer: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return type(normalizer).__name__ == "Sequence" and type(normalizer[0]).__name__ == "Lowercase"


def _length(model: Any) -> int | None:
    """Return how many tokens a text may have, by the model or what its config says; None: as many as it has."""
    there = json.loads(model.config.raw).get("max_position_embeddings")
    return longest(model) if longest(model) < 1 << 30 else there


def _write(folder: Path, files: Mapping[str, Any]) -> None:
    with replacing(folder) as scratch:
        for name, content in files.items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
