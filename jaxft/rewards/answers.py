"""What a reward is given: answers, the prompts that they answer, and what is known of these."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RewardError, refuse

SHOWN = 80  # characters of a prompt, or of what came, that a message shows


@dataclasses.dataclass(frozen=True)
class Answers:
    """A batch of B answers.

    Attributes:
        prompts: Text of each prompt; of a conversation as the chat template renders it.
        completions: Text of each answer, without special tokens.
        columns: Every further column of the data, by name: a value for each answer.
        input_ids: `[B, T]` int: prompt and answer with its end token, where there is one; what models score.
        attention_mask: `[B, T]`, zero at padding, which may stand on both sides.
        lengths: Tokens of each answer, without the one that ended it.
        places: Where the row of each prompt stands, for messages.

    Raises:
        RewardError: Not all are of one number.

    >>> len(Answers(["2 + 2 ="], ["4"], {"answer": [4]}))
    1
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    input_ids: Any = None
    attention_mask: Any = None
    lengths: Any = None
    places: Sequence[str] = ()

    def __post_init__(self) -> None:
        n, named = len(self.prompts), {f"columns[{name!r}]": values for name, values in self.columns.items()}
        fields = {"completions": self.completions, **named, "places": self.places or None}
        fields |= {name: getattr(self, name) for name in ("input_ids", "attention_mask", "lengths")}
        counts = {name: len(values) for name, values in fields.items() if values is not None}
        odd = [f"{name} has {count} rows" for name, count in counts.items() if count != n]
        refuse(RewardError, f"answers to {n} prompts that do not fit each other", odd)

    def __len__(self) -> int:
        return len(self.prompts)

    def said(self, row: int) -> str:
        """Return what tells the reader which row this is: its place, and the beginning of its prompt."""
        place = self.places[row] if self.places else f"row {row + 1}"
        text = self.prompts[row]
        return f"{place} ({text[:SHOWN] + '...' * (len(text) > SHOWN)!r})"

    def alone(self, row: int) -> "Answers":
        """Return one of the rows by itself."""
        one = slice(row, row + 1)
        parts = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "lengths")}
        return Answers(
            self.prompts[one],
            self.completions[one],
            {name: values[one] for name, values in self.columns.items()},
            **{name: None if x is None else x[one] for name, x in parts.items()},
            places=self.places[one],
        )
