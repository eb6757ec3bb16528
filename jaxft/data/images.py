"""Pictures with or without labels, of a folder, an npz or idx file or a table, as one array of grey levels.

They are read, resized and checked before anything is trained, and held as uint8: 3,000 pictures of 224 pixels are
0.45 GB.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, refuse
from .image_files import SUFFIXES, Picture, folder_pictures, idx_pictures, is_idx, npz_pictures, table_pictures
from .labels import as_label, class_id, classes_of
from .pixels import Array, ImageProcessor, grey_levels
from .rows import BadRow


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """The pictures of one source.

    Attributes:
        images: `[N, H, W, C]` uint8, in the size of the model.
        labels: `[N]` int32; None where the source has none.
        classes: Names of the classes, in the order of the ids.
        places: File, or file and row, of each picture.
        processor: Makes `pixel_values` of them.
        name: What the source is called in figures.
        weight: Its share of a mixture, relative to the others'.
        skipped: Rows that were bad and left out, because that was asked for.
    """

    images: Array
    labels: Array | None
    classes: tuple[str, ...]
    places: tuple[str, ...]
    processor: ImageProcessor
    name: str = "data"
    weight: float = 1.0
    skipped: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Sequence[int] | slice) -> dict[str, Array]:
        """Return some rows as `pixel_values` `[B, C, H, W]` float32, and `labels` `[B]` int32 where there are any."""
        batch = {"pixel_values": self.processor(self.images[rows])}
        return batch if self.labels is None else {**batch, "labels": self.labels[rows]}


def load_images(
    path: str | Path,
    processor: ImageProcessor,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    labels: bool = True,
    skip_bad_rows: bool = False,
    name: str | None = None,
    weight: float = 1.0,
) -> ImageDataset:
    r"""Read the pictures of a source.

    Args:
        path: One of

            - a folder `class_name/picture.png`, or a flat one of pictures without labels;
            - an `.npz` file: images `[N, H, W]` or `[N, H, W, C]` under `images`, `image`, `x` or `X`, labels under
              `labels`, `label`, `y` or `Y`, each also with the split before or behind (`train_x`, `X_train`), and names
              of classes under `classes`, `class_names` or `label_names`;
            - an idx file of images (MNIST; `.gz` too), its labels in the file beside it that is called
              `labels-idx1` for `images-idx3`;
            - a table (`.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`) or hub data set with the columns `image` (a path
              from the table's folder, or the file's bytes) and, if there are labels, `label`.
        processor: Size, channels and normalisation of the model.
        split: The split, of an npz file or a hub data set.
        columns: `{"image": name in the file, "label": ...}`, for tables that call them otherwise.
        classes: Names of the classes in the order of their ids (those of the training set, say); a label that is none
            of them is a bad row. None: those that occur, sorted; numbers are ids as they are.
        labels: Whether labels are read; if not, no label makes a row a bad one.
        skip_bad_rows: Leave bad rows out and list them, instead of stopping.
        name: What it is called in figures; by default the file's stem.
        weight: Its share of a mixture.

    Returns:
        The data set. Every picture is turned as its EXIF says, laid on white where it is transparent, and resized to
        the model's size, both sides by themselves.

    Raises:
        DataError: The source cannot be read, or rows are bad: each with its file or row and the reason.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "pictures.npz")
    >>> np.savez(file, x=np.zeros((2, 5, 7), np.uint8), y=["hat", "coat"])
    >>> data = load_images(file, ImageProcessor((4, 4)))
    >>> data.images.shape, data.labels.tolist(), data.classes
    ((2, 4, 4, 3), [1, 0], ('coat', 'hat'))
    """
    file = Path(path)
    pictures, known = _pictures(file, split, columns or {})
    classes = tuple(classes) if classes is not None else known
    made = [_read(picture if labels else _bare(picture), processor) for picture in pictures]
    if any(isinstance(one, _Read) and one.label is not None for one in made):
        names = classes or classes_of([one.label for one in made if isinstance(one, _Read) and one.label is not None])
        made = [_with_id(one, names) for one in made]
    else:
        names = ()
    good, bad = good_and_bad(path, made, skip_bad_rows)
    return ImageDataset(
        np.stack([one.image for one in good]),
        np.array([one.label for one in good], np.int32) if names else None,
        names,
        tuple(one.place for one in good),
        processor,
        name or file.name.split(".")[0] or str(path),
        weight,
        tuple(bad),
    )


@dataclasses.dataclass(frozen=True)
class _Read:
    """A picture that was read, and its label: as given, then as an id."""

    image: Array
    label: int | str | None
    place: str


def good_and_bad(path: str | Path, made: Sequence[Any], skip_bad_rows: bool) -> tuple[list[Any], list[BadRow]]:
    """Part what was made of rows from the bad rows; refuse these, all at once, unless they shall be left out."""
    good = [one for one in made if not isinstance(one, BadRow)]
    bad = [one for one in made if isinstance(one, BadRow)]
    if not skip_bad_rows:
        hint = "correct them, or set data.skip_bad_rows to leave them out"
        refuse(DataError, f"{path}: {len(bad)} of {len(made)} pictures cannot be used ({hint})", map(str, bad))
    if not good:
        refuse(DataError, f"{path}: no picture is left to use", map(str, bad) if bad else ["there is none"])
    return good, bad


def _pictures(
    file: Path, split: str, columns: Mapping[str, str]
) -> tuple[Sequence[Picture | BadRow], tuple[str, ...] | None]:
    """Return the pictures of a source, and the names of its classes where it says them."""
    if columns and (file.is_dir() or file.suffix == ".npz" or is_idx(file)):
        named = ", ".join(columns.values())
        raise DataError(
            f"{file}: it is no table, so it has no column to name (--column {named}, or a config's columns)"
        )
    if file.is_dir():
        return folder_pictures(file)
    if file.suffix == ".npz":
        return npz_pictures(file, split)
    if is_idx(file):
        return idx_pictures(file), None
    if file.suffix.lower() in SUFFIXES:
        raise DataError(f"{file}: this is one picture; give the folder that it lies in, or a table with its path")
    return table_pictures(file, split, columns), None


def _bare(picture: Picture | BadRow) -> Picture | BadRow:
    return picture if isinstance(picture, BadRow) else dataclasses.replace(picture, label=None)


def _read(picture: Picture | BadRow, processor: ImageProcessor) -> _Read | BadRow:
    if isinstance(picture, BadRow):
        return picture
    try:
        label = picture.label
        label = label if label is None or picture.named else as_label(label)
        return _Read(grey_levels(picture.content, processor), label, picture.place)
    except DataError as error:
        return BadRow(picture.place, str(error))


def _with_id(one: _Read | BadRow, classes: Sequence[str]) -> _Read | BadRow:
    if isinstance(one, BadRow):
        return one
    if one.label is None:
        return BadRow(one.place, "label: it has none, and other rows have one")
    try:
        return dataclasses.replace(one, label=class_id(one.label, classes))
    except DataError as error:
        return BadRow(one.place, str(error))
