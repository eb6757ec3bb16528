"""Regions of pictures: boxes with labels, and the features of the patches that lie under a box."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import DataError
from .image_files import Picture, table_pictures
from .images import good_and_bad
from .labels import as_label, class_id, classes_of
from .pixels import Array, ImageProcessor, grey_levels, size_of
from .rows import BadRow


@dataclasses.dataclass(frozen=True)
class RegionDataset:
    """Pictures with boxes on them.

    Attributes:
        images: `[N, H, W, C]` uint8, in the size of the model.
        boxes: `[N, K, 4]` float32: left, top, right, bottom in parts of the picture's sides, from 0 to 1 (a box stays
            where it was when the picture is resized); zeros at padding.
        mask: `[N, K]` bool, False at padding.
        labels: `[N, K]` int32, 0 at padding.
        classes: Names of the classes.
        places: Where each picture lies.
        processor: Makes `pixel_values` of them.
        skipped: Rows that were bad and left out.
    """

    images: Array
    boxes: Array
    mask: Array
    labels: Array
    classes: tuple[str, ...]
    places: tuple[str, ...]
    processor: ImageProcessor
    skipped: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


def load_regions(
    path: str | Path,
    processor: ImageProcessor,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    skip_bad_rows: bool = False,
) -> RegionDataset:
    """Read a table of pictures with boxes.

    Args:
        path: A table with the columns `image` (as of `load_images`), `boxes` (a list of [left, top, right, bottom], in
            pixels of the picture as it lies in the file) and `labels` (a class number or name for each box); in a CSV
            the lists are written as JSON.
        processor: Size, channels and normalisation of the model.
        split: The split, of a hub data set.
        columns: `{"boxes": name in the file, ...}`, for tables that call them otherwise.
        classes: As of `load_images`.
        skip_bad_rows: Leave bad rows out and list them, instead of stopping.

    Returns:
        The data set; rows have as many boxes as the fullest, the rest is padding.

    Raises:
        DataError: Rows are bad: a box outside its picture, empty, or with swapped corners is named with its row.
    """
    made = [_read(picture, processor) for picture in table_pictures(Path(path), split, columns or {})]
    found = [label for one in made if isinstance(one, _Boxed) for label in one.labels]
    names = tuple(classes) if classes is not None else classes_of(found)
    good, bad = good_and_bad(path, [_with_ids(one, names) for one in made], skip_bad_rows)
    most = max(len(one.boxes) for one in good)
    boxes, labels = np.zeros((len(good), most, 4), np.float32), np.zeros((len(good), most), np.int32)
    mask = np.zeros((len(good), most), bool)
    for i, one in enumerate(good):
        n = len(one.boxes)
        boxes[i, :n], labels[i, :n], mask[i, :n] = one.boxes, one.labels, True
    images, places = np.stack([one.image for one in good]), tuple(one.place for one in good)
    return RegionDataset(images, boxes, mask, labels, names, places, processor, tuple(bad))


def region_features(patches: jax.Array, boxes: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Return the mean of the patches under each box, each weighted by the area that the box covers of it.

    Args:
        patches: `[B, P, D]`, row by row, without the class token: `hidden[:, 1:]` of a ViT.
        boxes: `[B, K, 4]`: left, top, right, bottom in parts of the sides, from 0 to 1.
        grid: (rows, columns) of patches, P in all.

    Returns:
        `[B, K, D]` float32; zeros for a box without area (padding).

    >>> patches = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])  # two rows of two
    >>> region_features(patches, jnp.array([[[0.0, 0.0, 1.0, 0.5], [0.25, 0.0, 1.0, 1.0]]]), (2, 2))[0, :, 0].tolist()
    [1.5, 2.6666667461395264]
    """
    down, across = (
        _covered(boxes[..., i], boxes[..., i + 2], cells) for i, cells in ((1, grid[0]), (0, grid[1]))
    )  # [B, K, rows], [B, K, columns]
    area = (down[..., :, None] * across[..., None, :]).reshape(*boxes.shape[:2], -1)
    total = area.sum(-1, keepdims=True)
    weights = area / jnp.where(total > 0, total, 1)
    return jnp.einsum("bkp,bpd->bkd", weights, patches.astype(jnp.float32))


def _covered(start: jax.Array, end: jax.Array, cells: int) -> jax.Array:
    """Return how much of each of `cells` equal cells lies between two places: `[B, K]` to `[B, K, cells]`."""
    left = jnp.arange(cells, dtype=jnp.float32)[None, None]
    start, end = (x.astype(jnp.float32)[..., None] * cells for x in (start, end))
    return jnp.maximum(jnp.minimum(end, left + 1) - jnp.maximum(start, left), 0)


@dataclasses.dataclass(frozen=True)
class _Boxed:
    """A picture that was read, its boxes in parts of its sides, and their labels: as given, then as ids."""

    image: Array
    boxes: Array
    labels: list[Any]
    place: str


def _read(picture: Picture | BadRow, processor: ImageProcessor) -> _Boxed | BadRow:
    if isinstance(picture, BadRow):
        return picture
    try:
        boxes, labels = (_listed(picture.fields, name) for name in ("boxes", "labels"))
        if len(boxes) != len(labels):
            raise DataError(f"labels: {len(labels)} for {len(boxes)} boxes")
        height, width = size_of(picture.content)
        parts = [_box(box, i, width, height) for i, box in enumerate(boxes, 1)]
        known = [as_label(label) for label in labels]
        image = grey_levels(picture.content, processor)
        return _Boxed(image, np.array(parts, np.float32).reshape(-1, 4), known, picture.place)
    except DataError as error:
        return BadRow(picture.place, str(error))


def _listed(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = str(fields[name])
    if not isinstance(value, (list, tuple)):
        what = "the row has no such column" if name not in fields else f"this is {str(value)[:80]!r}"
        raise DataError(f"{name}: a list is expected, {what}")
    if not value:
        raise DataError(f"{name}: it is empty, so the row has nothing to learn from")
    return list(value)


def _box(box: Any, number: int, width: int, height: int) -> tuple[float, ...]:
    """Return a box in parts of the sides; refuse one that is no part of the picture."""
    try:
        left, top, right, bottom = map(float, box)
    except (TypeError, ValueError):
        raise DataError(f"box {number}: [left, top, right, bottom] is expected, this is {str(box)[:80]}") from None
    where = f"box {number} [{left:g}, {top:g}, {right:g}, {bottom:g}]"
    if not np.isfinite([left, top, right, bottom]).all():
        raise DataError(f"{where}: its numbers are not all finite")
    if right < left or bottom < top:
        raise DataError(f"{where}: its corners are swapped; left, top, right, bottom is the order, in pixels")
    if right == left or bottom == top:
        raise DataError(f"{where}: it is empty")
    if left < 0 or top < 0 or right > width or bottom > height:
        raise DataError(f"{where}: it is not within the picture, which is {width} wide and {height} high")
    return left / width, top / height, right / width, bottom / height


def _with_ids(one: _Boxed | BadRow, classes: Sequence[str]) -> _Boxed | BadRow:
    if isinstance(one, BadRow):
        return one
    try:
        return dataclasses.replace(one, labels=[class_id(label, classes) for label in one.labels])
    except DataError as error:
        return BadRow(one.place, str(error))
