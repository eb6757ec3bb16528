"""`jaxft.load`: a folder, hub id or run folder in, a model and its tokenizer out."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from .data.pixels import ImageProcessor, read_processor
from .errors import CheckpointError, RunError
from .interop.folder import load_adapter, read_labels
from .methods.method import adapters, copy_tree, detach
from .methods.partition import leaves
from .methods.switch import set_adapter
from .models.base import Model
from .models.hub import load_model, read_config, resolve
from .models.packed import declared
from .models.sentence_folder import read_sentence_folder
from .models.sharing import with_head
from .models.tensors import read_json
from .quant import NF4, Int8
from .run import RunFolder

log = logging.getLogger("jaxft")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
    remat: str = "none",
    abstract: bool = False,
    labels: Sequence[str] | None = None,
) -> tuple[Model, Any]:
    """Load a model and its tokenizer.

    Args:
        path_or_hub_id: A folder in Hugging Face layout with safetensors, one file or a sharded index, or one of
            sentence-transformers, which says how the model pools too; a hub id; or the folder of a finished run: its
            model, or the model that it began with and its adapter, active.
        dtype: Dtype of parameters and computation, `jnp.bfloat16` or `"bfloat16"` say; None: the checkpoint's own.
        mesh: Split the parameters over a mesh of `jaxft.make_mesh`; each part goes to its device as it is read.
        quantize: `"nf4"` or `"int8"`: the kernels of the layers as 4 or 8 bits, each as soon as it is read, so that the
            whole model is never there unquantised; embeddings, heads, norms and biases stay. None: as the checkpoint
            has them, which may be quantised (by `jaxft.save_model`, or as NF4 by bitsandbytes), or as a run had them.
        remat: `"none"`, or `"full"`: recompute each layer in the backward pass, for memory.
        abstract: Shapes for arrays: no weights are read (nor needed), for reports and plans.
        labels: Names of classes, one alone for a regression: the model with a classification head for them. The
            checkpoint's own is kept if it is for these (or for as many without names), else it is new: every method
            trains a new head. (): without a head; None: with one if the checkpoint has one.

    Returns:
        The model, and the tokenizer: None where the folder has none; of a vision model, its `ImageProcessor`.

    Raises:
        CheckpointError: The folder or its files are missing, damaged, of an unknown family, do not fit each other, or
            are quantised in another way; every tensor concerned is named.
        MeshError: A parameter does not divide over the mesh.

    >>> import jaxft, tempfile
    >>> folder = jaxft.save_model(jaxft.testing.tiny_llama(), tempfile.mkdtemp())
    >>> model, tokenizer = load(folder, dtype="bfloat16")
    >>> model.dtype.name, tokenizer is None
    ('bfloat16', True)
    """
    run = RunFolder(path_or_hub_id)
    if run.started:
        return load_run(run, dtype=dtype, mesh=mesh, quantize=quantize, remat=remat, abstract=abstract, labels=labels)
    folder = resolve(path_or_hub_id, weights=not abstract)
    tokenizer = load_tokenizer(folder)
    options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "remat": remat, "abstract": abstract, "labels": labels}
    options["quantize"] = quantize
    said = read_sentence_folder(folder)
    if said.adapter and said.fields:
        base = read_json(said.transformer / "adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise CheckpointError(f"{said.transformer / 'adapter_config.json'}: base_model_name_or_path is missing")
        model = load_adapter(load(base, **options)[0], said.transformer)
        return with_config(model, **said.fields), tokenizer
    model = load_model(folder, **options, source=str(path_or_hub_id))
    return model, (processor_of(model, folder) if "pixel_values" in model.inputs else tokenizer)


def processor_of(model: Any, folder: Path) -> ImageProcessor:
    """Return what makes a vision model's `pixel_values` of pictures, as its folder says."""
    return read_processor(folder, size=model.config.image_size, channels=model.config.num_channels)


def load_run(
    run: RunFolder,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
    remat: str = "none",
    abstract: bool = False,
    labels: Sequence[str] | None = None,
    over: Model | None = None,
) -> tuple[Model, Any]:
    """Return the model that a finished run has made, and its tokenizer. Arguments as of `load`.

    An adapter gets the first name that is free: "default", and over another run's adapter "default_2".

    With `over`, the causal language model that the run began with and that is in memory already, its arrays are shared
    and only adapters and heads are read. (A run with `model/` is read whole.)

    Raises:
        RunError: The run has not finished; or shapes are asked for, and it has an adapter.
    """
    if not run.finished:
        raise RunError(f"{run.path}: the run has not finished, so there is no model yet; go on with --resume")
    if run.model.is_dir():
        options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "remat": remat, "abstract": abstract}
        model, tokenizer = load(run.model, **options, quantize=quantize, labels=labels)
        return as_pooled(model, run), tokenizer
    if abstract:
        raise RunError(f"{run.path}: an adapter is read with its weights; give the base model for shapes alone")
    config = run.config()
    options = {"dtype": dtype or config.model.dtype, "mesh": mesh, "remat": remat, "abstract": abstract}
    options["quantize"] = quantize or config.model.quantize  # the adapter was trained over these values
    if quantize is not None and quantize != (trained := bits_of(run)):
        log.warning("%s: its adapter was trained over a base of %s, and now lies over %s", run.path, trained, quantize)
    labels = labels_of(run) or None if labels is None else labels
    begun = RunFolder(config.model.source)
    if over is None:
        model, tokenizer = load(config.model.source, **options, labels=labels)
    elif begun.started and not begun.model.is_dir():
        model, tokenizer = load_run(begun, **options, labels=labels, over=over)
    else:
        folder = begun.model if begun.started else resolve(config.model.source)
        model, tokenizer = (with_head(over, labels) if labels else over), load_tokenizer(folder)
    if config.method is None and adapters(model):  # it went on with the adapter that it found, which this one replaces
        model = detach(model, next(reversed(adapters(model))))
    model = load_adapter(as_pooled(model, run), run.adapter, name=free_name(model))
    return (set_adapter(model, dict.fromkeys(adapters(model), 1.0)) if adapters(model) else model), tokenizer


def root_folder(path: str | Path) -> Path:
    """Return the folder of the model that everything begins with: that of the last of the runs that lie over it."""
    at = RunFolder(path)
    while at.started and not at.model.is_dir():
        at = RunFolder(at.config().model.source)  # the adapter's base may be a run too
    return at.model if at.started else resolve(at.path)


def bits_of(run: RunFolder) -> str | None:
    """Return how the kernels are quantised over which a run's adapter was trained: `"nf4"`, `"int8"`, or None."""
    at, bits = run, None
    while at.started and not at.model.is_dir():
        config = at.config()
        at, bits = RunFolder(config.model.source), bits or config.model.quantize
    return bits or declared(json.loads(read_config(root_folder(run.path)).raw))


def kind_of(model: Any) -> str | None:
    """Return how a model's kernels are quantised; None where none is."""
    held = {type(value) for value in leaves(model).values()}
    return next((kind for leaf, kind in ((NF4, "nf4"), (Int8, "int8")) if leaf in held), None)


def labels_of(run: RunFolder) -> tuple[str, ...]:
    """Return the classes of the head that a run has trained; () where it has none."""
    if run.model.is_dir():
        return tuple(read_config(run.model).labels)
    return tuple(read_labels(run.adapter) or ())


def as_pooled(model: Any, run: RunFolder) -> Any:
    """Return a model that pools as a run's config says; where that is silent a classifier's, as its head reads."""
    pooling = run.config().model.pooling
    if pooling is not None:
        return with_pooling(model, pooling)
    return with_config(model, pooling=model.reads) if model.config.labels and not model.config.head_pooling else model


def with_pooling(model: Any, pooling: str) -> Any:
    """Return a model, of the same arrays, that pools otherwise, its head too: a mode of `models.pooling.pool`."""
    return with_config(model, pooling=pooling, head_pooling=pooling if model.config.labels else None)


def with_config(model: Any, **fields: Any) -> Any:
    """Return a model, of the same arrays, with other fields of its config that say how vectors are made."""
    fresh = copy_tree(model)
    fresh.config = model.config.replace(**fields)
    return fresh


def free_name(model: Any) -> str:
    """Return the name of the next adapter: "default", "default_2", ..."""
    n = len(adapters(model)) + 1
    return "default" if n == 1 else f"default_{n}"


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, None where it has none."""
    said = read_sentence_folder(folder)
    folder = said.transformer
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return lower_case(tokenizer) if said.lower_case else tokenizer
    except Exception as error:  # whatever a damaged file makes of it
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error


def lower_case(tokenizer: Any) -> Any:
    """Return a tokenizer of transformers that puts texts in lower case first, as `do_lower_case` asks."""
    from tokenizers import normalizers

    core = tokenizer.backend_tokenizer
    before = [] if core.normalizer is None else [core.normalizer]
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return tokenizer
