"""Rows of texts that stand side by side, for encoders: pairs, triplets, scored pairs, labelled texts."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .batches import Batch
from .formats import text_of
from .labels import as_label, class_id, number_of
from .rows import BadRow, Row, read_rows
from .source import Dataset, check_columns, renamed, sorted_out, stem
from .tokens import IGNORED

TEXTS = {  # format -> its columns of text; a row may lack `text_pair`
    "pairs": ("anchor", "positive"),
    "triplets": ("anchor", "positive", "negative"),
    "scored_pairs": ("sentence1", "sentence2"),
    "labelled": ("text", "text_pair"),
}
VALUES = {"scored_pairs": "score", "labelled": "label"}
Tokens = dict[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Texts:
    """A row: its texts as tokens, and what is known of it.

    Attributes:
        tokens: For each column `input_ids` `[T]` int32, and `token_type_ids` where a second text follows the first.
        same: For each column a number that equal texts share.
        value: Number of the class, score, or None.
        said: The first text as it was written.
        cut: Whether a text was longer than allowed.
        place: Where the row stands.
    """

    tokens: dict[str, Tokens]
    same: dict[str, int]
    value: int | float | None
    said: str
    cut: bool = False
    place: str = ""

    def __len__(self) -> int:
        return max(len(t["input_ids"]) for t in self.tokens.values())

    def parts(self) -> Iterator[bytes]:
        """Yield the bytes that tell this row from others."""
        yield f"{self.value!r} {list(self.tokens)}\n".encode()
        for tokens in self.tokens.values():
            yield tokens["input_ids"].tobytes()


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows become tokens and values.

    Attributes:
        format: One of `TEXTS`.
        max_length: Tokens of a text at most, special ones included; what is more is cut off.
        labels: Names of the classes; None: labels are numbers (regression).
        score_range: Lowest and highest score; in the batch it runs from 0 to 1.
        known: Numbers of texts by their tokens, shared by all sources whose rows may meet in a batch: texts that
            are the same once they are cut or in lower case share one.
    """

    format: str
    max_length: int
    labels: Sequence[str] | None = None
    score_range: tuple[float, float] = (0.0, 1.0)
    known: dict[bytes, int] = dataclasses.field(default_factory=dict)

    def read(self, tokenizer: Any, fields: Mapping[str, Any]) -> Texts:
        """Return the row of some fields.

        Raises:
            DataError: A text that is missing, empty, or without room; an unknown label, a score outside its range.
        """
        texts = dict(self._texts(fields))
        second = texts.pop("text_pair", None)
        made = {name: tokens_of(tokenizer, text, second, self.max_length) for name, text in texts.items()}
        return Texts(
            {name: tokens for name, (tokens, _) in made.items()},
            {name: self.known.setdefault(t["input_ids"].tobytes(), len(self.known)) for name, (t, _) in made.items()},
            self._value(fields),
            next(iter(texts.values())) + ("" if second is None else f" | {second}"),
            any(cut for _, cut in made.values()),
        )

    def _texts(self, fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for name in TEXTS[self.format]:
            if name == "text_pair":
                if fields.get(name) is not None:
                    yield name, text_of(fields, name)
            elif name == "negative" and isinstance(fields.get(name), list):
                for n, text in enumerate(fields[name], 1):
                    yield name if n == 1 else f"{name}_{n}", text_of({name: text}, name)
            else:
                yield name, text_of(fields, name)

    def _value(self, fields: Mapping[str, Any]) -> int | float | None:
        column = VALUES.get(self.format)
        if column is None:
            return None
        if column not in fields:
            raise DataError(f"{column}: the row has no such column; it has {', '.join(map(repr, fields))}")
        if column == "label":
            given = fields[column]
            return number_of(given, column) if self.labels is None else class_id(as_label(given), self.labels)
        low, high = self.score_range
        return (number_of(fields[column], column, low, high) - low) / (high - low)


def tokens_of(tokenizer: Any, text: str, second: str | None, max_length: int) -> tuple[Tokens, bool]:
    """Return the tokens of a text, or of two as the tokenizer joins them, and whether they had to be cut.

    Raises:
        DataError: `max_length` leaves no room beside special tokens.
    """
    given = (text,) if second is None else (text, second)
    found = tokenizer(*given)
    cut = len(found["input_ids"]) > max_length
    if cut:
        check_room(tokenizer, max_length, len(given))
        found = tokenizer(*given, truncation=True, max_length=max_length)
    names = ["input_ids", *(["token_type_ids"] if second is not None and "token_type_ids" in found else [])]
    return {name: np.array(found[name], np.int32) for name in names}, cut


def check_room(tokenizer: Any, max_length: int, texts: int = 1) -> None:
    """Refuse a length that special tokens fill: all texts would be one, or none be cut, as tokenizers have it."""
    special = len(tokenizer(*[""] * texts)["input_ids"])
    if max_length <= special:
        raise DataError(f"max_length {max_length}: {special} special tokens leave no room for text; allow more tokens")


def load_columns(
    path: str | Path,
    tokenizer: Any,
    reading: Reading,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    skip_bad_rows: bool = False,
    name: str | None = None,
    weight: float = 1.0,
) -> Dataset:
    r"""Read a source of texts side by side.

    Args:
        path: A file or hub data set, as of `read_rows`.
        tokenizer: A tokenizer of transformers.
        reading: Format, length, labels, scores.
        columns: `{name in the format: name in the file}`.
        split: The split, of a hub data set.
        skip_bad_rows: Leave bad rows out and list them, instead of stopping.
        name: What it is called in figures; by default the file's stem.
        weight: Its share of a mixture.

    Returns:
        The data set; its examples are `Texts`.

    Raises:
        DataError: The source cannot be read, or rows are bad: each with file, line, column and what it holds.

    >>> import jaxft, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "rows.csv")
    >>> _ = file.write_text("anchor,positive\nab,abc\n")
    >>> data = load_columns(file, jaxft.testing.ToyTokenizer(), Reading("pairs", max_length=2))
    >>> data.examples[0].tokens["positive"]["input_ids"].tolist(), data.cut
    ([1, 2], 1)
    """
    known = (*TEXTS[reading.format], *([VALUES[reading.format]] if reading.format in VALUES else []))
    check_columns(path, reading.format, columns or {}, known)

    def one(row: Row | BadRow) -> Texts | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            return dataclasses.replace(reading.read(tokenizer, renamed(row, columns or {})), place=row.place)
        except DataError as error:
            return BadRow(row.place, str(error))

    made = [one(row) for row in read_rows(path, split=split)]
    first = next((set(row.tokens) for row in made if isinstance(row, Texts)), set())
    made = [_alike(row, first) for row in made]
    good, bad = sorted_out(path, made, skip_bad_rows)
    if not good:
        raise DataError(f"{path}: no row is left to use")
    return Dataset(good, name or stem(path), weight, bad, (), sum(row.cut for row in good))


def _alike(row: Texts | BadRow, columns: set[str]) -> Texts | BadRow:
    """Refuse a row with more or fewer negatives than the first: a batch is one array a column."""
    if isinstance(row, BadRow) or set(row.tokens) == columns:
        return row
    count = sum(name.startswith("negative") for name in row.tokens)
    wanted = sum(name.startswith("negative") for name in columns)
    return BadRow(row.place, f"negative: {count} texts, but {wanted} in the first row: give each row as many")


def collate_texts(examples: Sequence[Texts], *, rows: int | None = None, limit: int | None = None) -> Batch:
    """Pad rows of texts: for each column `input_ids`, `attention_mask`, and `token_type_ids` where there are any.

    Args:
        examples: The rows.
        rows: Rows of the batch; missing ones are padding, their label -100.
        limit: Width that a text is padded to at most: the positions of the model.

    Returns:
        The arrays, `[rows, width]` int32, with the column in front (`anchor_input_ids`), but for the column `text`;
        `anchor_ids` `[rows]`, equal for equal texts; `labels` or `score` `[rows]`.

    >>> row = Texts({"text": {"input_ids": np.array([3, 4], np.int32)}}, {"text": 0}, 1, "ab")
    >>> {name: x.tolist() for name, x in collate_texts([row], rows=2).items() if x.ndim == 1}
    {'labels': [1, -100]}
    """
    rows = rows or len(examples)
    batch: Batch = {}
    widths = {
        column: text_width(max(len(row.tokens[column]["input_ids"]) for row in examples))
        for column in examples[0].tokens
    }
    widest = max(widths.values())
    for column, width in widths.items():
        prefix = "" if column == "text" else f"{column}_"
        # columns of like widths share one: each pair of widths would be a program to compile
        texts = pad([row.tokens[column] for row in examples], rows, limit, widest if 2 * width > widest else width)
        batch |= {f"{prefix}{name}": x for name, x in texts.items()}
        if prefix:
            same = [row.same[column] for row in examples]
            batch[f"{prefix}ids"] = np.array([*same, *[-1] * (rows - len(same))], np.int32)
    values = [row.value for row in examples]
    if values[0] is not None:
        name = "labels" if "text" in examples[0].tokens else "score"
        kind, absent = (np.int32, IGNORED) if isinstance(values[0], int) else (np.float32, np.nan)
        batch[name] = np.array([*values, *[absent] * (rows - len(values))], kind)
    return batch


def text_width(length: int) -> int:
    """Return the width that a text is padded to: 8, 12, 16, 20, ..., four from a power of two to the next above 16.

    An encoder spends all of its time on the tokens, so finer widths are worth a program more.

    >>> [text_width(n) for n in (1, 9, 17, 33, 100)]
    [8, 12, 20, 40, 112]
    """
    step = max(4, (1 << (length - 1).bit_length()) // 8)
    return max(8, -(-length // step) * step)


def pad(tokens: Sequence[Mapping[str, Any]], rows: int, limit: int | None = None, width: int | None = None) -> Batch:
    """Pad texts to one width, 8, 12, 16, 20, ... tokens, or that which is given, and to `limit` at most where they are
    no longer themselves.

    >>> pad([{"input_ids": np.array([5, 6])}], 1)["attention_mask"].tolist()
    [[1, 1, 0, 0, 0, 0, 0, 0]]
    """
    longest = max(len(t["input_ids"]) for t in tokens)
    width = text_width(longest) if width is None else width
    width = width if limit is None else max(longest, min(width, limit))
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if any("token_type_ids" in t for t in tokens) else [])]
    batch = {name: np.zeros((rows, width), np.int32) for name in names}
    for i, text in enumerate(tokens):
        length = len(text["input_ids"])
        batch["attention_mask"][i, :length] = 1
        for name, ids in text.items():
            batch[name][i, :length] = ids
    return batch


def label_values(path: str | Path, columns: Mapping[str, str] | None, split: str) -> list[Any]:
    """Return the labels of a source as they stand there, good or bad rows, to see what classes there are."""
    column = (columns or {}).get("label", "label")
    rows = [row for row in read_rows(path, split=split) if isinstance(row, Row)]
    found = [row.fields[column] for row in rows if row.fields.get(column) not in (None, "")]
    if not found:
        has = ", ".join(map(repr, rows[0].fields)) if rows else "none"
        raise DataError(f"{path}: no row has a label in the column {column!r}; it has {has}")
    return found
