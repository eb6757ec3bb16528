"""Where pictures lie: folders, npz and idx files, tables; each gives `Picture`s, not opened yet, in one order."""

import dataclasses
import gzip
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, refuse
from .pixels import Array
from .rows import BadRow, Row, read_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
IMAGES, LABELS = ("images", "image", "x", "X"), ("labels", "label", "y", "Y")
CLASSES = ("classes", "class_names", "label_names")
IDX = re.compile(r"[-.]idx\d")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of a source.

    Attributes:
        content: A path, the bytes of a file, an image of PIL, or an array; as of `grey_levels`.
        label: Class number or name, as the source has it; None where it has none.
        place: Where it lies, for messages.
        named: Whether the label is a name whatever it looks like (that of a folder).
        fields: The row of a table.
    """

    content: Any
    label: Any
    place: str
    named: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def folder_pictures(folder: Path) -> tuple[list[Picture | BadRow], tuple[str, ...] | None]:
    """Return the pictures of `folder/class_name/` with their classes, or of a flat folder without, in order of names.

    What is hidden (a name that begins with a dot) does not count; any other file is a bad row, unless it is a picture.
    """
    entries = _visible(folder)
    classes = [entry for entry in entries if entry.is_dir()]
    if not classes:
        return [_in_folder(file, None) for file in entries], None
    loose = [f"{entry} stands beside the folders of the classes" for entry in entries if not entry.is_dir()]
    refuse(DataError, f"{folder}: a folder has either folders of classes in it or pictures", loose)
    refuse(DataError, f"{folder}: folders of classes are empty", [str(c) for c in classes if not _visible(c)])
    if all(c.name.isdecimal() for c in classes):
        classes.sort(key=lambda c: int(c.name))
    pictures = [_in_folder(file, c.name) for c in classes for file in _visible(c)]
    return pictures, tuple(c.name for c in classes)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _in_folder(file: Path, label: str | None) -> Picture | BadRow:
    if file.is_dir():
        return BadRow(str(file), "a folder within the folder of a class")
    if file.suffix.lower() not in SUFFIXES:
        return BadRow(str(file), f"not a picture by its name; there are {', '.join(SUFFIXES)}")
    return Picture(file, label, str(file), named=True)


def npz_pictures(file: Path, split: str) -> tuple[list[Picture | BadRow], tuple[str, ...] | None]:
    """Return the pictures of an npz file: keys as of `load_images`."""
    arrays = _arrays(file)
    images = _one_of(arrays, IMAGES, split)
    if images is None:
        raise DataError(
            f"{file}: no array of images of the split {split!r} in it (looked for {', '.join(IMAGES)}, alone or with "
            f"{split!r} before or behind); it has {', '.join(arrays) or 'none'}"
        )
    labels = _one_of(arrays, LABELS, split, beside=images)
    classes = next((arrays[key] for key in CLASSES if key in arrays), None)
    rows, given = arrays[images], None if labels is None else _flat(arrays[labels])
    if classes is not None and classes.ndim != 1:
        raise DataError(f"{file}: its names of classes have the shape {classes.shape}; [number of classes] is expected")
    if rows.ndim not in (3, 4):
        raise DataError(f"{file}: {images} has the shape {rows.shape}; [N, H, W] or [N, H, W, C] is expected")
    if given is not None and given.shape != (len(rows),):
        raise DataError(f"{file}: {labels} has the shape {given.shape} for {len(rows)} images; one label each")
    pictures: list[Picture | BadRow] = [
        Picture(row, None if given is None else given[i], f"{file}: {images} row {i + 1}") for i, row in enumerate(rows)
    ]
    return pictures, None if classes is None else tuple(map(str, classes))


def _arrays(file: Path) -> dict[str, Array]:
    if not file.is_file():
        raise DataError(f"{file}: no such file (paths are relative to the working directory)")
    try:
        content = np.load(file)
        if not isinstance(content, np.ndarray):
            with content:
                return {key: content[key] for key in content.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: an npz file that cannot be read ({error})") from None
    raise DataError(f"{file}: one array, as of np.save; write it with np.savez, under a name such as {IMAGES[0]}")


def _one_of(arrays: Mapping[str, Any], names: Sequence[str], split: str, beside: str | None = None) -> str | None:
    """Return the key of the split's array; plain names serve for "train", and beside images that have a plain one."""
    of_split = [key for name in names for key in (f"{split}_{name}", f"{name}_{split}") if key in arrays]
    plain = [name for name in names if name in arrays]
    found = of_split or (plain if split == "train" else [])
    found = plain if beside in IMAGES else found
    if len(found) > 1:
        raise DataError(f"several arrays could be meant: {', '.join(found)}; leave one of them in the file")
    return found[0] if found else None


def _flat(labels: Array) -> Array:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def is_idx(file: Path) -> bool:
    """Tell by its name whether a file is of the format of MNIST."""
    return IDX.search(file.name) is not None


def idx_pictures(file: Path) -> list[Picture | BadRow]:
    """Return the pictures of an idx file, with the labels of the file beside it where there is one."""
    images = read_idx(file)
    if images.ndim != 3:
        raise DataError(f"{file}: {images.ndim} axes, images have 3; give the file of the images")
    beside = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1"))
    labels = read_idx(beside) if beside != file and beside.is_file() else None
    if labels is not None and labels.shape != (len(images),):
        raise DataError(f"{beside}: {labels.shape} labels for the {len(images)} images of {file.name}")
    return [
        Picture(image, None if labels is None else labels[i], f"{file}: row {i + 1}") for i, image in enumerate(images)
    ]


def read_idx(file: Path) -> Array:
    """Read an idx file of bytes (LeCun's MNIST format), plain or gzipped.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "labels-idx1-ubyte")
    >>> _ = file.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    >>> read_idx(file).tolist()
    [7, 9]
    """
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    except FileNotFoundError:
        raise DataError(f"{file}: no such file (paths are relative to the working directory)") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{file}: not an idx file of bytes (it begins with {raw[:4].hex(' ')}, not 00 00 08)")
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], ">u4").tolist()) if len(raw) >= start else ()
    if len(shape) != raw[3] or len(raw) - start != np.prod(shape, dtype=np.int64):
        raise DataError(f"{file}: it says {shape}, and {len(raw) - start} bytes follow: cut off, or damaged")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def table_pictures(file: Path, split: str, columns: Mapping[str, str]) -> list[Picture | BadRow]:
    """Return the pictures that the rows of a table name, or hold."""
    odd = sorted(set(columns) - {"image", "label", "boxes", "labels"})
    refuse(DataError, f"{file}: columns", [f"{key}: there are image and label; boxes and labels" for key in odd])
    return [_in_row(row, file.parent, columns) for row in read_rows(file, split=split)]


def _in_row(row: Row | BadRow, folder: Path, columns: Mapping[str, str]) -> Picture | BadRow:
    if isinstance(row, BadRow):
        return row
    absent = sorted(set(columns.values()) - set(row.fields))
    if absent:
        return BadRow(row.place, f"{absent[0]}: the row has no such column; it has {', '.join(map(repr, row.fields))}")
    fields = {**row.fields, **{ours: row.fields[theirs] for ours, theirs in columns.items()}}
    image = fields.get("image")
    if isinstance(image, Mapping):  # as `datasets` writes images into Parquet
        image = image.get("bytes") or image.get("path")
    if image is None or image == "":
        return BadRow(row.place, f"image: a path is expected; the row has {', '.join(map(repr, row.fields))}")
    if not isinstance(image, (str, bytes)) and not hasattr(image, "convert"):
        return BadRow(row.place, f"image: a path is expected, this is {type(image).__name__}: {str(image)[:80]}")
    if not isinstance(image, str):
        return Picture(image, fields.get("label"), row.place, fields=fields)
    return Picture(folder / image, fields.get("label"), f"{row.place}: {folder / image}", fields=fields)
