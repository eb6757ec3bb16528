"""Rows of prompts that answers are drawn to, with whatever else a reward needs to know of them."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, refuse
from .batches import Batch
from .chat import asking
from .formats import text_of, turns_of
from .rows import BadRow, Row, read_rows
from .source import Dataset, renamed, sorted_out, stem
from .tokens import continuing, end_token, opening

RESERVED = ("prompts", "completions")  # what a reward function gets besides the columns


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row: what a model is given to continue, and what is known of it.

    Attributes:
        input_ids: `[T]` int32.
        said: The text: as it was written, or of a conversation as the chat template renders it.
        columns: Every further column of the row, as it is.
        place: Where the row stands.
        row: Its number among those of a run, which batches carry; -1 where it has none.
    """

    input_ids: np.ndarray[Any, Any]
    said: str
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = ""
    row: int = -1

    def __len__(self) -> int:
        return len(self.input_ids)

    def parts(self) -> Iterator[bytes]:
        """Yield the bytes that tell this row from others."""
        yield f"{len(self)} {sorted(self.columns.items())!r}\n".encode()
        yield self.input_ids.tobytes()


def encode_prompt(tokenizer: Any, fields: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a row: the column `prompt`, a text or a list of turns, and beside it the other columns.

    A text is tokenised as the beginning of a row, with the begin token that the tokenizer adds and no end token; a
    conversation is rendered by the chat template, up to where the assistant is to speak.

    Raises:
        DataError: A prompt that is missing, empty, or ends with the assistant's turn; half a character; no template; a
            column with the name of something that a reward function gets.
    """
    taken = [name for name in RESERVED if name in fields]
    if taken:
        raise DataError(f"{taken[0]}: a reward function gets something else by this name: call the column otherwise")
    if isinstance(fields.get("prompt"), list):
        turns = turns_of(fields, "prompt")
        if turns[-1]["role"] == "assistant":
            raise DataError("prompt: the last turn is the assistant's, so that nothing is asked for")
        said = asking(tokenizer, turns)
        ids = continuing(tokenizer, said)
    else:
        said = text_of(fields, "prompt")
        ids = opening(tokenizer, said)
    if not ids:
        raise DataError(f"prompt: the tokenizer makes no token of it: {said!r}")
    return Prompt(np.array(ids, np.int32), said, {name: x for name, x in fields.items() if name != "prompt"})


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    skip_bad_rows: bool = False,
    name: str | None = None,
    weight: float = 1.0,
) -> Dataset:
    r"""Read a source of prompts.

    Args:
        path: A file or hub data set, as of `read_rows`.
        tokenizer: A tokenizer of transformers, with an end token.
        max_length: Tokens of a prompt at most: longer ones are left out, since a prompt that is cut asks for something
            else.
        columns: `{name: name in the file}`: of `prompt`, and of whatever columns a reward reads (`answer`, say).
        split: The split, of a hub data set.
        skip_bad_rows: Leave bad rows out and list them, instead of stopping.
        name: What it is called in figures; by default the file's stem.
        weight: Its share of a mixture.

    Returns:
        The data set; its examples are `Prompt`. Those too long are listed in `dropped`.

    Raises:
        DataError: The source cannot be read, or rows are bad: each with file, line, column and what it holds; no
            prompt is left; or the tokenizer has no end token.

    >>> import jaxft, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "rows.jsonl")
    >>> _ = file.write_text('{"question": "ab", "answer": 3}\n{"question": "abc", "answer": 4}\n')
    >>> data = load_prompts(file, jaxft.testing.ToyTokenizer(), max_length=2, columns={"prompt": "question"})
    >>> [(row.input_ids.tolist(), row.columns) for row in data.examples], len(data.dropped)
    ([([1, 2], {'answer': 3})], 1)
    """
    end_token(tokenizer)
    made = [_encode(row, tokenizer, columns or {}) for row in read_rows(path, split=split)]
    good, bad = sorted_out(path, made, skip_bad_rows)
    kept = [prompt for prompt in good if len(prompt) <= max_length]
    dropped = tuple(
        BadRow(prompt.place, f"the prompt has {len(prompt)} tokens, more than max_length {max_length}")
        for prompt in good
        if len(prompt) > max_length
    )
    if not kept:
        refuse(DataError, f"{path}: no row is left to use", map(str, (*dropped, *bad)))
    return Dataset(kept, name or stem(path), weight, bad, dropped)


def _encode(row: Row | BadRow, tokenizer: Any, columns: Mapping[str, str]) -> Prompt | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        fields = renamed(row, columns)
        given = {name: x for name, x in fields.items() if name in columns or name not in columns.values()}
        return dataclasses.replace(encode_prompt(tokenizer, given), place=row.place)
    except DataError as error:
        return BadRow(row.place, str(error))
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":  # a chat template that refuses this conversation
            raise
        return BadRow(row.place, f"prompt: the chat template refuses this conversation: {error}")


def numbered(datasets: Sequence[Dataset]) -> tuple[Dataset, ...]:
    """Return data sets whose prompts carry their number, counted over all of them: what `row` of a batch holds.

    >>> two = numbered([Dataset([Prompt(np.array([1]), "a")]), Dataset([Prompt(np.array([2]), "b")])])
    >>> [prompt.row for data in two for prompt in data.examples]
    [0, 1]
    """
    made, first = [], 0
    for data in datasets:
        rows = [dataclasses.replace(prompt, row=first + i) for i, prompt in enumerate(data.examples)]
        made.append(dataclasses.replace(data, examples=rows))
        first += len(rows)
    return tuple(made)


def collate_prompts(examples: Sequence[Prompt], *, width: int, rows: int | None = None, repeat: int = 1) -> Batch:
    """Pad prompts on their left, so that all end where the answers begin.

    Args:
        examples: The prompts.
        width: Width of the batch, one for all batches of a run: each width is a program to compile.
        rows: Rows of the batch; missing ones are the first prompt again, with the number -1: they count nothing.
        repeat: How often each prompt stands there, one after the other: a group of answers to each.

    Returns:
        `input_ids` and `attention_mask` `[rows, width]` int32, and `row` `[rows]` int32: the numbers of the prompts
        (`Prompt.row`), by which texts and columns are found. With `repeat` there are as many times `rows`.

    Raises:
        DataError: A prompt is wider than the batch.

    >>> batch = collate_prompts([Prompt(np.array([5, 6]), "ab", row=3)], width=3, rows=2)
    >>> batch["input_ids"].tolist(), batch["row"].tolist()
    ([[0, 5, 6], [0, 5, 6]], [3, -1])
    """
    rows = rows or len(examples)
    long = [prompt for prompt in examples if len(prompt) > width]
    refuse(DataError, "prompts wider than their batch", [f"{p.place}: {len(p)} tokens, not {width}" for p in long])
    ids, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    for i in range(rows):
        prompt = examples[i if i < len(examples) else 0]
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt.input_ids, 1
    row = np.array([*(prompt.row for prompt in examples), *[-1] * (rows - len(examples))], np.int32)
    return {name: np.repeat(x, repeat, 0) for name, x in (("input_ids", ids), ("attention_mask", mask), ("row", row))}


def columns_of(prompts: Sequence[Prompt], names: Iterable[str] = ()) -> dict[str, list[Any]]:
    """Return the columns of some prompts, as reward functions get them: None where a row lacks what another has.

    `names`: columns that are there in any case.

    >>> columns_of([Prompt(np.array([1]), "a", {"answer": 3}), Prompt(np.array([2]), "b")])
    {'answer': [3, None]}
    """
    every = dict.fromkeys([*names, *(name for prompt in prompts for name in prompt.columns)])
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in every}
