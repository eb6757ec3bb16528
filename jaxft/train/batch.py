"""What is asked of a batch before a step is taken with it."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ..errors import BatchError, refuse
from ..losses.entropy import IGNORED

TOKENS = ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids", "token_type_ids")


def check_batch(
    batch: Mapping[str, Any],
    accumulate: int = 1,
    vocabulary: int | None = None,
    devices: int = 1,
    classes: int | None = None,
) -> None:
    """Refuse a batch whose shapes disagree, that does not divide, or that trains nothing.

    Arrays over tokens `[rows, tokens]` go by their names; those of one column, which stands before the name
    (`anchor_input_ids`), have one shape. `labels` are of tokens, or one for each row: integers, or floats to predict.
    Images are `pixel_values` `[rows, channels, height, width]`.

    Shapes are always looked at; labels where they lie in the host's memory, so that no step waits for an accelerator
    (there, a batch that trains nothing leaves the state as it is, and the metric `skipped` says so).

    Args:
        batch: Arrays whose first axis is the rows.
        accumulate: Number of micro-batches that the rows are split into.
        vocabulary: Number of tokens that the model knows, where that is known.
        devices: Parts that the rows of a micro-batch are split into (data x fsdp of a mesh).
        classes: Number of classes of the model's head, where it has one of classes.

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
    wrong = odd or _problems(batch, accumulate, vocabulary, devices, classes)
    refuse(BatchError, "a batch that cannot be trained on", wrong)


def _problems(
    batch: Mapping[str, Any], accumulate: int, vocabulary: int | None, devices: int, classes: int | None
) -> Iterator[str]:
    shapes = {name: np.shape(x) for name, x in batch.items()}
    rows = {name: shape[0] if shape else None for name, shape in shapes.items()}
    if len(set(rows.values())) > 1 or None in rows.values():
        yield f"the first axis is the rows, but the arrays are {shapes}"
        return
    yield from _wrong_tokens(batch, shapes, vocabulary)
    yield from _wrong_rows(batch, classes)
    for name in batch:
        if name.endswith("pixel_values") and len(shapes[name]) != 4:
            yield f"{name} is {shapes[name]}; it must be [rows, channels, height, width]"
    n = next(iter(rows.values()))
    if n is not None and n % accumulate:
        yield f"{n} rows do not divide into accumulate={accumulate} micro-batches"
    elif n is not None and n // accumulate % devices:
        each = f"{n // accumulate} rows of a micro-batch" if accumulate > 1 else f"{n} rows"
        yield f"{each} do not divide over {devices} devices (data x fsdp of the mesh)"


def _wrong_tokens(
    batch: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], vocabulary: int | None
) -> Iterator[str]:
    """Say what is wrong with the arrays over tokens, column by column."""
    for column, tokens in _over_tokens(batch).items():
        if len({shapes[name] for name in tokens}) > 1:
            each = ", ".join(f"{name} is {shapes[name]}" for name in tokens)
            yield f"arrays over tokens must have one shape{' in a column' if column else ''}, but {each}"
        for name, kind in tokens.items():
            if len(shapes[name]) != 2:
                yield f"{name} is {shapes[name]}; it must be [rows, tokens]"
            if kind not in ("input_ids", "labels"):
                continue
            if np.dtype(batch[name].dtype).kind not in "iu":
                yield f"{name} is {batch[name].dtype}; token ids are integers"
            if vocabulary is not None and _on_host(batch[name]):
                ids = _counted(name, kind, batch, f"{column}attention_mask")
                if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
                    yield f"{name} holds {ids.min()} to {ids.max()}; the model's tokens are 0 to {vocabulary - 1}"
    labels = batch.get("labels")
    looked_at = labels is not None and len(shapes["labels"]) == 2 and _on_host(labels)
    if looked_at and not bool((np.asarray(labels)[:, 1:] != IGNORED).any()):
        yield "every label is -100 (the first of a row does not count): no token is trained"


def _over_tokens(batch: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the arrays over tokens of each column, `{column: {name: the name without it}}`; "" is no column."""
    found: dict[str, dict[str, str]] = {}
    for name in batch:
        kind = next((kind for kind in TOKENS if name == kind or name.endswith(f"_{kind}")), None)
        if kind is not None and not (name == "labels" and _of_rows(batch)):
            found.setdefault(name.removesuffix(kind), {})[name] = kind
    return found


def _of_rows(batch: Mapping[str, Any]) -> bool:
    """Tell whether `labels` are one for each row."""
    return "labels" in batch and np.ndim(batch["labels"]) == 1


def _wrong_rows(batch: Mapping[str, Any], classes: int | None) -> Iterator[str]:
    """Say what is wrong with labels that are one for each row."""
    if not _of_rows(batch) or not _on_host(batch["labels"]):
        return
    labels = np.asarray(batch["labels"])
    if np.dtype(labels.dtype).kind not in "iu":
        if np.isnan(labels).all():
            yield "every label is NaN: no row is trained"
        if np.isinf(labels).any():
            yield f"labels hold {int(np.isinf(labels).sum())} infinite numbers"
        return
    counted = labels[labels != IGNORED]
    if not counted.size:
        yield "every label is -100: no row is trained"
    elif counted.min() < 0:
        yield f"labels hold {counted.min()}; classes count from 0, and -100 is no label"
    elif classes is not None and counted.max() >= classes:
        yield f"labels hold {counted.max()}; the model's head has {classes} classes, 0 to {classes - 1}"


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic)) and (isinstance(x, jax.Array) or x.dtype.kind in "biuf")


def _counted(name: str, kind: str, batch: Mapping[str, Any], mask_name: str) -> Any:
    """Return the ids that count: labels that are trained, inputs that are not padding."""
    ids = np.asarray(batch[name])
    if kind == "labels":
        return ids[ids != IGNORED]
    mask = batch.get(mask_name)
    if mask is None or np.shape(mask) != ids.shape or not _on_host(mask):
        return ids
    return ids[np.asarray(mask) != 0]


def _on_host(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or all(d.platform == "cpu" for d in x.devices())
