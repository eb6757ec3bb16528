"""What is asked of a batch before a step is taken with it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ..errors import BatchError, refuse
from ..losses.entropy import IGNORED

TOKENS = ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids")


def check_batch(batch: Mapping[str, Any], accumulate: int = 1, vocabulary: int | None = None, devices: int = 1) -> None:
    """Refuse a batch whose shapes disagree, that does not divide, or that trains nothing.

    Shapes are always looked at; labels where they lie in the host's memory, so that no step waits for an accelerator
    (there, a batch that trains nothing leaves the state as it is, and the metric `skipped` says so).

    Args:
        batch: Arrays whose first axis is the rows.
        accumulate: Number of micro-batches that the rows are split into.
        vocabulary: Number of tokens that the model knows, where that is known.
        devices: Parts that the rows of a micro-batch are split into (data x fsdp of a mesh).

    Raises:
        BatchError: Everything that is wrong, at once.
    """
    if not isinstance(batch, Mapping) or not batch:
        raise BatchError(
            f"a batch is a dict of arrays, this is {type(batch).__name__}: give input_ids and labels [B, T]"
        )
    odd = [
        f"{name} is a {type(x).__name__}; give a numpy or jax array" for name, x in batch.items() if not _is_array(x)
    ]
    refuse(
        BatchError, "a batch that cannot be trained on", odd or list(_problems(batch, accumulate, vocabulary, devices))
    )


def _problems(batch: Mapping[str, Any], accumulate: int, vocabulary: int | None, devices: int) -> Any:
    shapes = {name: np.shape(x) for name, x in batch.items()}
    rows = {name: shape[0] if shape else None for name, shape in shapes.items()}
    if len(set(rows.values())) > 1 or None in rows.values():
        yield f"the first axis is the rows, but the arrays are {shapes}"
        return
    tokens = {name: shapes[name] for name in TOKENS if name in batch}
    if len(set(tokens.values())) > 1:
        yield "arrays over tokens must have one shape, but " + ", ".join(f"{n} is {s}" for n, s in tokens.items())
    for name, shape in tokens.items():
        if len(shape) != 2:
            yield f"{name} is {shape}; it must be [rows, tokens]"
        kind = np.dtype(batch[name].dtype).kind
        if name in ("input_ids", "labels") and kind not in "iu":
            yield f"{name} is {batch[name].dtype}; token ids are integers"
    n = next(iter(rows.values()))
    if n is not None and n % accumulate:
        yield f"{n} rows do not divide into accumulate={accumulate} micro-batches"
    elif n is not None and n // accumulate % devices:
        each = f"{n // accumulate} rows of a micro-batch" if accumulate > 1 else f"{n} rows"
        yield f"{each} do not divide over {devices} devices (data x fsdp of the mesh)"
    for name in ("input_ids", "labels"):
        if name in batch and vocabulary is not None and _on_host(batch[name]):
            ids = _counted(name, batch)
            if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
                yield f"{name} holds {ids.min()} to {ids.max()}; the model's tokens are 0 to {vocabulary - 1}"
    labels = batch.get("labels")
    looked_at = labels is not None and len(shapes["labels"]) == 2 and _on_host(labels)
    if looked_at and not bool((np.asarray(labels)[:, 1:] != IGNORED).any()):
        yield "every label is -100 (the first of a row does not count): no token is trained"


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic)) and (isinstance(x, jax.Array) or x.dtype.kind in "biuf")


def _counted(name: str, batch: Mapping[str, Any]) -> Any:
    """Return the ids that count: labels that are trained, inputs that are not padding."""
    ids = np.asarray(batch[name])
    if name == "labels":
        return ids[ids != IGNORED]
    mask = batch.get("attention_mask")
    if mask is None or np.shape(mask) != ids.shape or not _on_host(mask):
        return ids
    return ids[np.asarray(mask) != 0]


def _on_host(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or all(d.platform == "cpu" for d in x.devices())
