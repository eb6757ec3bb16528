"""A source of rows as examples, with every fault named before anything is trained."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest, refuse
from .chat import check_template
from .formats import COLUMNS, FORMATS
from .rows import BadRow, Row, read_rows
from .templates import Template
from .tokens import Example


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The examples of one source.

    Attributes:
        examples: In the order of the rows; each has a length, a `place`, and `parts()`, the bytes that tell it.
        name: What the source is called in figures.
        weight: Its share of a mixture, relative to the others'.
        skipped: Rows that were bad and left out, because that was asked for.
        dropped: Rows whose answer lies wholly past `max_length`, so that nothing of them could be trained; prompts
            that are longer.
        cut: Number of rows of which a part is trained and a part cut off.
    """

    examples: Sequence[Any]
    name: str = "data"
    weight: float = 1.0
    skipped: tuple[BadRow, ...] = ()
    dropped: tuple[BadRow, ...] = ()
    cut: int = 0

    def __len__(self) -> int:
        return len(self.examples)


def load_dataset(
    path: str | Path,
    tokenizer: Any,
    *,
    format: str,
    max_length: int = 1024,
    template: Template | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    skip_bad_rows: bool = False,
    name: str | None = None,
    weight: float = 1.0,
) -> Dataset:
    r"""Read a source and make examples of it.

    Args:
        path: A file or hub data set, as of `read_rows`.
        tokenizer: A tokenizer of transformers.
        format: `"instruction"` (instruction, input, output), `"prompt_completion"` (prompt, completion),
            `"messages"` (a list of role and content) or `"text"`.
        max_length: Tokens of a row at most; the rest is cut off at its end.
        template: Text around an instruction; None: the library's own.
        columns: `{name in the format: name in the file}`, for files that call them otherwise.
        split: The split, of a hub data set.
        skip_bad_rows: Leave bad rows out and list them, instead of stopping.
        name: What it is called in figures; by default the file's stem.
        weight: Its share of a mixture.

    Returns:
        The data set.

    Raises:
        DataError: The source cannot be read, or rows are bad: each with file, line, column and what it holds.

    >>> import jaxft, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "rows.jsonl")
    >>> _ = file.write_text('{"prompt": "ab", "completion": "cd"}\n')
    >>> data = load_dataset(file, jaxft.testing.ToyTokenizer(), format="prompt_completion")
    >>> data.examples[0].input_ids.tolist(), data.examples[0].labels.tolist()
    ([1, 2, 3, 4, 0], [-100, -100, 3, 4, 0])
    """
    if format not in FORMATS:
        raise DataError(f"format {format!r} is unknown; {nearest(format, FORMATS)}")
    check_columns(path, format, columns or {}, COLUMNS[format])
    if format == "messages":
        check_template(tokenizer)
    made = [
        _encode(row, tokenizer, format, template or Template(), columns or {}) for row in read_rows(path, split=split)
    ]
    good, bad = sorted_out(path, made, skip_bad_rows)
    cut = [example.cut(max_length) for example in good]
    kept = [example for example in cut if example.trained]
    reason = f"nothing to train is left of it within max_length {max_length}"
    dropped = tuple(
        BadRow(e.place, f"{reason} (it has {len(w)} tokens)") for w, e in zip(good, cut, strict=True) if not e.trained
    )
    if not kept:
        refuse(DataError, f"{path}: no row is left to use", map(str, (*dropped, *bad)))
    return Dataset(
        kept,
        name or stem(path),
        weight,
        bad,
        dropped,
        sum(len(e) > max_length for e in good) - len(dropped),
    )


def sorted_out(path: str | Path, made: Sequence[Any], skip_bad_rows: bool) -> tuple[list[Any], tuple[BadRow, ...]]:
    """Return the good ones of what became of rows, and the bad ones, which may be there where they are skipped.

    Raises:
        DataError: Bad rows, each with its reason.
    """
    good, bad = ([one for one in made if isinstance(one, BadRow) is kind] for kind in (False, True))
    if not skip_bad_rows:
        hint = "correct them, or set data.skip_bad_rows to leave them out"
        refuse(DataError, f"{path}: {len(bad)} of {len(made)} rows cannot be used ({hint})", map(str, bad))
    return good, tuple(bad)


def stem(path: str | Path) -> str:
    """Return what a source is called if it has no other name."""
    return Path(path).name.split(".")[0] or str(path)


def renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a row under the names that its format has for them.

    Raises:
        DataError: The row lacks a column that is named.
    """
    absent = sorted(set(columns.values()) - set(row.fields))
    if absent:
        raise DataError(f"{absent[0]}: the row has no such column; it has {', '.join(map(repr, row.fields))}")
    return {**row.fields, **{ours: row.fields[theirs] for ours, theirs in columns.items()}}


def check_columns(path: str | Path, format: str, columns: Mapping[str, str], known: Sequence[str]) -> None:
    """Refuse names of columns that a format does not have."""
    odd = [f"{key}: {format} rows have no such column; {nearest(key, known)}" for key in columns if key not in known]
    refuse(DataError, f"{path}: columns", odd)


def _encode(
    row: Row | BadRow, tokenizer: Any, format: str, template: Template, columns: Mapping[str, str]
) -> Example | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        return dataclasses.replace(FORMATS[format](tokenizer, renamed(row, columns), template), place=row.place)
    except DataError as error:
        return BadRow(row.place, str(error))
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":  # a chat template that refuses this conversation
            raise
        return BadRow(row.place, f"messages: the chat template refuses this conversation: {error}")
