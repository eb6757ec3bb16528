"""Rows of answers that were compared: pairs of a better and a worse one, and rankings, best answer first."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, nearest, refuse
from .batches import Batch, width_of
from .chat import encode_chat
from .formats import prompt_and_completion, text_of, turns_of
from .labels import number_of
from .rows import BadRow, Row, read_rows
from .source import Dataset, check_columns, renamed, sorted_out, stem
from .tokens import IGNORED, Example, end_token

COLUMNS = {"preference": ("prompt", "chosen", "rejected", "margin"), "ranking": ("prompt", "answers")}
PAIR = ("chosen", "rejected")
Join = Callable[[Any, str, str], Example]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row: the answers to one prompt.

    Attributes:
        answers: Best first; each with its prompt before it, its labels those of the answer and -100 on the prompt.
        margin: By how much the first is better than the second at least, where the row says so.
        place: Where the row stands.
    """

    answers: tuple[Example, ...]
    margin: float | None = None
    place: str = ""

    def __len__(self) -> int:
        return max(map(len, self.answers))

    def parts(self) -> Iterator[bytes]:
        """Yield the bytes that tell this row from others."""
        yield f"{len(self.answers)} {self.margin!r}\n".encode()
        for answer in self.answers:
            yield from answer.parts()


def load_comparisons(
    path: str | Path,
    tokenizer: Any,
    *,
    format: str,
    max_length: int = 1024,
    join: Join = prompt_and_completion,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    skip_bad_rows: bool = False,
    name: str | None = None,
    weight: float = 1.0,
) -> Dataset:
    r"""Read a source of answers that were compared.

    Each column holds text, or a list of turns, which the chat template renders. A row without `prompt` (trl's implicit
    form) holds whole texts or conversations, whose common beginning is the prompt. trl takes it letter by letter; here
    a word that both begin with is not cut in two. A text gets the end token once, a conversation ends with the special
    token that ends its last turn.

    Args:
        path: A file or hub data set, as of `read_rows`.
        tokenizer: A tokenizer of transformers.
        format: `"preference"` (prompt, chosen, rejected, and a number `margin` if there is one) or `"ranking"` (prompt,
            answers: a list, best first, of any length in each row).
        max_length: Tokens of a prompt with an answer at most. A row with a longer one is left out whole, and listed: a
            score is read at the end, so nothing may be cut off there.
        join: Makes one row of a prompt and an answer, where they are texts.
        columns: `{name in the format: name in the file}`.
        split: The split, of a hub data set.
        skip_bad_rows: Leave bad rows out and list them, instead of stopping.
        name: What it is called in figures; by default the file's stem.
        weight: Its share of a mixture.

    Returns:
        The data set; its examples are `Comparison`.

    Raises:
        DataError: The source cannot be read, or rows are bad (two answers of one row are the same, say): each with
            file, line, column and what it holds; or the tokenizer has no end token.

    >>> import jaxft, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "rows.jsonl")
    >>> _ = file.write_text('{"prompt": "ab", "chosen": "c", "rejected": "d"}\n')
    >>> data = load_comparisons(file, jaxft.testing.ToyTokenizer(), format="preference")
    >>> [answer.labels.tolist() for answer in data.examples[0].answers]
    [[-100, -100, 3, 0], [-100, -100, 4, 0]]
    """
    if format not in COLUMNS:
        raise DataError(f"format {format!r} is unknown; {nearest(format, COLUMNS)}")
    check_columns(path, format, columns or {}, COLUMNS[format])
    if join is prompt_and_completion:
        end_token(tokenizer)

    def one(row: Row | BadRow) -> Comparison | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            return dataclasses.replace(compare(tokenizer, format, renamed(row, columns or {}), join), place=row.place)
        except DataError as error:
            return BadRow(row.place, str(error))
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":  # a template that refuses this conversation
                raise
            return BadRow(row.place, f"the chat template refuses this conversation: {error}")

    good, bad = sorted_out(path, [one(row) for row in read_rows(path, split=split)], skip_bad_rows)
    kept = [row for row in good if len(row) <= max_length]
    reason = f"more than max_length {max_length}"
    long = tuple(BadRow(row.place, f"{len(row)} tokens, {reason}") for row in good if len(row) > max_length)
    if not kept:
        refuse(DataError, f"{path}: no row is left to use", map(str, (*long, *bad)))
    return Dataset(kept, name or stem(path), weight, bad, long)


def compare(tokenizer: Any, format: str, fields: Mapping[str, Any], join: Join) -> Comparison:
    """Return the row of some fields.

    Raises:
        DataError: A column that is missing, empty, or of another kind than the others; fewer than two answers, or two
            that are the same.
    """
    if format == "ranking":
        given = fields.get("answers")
        if not isinstance(given, list) or len(given) < 2:
            what = f"{len(given)} of them" if isinstance(given, list) else repr(given)[:80]
            raise DataError(f"answers: a list of two answers at least is expected, best first; this is {what}")
        named = {f"answers[{i}]": answer for i, answer in enumerate(given)}
    else:
        named = {name: fields[name] for name in PAIR if name in fields}
        for name in PAIR:
            if not isinstance(fields.get(name), (list, Mapping)):
                text_of(fields, name)
    implicit = format == "preference"
    if _kinds(fields.get("prompt"), named):
        made = _talks(tokenizer, fields, named, implicit)
    else:
        made = _texts(tokenizer, fields, named, join, implicit)
    for (i, one), (k, other) in itertools.combinations(zip(named, made, strict=True), 2):
        if np.array_equal(one.input_ids, other.input_ids):
            raise DataError(f"{i} and {k} are the same: {one.answer!r:.80}")
    return Comparison(tuple(made), _margin(fields.get("margin")) if format == "preference" else None)


def _margin(value: Any) -> float | None:
    """Return a margin, None where a row has none: null, an empty cell, NaN.

    >>> _margin("2"), _margin(""), _margin(float("nan"))
    (2.0, None, None)
    """
    return None if value is None or str(value).strip().lower() in ("", "nan") else number_of(value, "margin")


def _kinds(prompt: Any, named: Mapping[str, Any]) -> bool:
    """Tell whether answers are conversations.

    Raises:
        DataError: They are not of one kind, or the prompt is of another.
    """
    for name, given in {"prompt": prompt, **named}.items():
        if isinstance(given, Mapping):
            raise DataError(f"{name}: this is a single turn; a list of turns is expected, or text")
    talks = {name: isinstance(answer, list) for name, answer in named.items()}
    if len(set(talks.values())) > 1:
        odd = " and ".join(f"{name} is {'a list of turns' if talk else 'text'}" for name, talk in talks.items())
        raise DataError(f"answers of one kind are expected, but {odd}")
    if isinstance(prompt, list) and not any(talks.values()):
        raise DataError(
            f"prompt is a list of turns, but {next(iter(named))} is text: give the answers as turns too, "
            '[{"role": "assistant", "content": ...}], or the prompt as text'
        )
    return all(talks.values())


def _texts(
    tokenizer: Any, fields: Mapping[str, Any], named: Mapping[str, Any], join: Join, implicit: bool
) -> list[Example]:
    said = [text_of(named, name) for name in named]
    if fields.get("prompt") is not None or not implicit:
        prompt = text_of(fields, "prompt")
    else:
        prompt = said[0][: _border(said[0], said[1])]
        said = [text[len(prompt) :] for text in said]
    return [join(tokenizer, prompt, text) for text in said]


def _border(one: str, other: str) -> int:
    """Return where two texts part: before a word that they share the beginning of, and the space before it.

    Where one begins with the other, so that nothing would be left of it: before its last word.

    >>> _border("Q: why? A: in fact", "Q: why? A: I do"), _border("A: car", "A: cat"), _border("A: so", "A: so, yes")
    (10, 2, 2)
    """
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    inside = any(re.match(r"\w", text[at:]) for text in (one, other))
    found = re.search(r" ?\w*$" if inside else " ?$", one[:at])
    at -= len(found[0]) if found else 0
    if all(text[at:].strip() for text in (one, other)):
        return at
    last = re.search(r" ?\w*\W*$", one[:at])
    return last.start() if last else 0


def _talks(tokenizer: Any, fields: Mapping[str, Any], named: Mapping[str, Any], implicit: bool) -> list[Example]:
    said = [turns_of(named, name) for name in named]
    prompt = fields.get("prompt")
    before: list[dict[str, Any]] = []
    if implicit and not isinstance(prompt, list):  # a text beside whole conversations is in these too
        both = zip(*said[:2], strict=False)
        alike = ((a["role"], a["content"]) == (b["role"], b["content"]) for a, b in both)
        before = said[0][: sum(itertools.takewhile(bool, alike))]
    if isinstance(prompt, str) and not before:
        raise DataError(
            f"prompt is text, but {next(iter(named))} is a list of turns: give the prompt as turns too, "
            '[{"role": "user", "content": ...}], or the answers as text'
        )
    if isinstance(prompt, list) or not implicit:
        before = turns_of(fields, "prompt")
    else:
        said = [turns[len(before) :] for turns in said]
    return [_answer(tokenizer, before, turns, name) for name, turns in zip(named, said, strict=True)]


def _answer(tokenizer: Any, before: list[dict[str, Any]], turns: list[dict[str, Any]], name: str) -> Example:
    """Return a conversation of which what the assistant says from `turns` on is the answer.

    It ends where the model ends its turn, as an answer that is drawn does: the line's end after it, which many
    templates write, is left out.
    """
    if not before or before[-1]["role"] == "assistant":
        what = "ends with the assistant's turn" if before else "is empty: the answers have no common first turns"
        raise DataError(f"prompt: it {what}; it must end with what the answers answer")
    if not turns or turns[0]["role"] != "assistant":
        what = f"it begins with {turns[0]['role']!r}" if turns else "nothing is left of it after the prompt"
        raise DataError(f"{name}: an answer begins with the assistant's turn after the prompt, but {what}")
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{name}: an answer ends with the assistant's turn, but it ends with {turns[-1]['role']!r}")
    empty = next((turn for turn in turns if turn["role"] == "assistant" and not turn["content"].strip()), None)
    if empty is not None:
        raise DataError(f"{name}: the assistant says nothing in it")
    whole, first = encode_chat(tokenizer, [*before, *turns]), encode_chat(tokenizer, [*before, turns[0]])
    begins = first.prompt
    if not np.array_equal(whole.input_ids[:begins], first.input_ids[:begins]):
        raise DataError(f"{name}: the chat template writes the prompt otherwise once the conversation goes on")
    labels = np.where(np.arange(len(whole)) < begins, IGNORED, whole.labels).astype(np.int32)
    ends = int(np.flatnonzero(labels != IGNORED)[-1]) + 1
    return dataclasses.replace(whole, input_ids=whole.input_ids[:ends], labels=labels[:ends], prompt=begins)


def columns_of(count: int) -> tuple[str, ...]:
    """Return what the answers of a row are called in a batch.

    >>> columns_of(2), columns_of(3)
    (('chosen', 'rejected'), ('answer_1', 'answer_2', 'answer_3'))
    """
    return PAIR if count == 2 else tuple(f"answer_{i + 1}" for i in range(count))


def collate_comparisons(
    examples: Sequence[Comparison],
    *,
    rows: int | None = None,
    count: int = 2,
    limit: int | None = None,
    margins: bool = False,
) -> Batch:
    """Pad rows of answers to one width, for one forward pass over all of them.

    Args:
        examples: The rows.
        rows: Rows of the batch; missing ones are padding.
        count: Answers of a row; where it has fewer, the others are padding.
        limit: Width at most: the positions of the model.
        margins: Whether the batch holds the margins of the rows; NaN where one has none.

    Returns:
        For each answer `input_ids`, `attention_mask` and `labels` (-100 on the prompt and at padding), `[rows, width]`
        int32, with its column in front (`chosen_input_ids`, `rejected_input_ids`; of more answers `answer_1_input_ids`
        and so on); and `margin` `[rows]` float32.

    >>> from jaxft.data.tokens import example
    >>> row = Comparison(tuple(example([5, 6, i], [False, True, True], prompt=1) for i in (7, 8)))
    >>> batch = collate_comparisons([row], rows=2)
    >>> batch["rejected_labels"][:, :4].tolist(), sorted(batch)[:2]
    ([[-100, 6, 8, -100], [-100, -100, -100, -100]], ['chosen_attention_mask', 'chosen_input_ids'])
    """
    rows = rows or len(examples)
    longest = max(map(len, examples))
    shape = (rows, width_of(longest) if limit is None else max(longest, min(width_of(longest), limit)))
    batch: Batch = {}
    for k, column in enumerate(columns_of(count)):
        ids, mask, labels = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
        for i, row in enumerate(examples):
            if k < len(row.answers):
                answer = row.answers[k]
                ids[i, : len(answer)], labels[i, : len(answer)] = answer.input_ids, answer.labels
                mask[i, : len(answer)] = 1
        batch |= {f"{column}_input_ids": ids, f"{column}_attention_mask": mask, f"{column}_labels": labels}
    if margins:
        said = [np.nan if row.margin is None else row.margin for row in examples]
        batch["margin"] = np.array([*said, *[np.nan] * (rows - len(said))], np.float32)
    return batch
