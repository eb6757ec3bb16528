"""What a model's `config.json` says, as a frozen (static, hashable) record with the defaults of transformers."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from jax.sharding import Mesh

from ..errors import CheckpointError, refuse
from .layers import ACTIVATIONS

REMATS = ("none", "full")
LAYER_TYPES = ("full_attention", "sliding_attention")
EVERYTHING = 2**30  # the window of a layer that sees all: longer than any row
HEAD_POOLING = "jaxft_head_pooling"  # in a config.json: transformers has no such heads
OUR_TYPE = "jaxft_"  # before the model_type there, so that it does not take them for its own
FLOAT32 = jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family has; a family adds its own fields and `parse`.

    Attributes:
        pooling: How `pooled` makes one vector of a row's: a mode of `pooling.pool`.
        head_pooling: What a classification head reads where it is not what the family's own reads: a vector pooled so.
        normalize: Whether an embedding is scaled to length 1 (a sentence-transformers folder says so).
        max_seq_length: The tokens of a text that an embedding is made of (likewise); None: as many as fit.
        labels: Names of the classes of a classification head; () where there is none.
        dtype: Dtype of computation; parameters are cast to it where they are used.
        remat: `"none"` or `"full"`: what the backward pass recomputes.
        mesh: The mesh that the model lies on; None: one device.
        stop_ids: Tokens that end a text, from the model's and the generation config.
        source: Folder or hub id that the model came from.
        raw: The `config.json` as it was read, for writing it back.
    """

    sizes: ClassVar[tuple[str, ...]] = (  # whole numbers of at least 1
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )

    vocab_size: int = 0
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False
    pooling: str = "last"
    head_pooling: str | None = None
    normalize: bool = False
    max_seq_length: int | None = None
    labels: tuple[str, ...] = ()
    dtype: Any = FLOAT32
    remat: str = "none"
    mesh: Mesh | None = None
    stop_ids: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    source: str = dataclasses.field(default="", compare=False)
    raw: str = dataclasses.field(default="{}", compare=False)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the family's own fields, read from a `config.json`; refuse what the family cannot compute."""
        raise TypeError(f"{cls.__name__} is abstract: a family says how {raw.get('model_type')!r} is read")

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any], **more: Any) -> Self:
        """Build the record from a parsed `config.json` (see the examples of the families)."""
        model_type = raw.get("model_type")
        try:
            fields = {**cls.parse(raw), "stop_ids": token_ids(raw.get("eos_token_id"))}
            fields["labels"] = more["labels"] if "labels" in more else class_names(raw)
            fields["head_pooling"] = raw.get(HEAD_POOLING)
        except KeyError as missing:
            raise CheckpointError(f"config.json of model_type {model_type!r} lacks the key {missing}") from None
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"config.json of model_type {model_type!r} has a value of a wrong kind: {error}"
            ) from None
        config = cls(**{**fields, **more}, raw=json.dumps(raw))
        config.check()
        return config

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def check(self) -> None:
        """Refuse head counts that do not divide, and an unknown `remat`."""
        wrong = [
            f"{key} is {size!r}" for key in self.sizes if not isinstance(size := getattr(self, key), int) or size < 1
        ]
        refuse(CheckpointError, "config.json: sizes are whole numbers of at least 1", wrong)
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.remat not in REMATS:
            raise CheckpointError(f"remat={self.remat!r}: choose one of {', '.join(map(repr, REMATS))}")


def class_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes of a checkpoint with a classification head, () of another one.

    Raises:
        CheckpointError: Its head says more than one class, or several numbers.

    >>> class_names({"architectures": ["BertForSequenceClassification"], "id2label": {"1": "good", "0": "bad"}})
    ('bad', 'good')
    """
    if not any(re.search(r"For(Sequence|Image)Classification$", str(name)) for name in raw.get("architectures") or ()):
        return ()
    named = raw.get("id2label") or {i: unnamed(i) for i in range(raw.get("num_labels", 2))}
    kind, found = raw.get("problem_type"), tuple(str(name) for _, name in sorted((int(i), x) for i, x in named.items()))
    several = kind == "regression" and len(found) > 1
    if several or kind not in (None, "regression", "single_label_classification"):
        what = f"a regression of {len(found)} outputs" if several else f"problem_type {kind!r}"
        raise CheckpointError(
            f"config.json: a head for {what} is not supported: one class of several, or one number, is; the body is "
            "read with labels=() or with those of a new head"
        )
    return found


def unnamed(i: int) -> str:
    """Return what transformers calls a class that has no name."""
    return f"LABEL_{i}"


def token_ids(value: Any) -> tuple[int, ...]:
    """Return the ids of an `eos_token_id` entry, which is a number, a list or nothing."""
    if value is None:
        return ()
    return tuple(map(int, value)) if isinstance(value, (list, tuple)) else (int(value),)


def activation(raw: Mapping[str, Any], key: str, default: str) -> str:
    """Return the name of the activation under `key`, which must be one we have."""
    name = raw.get(key, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: {key} {name!r} is not supported; there are {', '.join(ACTIVATIONS)}")
    return str(name)


def refuse_unsupported(raw: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse keys whose value is not the only one that the family computes."""
    for key, value in expected.items():
        if raw.get(key, value) not in (value, None):
            raise CheckpointError(
                f"config.json: {key}={raw[key]!r} is not supported for model_type {raw.get('model_type')!r}, "
                f"only {value!r} is"
            )


def layer_windows(raw: Mapping[str, Any], types: Sequence[str]) -> tuple[int, ...]:
    """Return the window of each layer, or () where none slides.

    Args:
        raw: A `config.json` with `num_hidden_layers` and, where a layer slides, `sliding_window`.
        types: `"full_attention"` or `"sliding_attention"` for each layer.

    >>> layer_windows({"num_hidden_layers": 2, "sliding_window": 8}, ["sliding_attention", "full_attention"])
    (8, 1073741824)
    """
    depth, window = raw["num_hidden_layers"], raw.get("sliding_window")
    unknown = sorted({str(kind) for kind in types} - set(LAYER_TYPES))
    if unknown:
        raise CheckpointError(
            f"config.json: layer_types {', '.join(unknown)} are not supported; there are {', '.join(LAYER_TYPES)}"
        )
    if len(types) != depth:
        raise CheckpointError(f"config.json: layer_types has {len(types)} entries for {depth} layers")
    if "sliding_attention" not in types:
        return ()
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise CheckpointError(f"config.json: sliding_window is {window!r}, but there are layers that slide")
    return tuple(window if kind == "sliding_attention" else EVERYTHING for kind in types)
