"""What a sentence-transformers folder says of its model: where the files lie, how it pools, how long texts are."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError, refuse
from .pooling import POOLINGS
from .tensors import read_json

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
TYPE = re.compile(r"sentence_transformers\.(?:models|(?:base|sentence_transformer)\.modules)\.(?:\w+\.)?(\w+)")
ORDER = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
TRANSFORMER = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
THEIRS = {"last": "lasttoken"}  # what sentence-transformers calls our modes, where it is not the same
OURS = {theirs: ours for ours, theirs in THEIRS.items()}
FLAGS = {  # of the layout before version 5.7
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
ENDLESS = 1 << 30  # a tokenizer without a limit says so by a huge number


@dataclasses.dataclass(frozen=True)
class SentenceFolder:
    """A folder, and what it says beside the transformer's own files.

    Attributes:
        transformer: Where config.json, weights and tokenizer lie.
        fields: `pooling`, `normalize` and `max_seq_length` of `ModelConfig`; empty for a folder of the model alone.
        lower_case: Whether texts are put in lower case before they are tokenised.
        prompts: Texts to put before a text, by their names; nothing here puts them there.
    """

    transformer: Path
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def adapter(self) -> bool:
        """Whether there is an adapter, as of peft, in place of the model itself."""
        return (self.transformer / "adapter_config.json").is_file() and not (self.transformer / "config.json").is_file()


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Read the files of sentence-transformers in a folder, of its layout of old and of that since version 5.4.

    Args:
        folder: The folder; without `modules.json` it is that of a model alone.

    Raises:
        CheckpointError: Modules, modes or options whose effect is not computed here; each is named.

    >>> import jaxft, tempfile
    >>> model, folder = jaxft.testing.tiny_bert(), tempfile.mkdtemp()
    >>> _ = jaxft.save_sentence_transformer(model, folder)
    >>> read_sentence_folder(Path(folder)).fields
    {'pooling': 'mean', 'normalize': False, 'max_seq_length': 64}
    """
    if not (folder / MODULES).is_file():
        return SentenceFolder(folder)
    modules = _modules(folder)
    transformer = folder / modules[0]["path"]
    said: dict[str, Any] = next(
        (read_json(transformer / name) for name in TRANSFORMER if (transformer / name).is_file()), {}
    )
    pooling = read_json(folder / modules[1]["path"] / "config.json")
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    last = folder / modules[-1]["path"] / "config.json"
    normalize = read_json(last) if len(modules) == 3 and last.is_file() else {}
    mode, wrong = _mode(pooling)
    prompts = settings.get("prompts") or {}
    wrong += [*_odd_transformer(said), *_odd_settings(settings, pooling), *_odd_normalize(normalize)]
    refuse(CheckpointError, f"{folder}: what this sentence-transformers folder asks for is not computed here", wrong)
    fields = {"pooling": mode, "normalize": len(modules) == 3, "max_seq_length": _length(said, transformer)}
    return SentenceFolder(transformer, fields, bool(said.get("do_lower_case")), prompts)


def _modules(folder: Path) -> list[dict[str, Any]]:
    """Return the modules of a folder, of which the kinds and paths are known."""
    listed = read_json(folder / MODULES, list)
    if not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in listed):
        raise CheckpointError(f"{folder / MODULES}: a list of modules is expected, each with its type and path")
    kinds = [found[1] if (found := TYPE.fullmatch(m["type"])) else m["type"] for m in listed]
    if kinds not in ORDER:
        raise CheckpointError(
            f"{folder / MODULES}: the modules are {', '.join(kinds) or 'none'}; computed here are Transformer, Pooling "
            "and, last, Normalize: take the others out, and apply them to the vectors yourself"
        )
    wrong = []
    for module in listed:
        path = module.setdefault("path", "")
        if not isinstance(path, str) or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            wrong.append(f"path {path!r} leaves the folder")
        odd = [key for key in module if key not in ("idx", "name", "path", "type") and module[key]]
        wrong += [f"{key}={module[key]!r} of {module['type']} is not supported" for key in odd]
    refuse(CheckpointError, f"{folder / MODULES}", wrong)
    return listed


def _mode(pooling: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the mode of a `Pooling`, by our name, and what is wrong with its config."""
    known = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *FLAGS}
    wrong = [f"Pooling: {key}={value!r} is not known" for key, value in pooling.items() if key not in known]
    modes = pooling.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if pooling.get(flag)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    ours = [OURS.get(mode, mode) for mode in modes]
    wrong += [f"Pooling: pooling_mode {mode!r} is not known" for mode in ours if mode not in POOLINGS]
    if len(ours) > 1:
        wrong.append(f"Pooling: {len(ours)} modes at once ({', '.join(modes)}), whose vectors it joins: keep one")
    return ours[0], wrong


def _odd_transformer(said: Mapping[str, Any]) -> Iterator[str]:
    """Say what the config of a `Transformer` asks for beyond length, case, and the reading of texts."""
    wanted = {
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
        "modality_config": {"text": TEXT},
    }
    neutral = ("max_seq_length", "do_lower_case", "unpad_inputs")
    for key, value in said.items():
        if key == "modality_config" and isinstance(value, dict):
            value = {"text": value.get("text")}  # of texts alone; what else it may read is nothing to us
        if value != wanted.get(key, value) or (key not in wanted and key not in neutral and value):
            yield f"Transformer: {key}={value!r} is not supported"


def _odd_settings(settings: Mapping[str, Any], pooling: Mapping[str, Any]) -> Iterator[str]:
    """Say what a folder's settings ask for: prompts that are put before every text, kinds of model that are others."""
    known = ("__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name")
    if settings.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        yield f"{SETTINGS}: model_type={settings['model_type']!r} is not supported, SentenceTransformer is"
    yield from (
        f"{SETTINGS}: {key}={settings[key]!r} is not known" for key in settings if key not in known and settings[key]
    )
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if default is not None and prompts.get(default):
        yield (
            f"{SETTINGS}: default_prompt_name={default!r} puts {prompts[default]!r} before every text: put it there in "
            "your file, and set default_prompt_name to null"
        )
    if not pooling.get("include_prompt", True) and any(prompts.values()):
        yield "Pooling: include_prompt=False leaves the prompts out of the vector, which is not supported"


def _odd_normalize(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key not in ("module_input_name", "module_output_name") or value != "sentence_embedding":
            yield f"Normalize: {key}={value!r} is not supported"


def _length(said: Mapping[str, Any], transformer: Path) -> int | None:
    """Return how many tokens a text may have; None: as many as the model has positions for."""
    length = said.get("max_seq_length")
    if length is None and (transformer / "tokenizer_config.json").is_file():
        length = read_json(transformer / "tokenizer_config.json").get("model_max_length")
    if length is None or (isinstance(length, float) and length > ENDLESS) or length == int(1e30):
        return None
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise CheckpointError(f"{transformer}: max_seq_length is {length!r}; a number of tokens is expected")
    return None if length > ENDLESS else length
