"""Rows of JSON, JSONL, CSV, Parquet files or of a hub data set, each with the place it came from."""

import csv
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError

SHOWN = 80  # characters of a bad row that a message shows


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        fields: Its columns.
        place: `file:line`, or `file: row n` where lines mean nothing.
    """

    fields: dict[str, Any]
    place: str


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        place: As of `Row`.
        reason: What is wrong with it, and its first characters.
    """

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def read_rows(path: str | Path, *, split: str = "train") -> list[Row | BadRow]:
    r"""Read every row of a source, in its order.

    Args:
        path: A `.json` (a list of objects), `.jsonl`, `.csv`, `.tsv` or `.parquet` file, the text ones also as `.gz`;
            or the name of a data set on the hub.
        split: The split, of a data set on the hub.

    Returns:
        Its rows; one that cannot be read stands as a `BadRow` in its place. Blank lines do not count.

    Raises:
        DataError: There is no such file, it is a folder, it is empty, not UTF-8, or of no kind that is read.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "rows.jsonl")
    >>> _ = file.write_text('{"text": "one"}\n{"text": \n')
    >>> rows = read_rows(file)
    >>> rows[0].fields, rows[1].reason[:14]
    ({'text': 'one'}, 'not valid JSON')
    """
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{file}: this is a folder; give a file ({', '.join(READERS)}) or the name of a hub data set")
    if not file.is_file():
        if file.suffix in (*READERS, ".gz") or file.parts[0] in ("/", ".", "..") or len(file.parts) > 2:
            raise DataError(f"{file}: no such file (paths are relative to the working directory)")
        return list(_from_hub(str(path), split))
    kind = file.suffixes[-2] if file.suffix == ".gz" and len(file.suffixes) > 1 else file.suffix
    if kind not in READERS:
        raise DataError(f"{file}: a file of no kind that is read; there are {', '.join(READERS)}, .gz of these")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")
    rows = list(READERS[kind](file))
    if not rows:
        raise DataError(f"{file}: no row in it")
    return rows


def _text(file: Path) -> str:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return raw.decode("utf-8-sig")  # with or without a byte order mark
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{file}:{line}: not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice, of which `json` would take the last silently."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _object(text: str, place: str) -> Row | BadRow:
    try:
        fields = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return BadRow(place, f"not valid JSON ({error}): {text.strip()[:SHOWN]}")
    return _row(fields, place)


def _row(fields: Any, place: str) -> Row | BadRow:
    if not isinstance(fields, dict):
        return BadRow(place, f"a JSON object is expected, this is {str(fields)[:SHOWN]!r}")
    return Row(fields, place)


def _jsonl(file: Path) -> Iterator[Row | BadRow]:
    for number, line in enumerate(_text(file).split("\n"), 1):  # not splitlines: U+2028 is no end of a line in JSON
        if line.strip():
            yield _object(line, f"{file}:{number}")


def _json(file: Path) -> Iterator[Row | BadRow]:
    text = _text(file)
    if not text.strip():
        return
    if not text.lstrip().startswith("["):
        yield from _jsonl(file)  # many files of this name hold one object a line
        return
    try:
        rows = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{file}:{line}: not valid JSON ({error})") from None
    for number, fields in enumerate(rows, 1):
        yield _row(fields, f"{file}: row {number}")


def _csv(file: Path, delimiter: str = ",") -> Iterator[Row | BadRow]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True, delimiter=delimiter)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file}:{line}: not valid CSV ({error})") from None
        if names is None:
            names = cells
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise DataError(f"{file}:1: the column {twice[0]!r} stands twice")
        elif cells and len(cells) != len(names):
            yield BadRow(f"{file}:{line}", f"{len(cells)} cells under {len(names)} columns: {cells!r}"[: SHOWN * 2])
        elif cells:
            yield Row(dict(zip(names, cells, strict=True)), f"{file}:{line}")


def _parquet(file: Path) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: a Parquet file that cannot be read ({error})") from None
    for number, fields in enumerate(rows, 1):
        yield Row(fields, f"{file}: row {number}")


def _from_hub(name: str, split: str) -> Iterator[Row | BadRow]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the hub, the network or the data set's files make of it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise DataError(
            f"{name}: no such file here, and the hub gave no data set of this name and split {split!r} "
            f"({type(error).__name__}: {reason}). Check the spelling; offline, give a file"
        ) from None
    for number, fields in enumerate(rows, 1):
        yield Row(dict(fields), f"{name}: row {number}")


READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": lambda file: _csv(file, "\t"),
    ".parquet": _parquet,
}
