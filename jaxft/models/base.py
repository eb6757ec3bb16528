"""What every model of ours offers, whatever it reads: its slots, `hidden`, and `pooled`, one vector for each row."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import BatchError
from .config import ModelConfig
from .pooling import pool
from .seams import Context
from .virtual import room


class Model(nnx.Module):
    """The base of every family: a backbone, under the name `prefix` or the model itself, and what stands on it.

    A family sets the class variables, and `hidden`.

    Attributes:
        model_type: As in `config.json`.
        prefix: Name of the backbone; "" where the model is its own.
        stem: Name that the backbone has in a checkpoint with a head.
        heads: Names of modules that belong to a task: one that a checkpoint lacks is new.
        optional: Names of modules that are left out where a checkpoint lacks them.
        renames: `(regular expression, replacement)` from names of tensors in (old) checkpoints to ours.
        written: The same from our names to those that a checkpoint is written with.
        disposable: Regular expression for names of tensors of a checkpoint that nothing here needs.
        inputs: Names of the arrays of a batch that `hidden` takes.
        default_targets: What LoRA adapts by default.
        default_ia3: What IA3 scales by default, and which of these at their input.
        task_type: peft's name for what the model does; None where it has none.
        reads: Of a classifier, how what its head reads is pooled.
        passes_pooler: Whether that goes through a pooler, which a vector pooled by `config.head_pooling` does not.
    """

    model_type: ClassVar[str]
    prefix: ClassVar[str]
    stem: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]]
    default_targets: ClassVar[tuple[str, ...]]
    default_ia3: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]
    disposable: ClassVar[str] = ""
    heads: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    written: ClassVar[tuple[tuple[str, str], ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "position_ids", "segment_ids")
    reads: ClassVar[str]
    passes_pooler: ClassVar[bool] = False
    task_type: ClassVar[str | None]

    def __init__(self, config: ModelConfig):
        self.config = config
        self.adapter_weights: Any = nnx.data(None)
        self.past: Any = nnx.data(None)
        self.prompt: Any = nnx.data(None)
        self.temperature: Any = nnx.data(None)

    @property
    def dtype(self) -> Any:
        """Dtype of computation."""
        return self.config.dtype

    @property
    def backbone(self) -> Any:
        """The model without its head."""
        return getattr(self, self.prefix) if self.prefix else self

    @property
    def head_pooling(self) -> str | None:
        """How what the head reads is pooled where it is not what the family's own reads; None also without a head."""
        mode = self.config.head_pooling if self.config.labels else None
        return None if mode is None or (mode == self.reads and not self.passes_pooler) else mode

    def context(self, rows: int, key: jax.Array | None = None, **fields: Any) -> Context:
        """Return the context of one pass: dropout key, adapter weights, mask and positions."""
        fields["mesh"] = self.config.mesh
        if self.adapter_weights is None:
            return Context(key=key, **fields)
        weights = self.adapter_weights.get_value()
        if weights.ndim == 2 and weights.shape[0] != rows:
            raise BatchError(f"adapter weights are for {weights.shape[0]} rows, the batch has {rows}")
        names = tuple(name for name, _ in self.adapter_weights.get_metadata("adapters"))
        return Context(key=key, weights=weights, names=names, **fields)

    def hidden(self, *args: Any, **inputs: Any) -> jax.Array:
        """Return the output of the last layer `[B, T, D]`, in the model's dtype: what a family sets."""
        raise NotImplementedError(f"{type(self).__name__} sets `hidden`")

    def pooled(self, *, key: jax.Array | None = None, **inputs: Any) -> jax.Array:
        """Return one vector for each row, pooled over its real tokens as `config.pooling` says.

        Args:
            key: Dropout key. None: no dropout.
            inputs: Arrays of a batch, by their names in `inputs`.

        Returns:
            `[B, D]`, float32, not normalised.

        Raises:
            BatchError: Rows that are packed, which hold several texts.

        >>> import jaxft
        >>> batch = {"input_ids": [[5, 6, 7], [5, 0, 0]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}
        >>> jaxft.testing.tiny_bert().pooled(**batch).shape
        (2, 32)
        """
        refuse_packed(inputs)
        return _pooled(self, arrays(inputs), key)

    def answer(self, inputs: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """Return what the call returns, given the arrays of a batch: here the hidden states."""
        return self.hidden(**inputs, key=key)

    def positions_left(self) -> int | None:
        """Return how many tokens a row may have beside the virtual ones that shift them; None: there is no table."""
        positions = getattr(self.config, "n_positions", None)
        return None if positions is None else positions - room(self)

    def config_keys(self) -> dict[str, Any]:
        """Return the keys of `config.json` that follow from which leaves there are; merging can change them."""
        return {}


def refuse_packed(inputs: Mapping[str, Any]) -> None:
    """Refuse packed rows where a row has one answer."""
    if inputs.get("segment_ids") is not None:
        raise BatchError("a packed row holds several texts, and here a row gives one answer: give each its own row")


def arrays(inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return the inputs that are given, as arrays."""
    return {name: jnp.asarray(value) for name, value in inputs.items() if value is not None}


@jax.jit
def called(model: Model, inputs: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
    """Return the model's answer; compiled once for a structure and shape, so that a script does not trace again."""
    return model.answer(inputs, key)


@jax.jit
def _pooled(model: Model, inputs: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
    return pool(model.hidden(**inputs, key=key), inputs.get("attention_mask"), model.config.pooling)
