"""Text to token ids and labels, exact to the token."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import DataError

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Example:
    """A row as a model sees it.

    Attributes:
        input_ids: `[T]` int32.
        labels: `[T]` int32, unshifted: the ids that are trained, -100 elsewhere.
        prompt: Number of tokens before the last answer: what a model is given to continue. 0: nothing to continue.
        answer: The text that should follow; None where the format knows none.
        place: Where the row stands.
    """

    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    prompt: int = 0
    answer: str | None = None
    place: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    def cut(self, length: int) -> "Example":
        """Return the first tokens; ids and labels are cut together, so that the mask cannot shift."""
        whole = self if self.prompt < length else dataclasses.replace(self, prompt=0, answer=None)  # no answer is left
        return dataclasses.replace(whole, input_ids=self.input_ids[:length], labels=self.labels[:length])

    def parts(self) -> Iterator[bytes]:
        """Yield the bytes that tell this row from others."""
        yield f"{len(self)} {self.prompt} {self.answer!r}\n".encode()
        yield self.input_ids.tobytes()
        yield self.labels.tobytes()

    @property
    def trained(self) -> int:
        """Number of tokens that are trained: the first of a row has nothing before it and does not count."""
        return int((self.labels[1:] != IGNORED).sum())


def example(ids: Sequence[int], trained: Sequence[bool], **more: Any) -> Example:
    """Build an example from ids and which of them are trained.

    >>> example([5, 6, 7], [False, True, True]).labels.tolist()
    [-100, 6, 7]
    """
    array = np.array(ids, np.int32)
    return Example(array, np.where(np.array(trained, bool), array, IGNORED).astype(np.int32), **more)


def opening(tokenizer: Any, text: str) -> list[int]:
    """Tokenise the beginning of a row: with the begin token once where the tokenizer adds one, and no end token."""
    ids = list(tokenizer(text)["input_ids"])
    begin, end = _id(tokenizer, "bos_token_id"), _id(tokenizer, "eos_token_id")
    if begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]  # the text brought its own
    if end is not None and ids[-1:] == [end] and continuing(tokenizer, text)[-1:] != [end]:
        ids = ids[:-1]  # some tokenizers close every text
    return ids


def continuing(tokenizer: Any, text: str) -> list[int]:
    """Tokenise what follows in a row: no special tokens are added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def closed(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return ids with the end token after them, once."""
    end = end_token(tokenizer)
    return ids if ids[-1:] == [end] else [*ids, end]


def closed_text(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return ids with the end token after them, unless a special token ends them, of a chat rendered elsewhere."""
    none = {_id(tokenizer, f"{kind}_token_id") for kind in ("bos", "unk", "pad")} - {_id(tokenizer, "eos_token_id")}
    special = set(getattr(tokenizer, "all_special_ids", None) or ()) - none
    last = next((i for i in reversed(ids) if tokenizer.decode([i]).strip()), None)
    return ids if last is not None and last in special else [*ids, end_token(tokenizer)]


def end_token(tokenizer: Any) -> int:
    """Return the id of the end token, which every answer needs.

    Raises:
        DataError: The tokenizer has none.
    """
    end = _id(tokenizer, "eos_token_id")
    if end is None:
        raise DataError("the tokenizer has no end token (eos_token): a model could not learn where an answer ends")
    return end


def _id(tokenizer: Any, name: str) -> int | None:
    value = getattr(tokenizer, name, None)
    return None if value is None else int(value)
