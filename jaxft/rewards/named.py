"""Rewards that a program can tell: the length of an answer, a pattern in it, whether it is right."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Protocol

from ..data.prompts import Prompt
from ..errors import RewardError, nearest, refuse
from .answers import SHOWN, Answers

UNITS = ("words", "characters", "tokens")
NUMBER = re.compile(r"(?<!\d)[-+]?\$?\d[\d,]*(?:\.\d+)?")


class Scorer(Protocol):
    """What scores answers: each of them with one number."""

    def problems(self, rows: Sequence[Prompt]) -> Iterator[str]:
        """Say what about some rows of data makes it impossible to score answers to them."""
        ...

    def __call__(self, answers: Answers) -> Any:
        """Return a list of one number for each answer."""
        ...


@dataclasses.dataclass(frozen=True)
class Length:
    """Closeness of an answer's length n to a target t: `min(n, t) / max(n, t)`.

    1 at the target, 1/2 at half of it and at twice as much, 0 for an empty answer; flat nowhere else.

    Attributes:
        target: The length to be met, at least 1.
        unit: `"words"` (between white space), `"characters"` or `"tokens"` (without the end token).

    >>> Length(4)(Answers(["a", "a"], ["one two", "one two three four"]))
    [0.5, 1.0]
    """

    target: int
    unit: str = "words"

    def __post_init__(self) -> None:
        if isinstance(self.target, bool) or not isinstance(self.target, int) or self.target < 1:
            raise RewardError(f"target={self.target!r}: give a whole number of at least 1")
        if self.unit not in UNITS:
            raise RewardError(f"unit={self.unit!r}: {nearest(str(self.unit), UNITS)}")

    def problems(self, rows: Sequence[Prompt]) -> Iterator[str]:
        """Say nothing: answers to all rows have a length."""
        del rows
        yield from ()

    def __call__(self, answers: Answers) -> list[float]:
        """Return the closeness of each.

        Raises:
            RewardError: Tokens are to be counted, and the answers do not say how many they are.
        """
        if self.unit == "tokens":
            if answers.lengths is None:
                raise RewardError("unit tokens: these answers do not say how many tokens they are (Answers.lengths)")
            counts = [int(n) for n in answers.lengths]
        else:
            counts = [len(text.split() if self.unit == "words" else text) for text in answers.completions]
        return [min(n, self.target) / max(n, self.target) for n in counts]


@dataclasses.dataclass(frozen=True)
class Regex:
    """Whether a pattern occurs in an answer, 1 or 0; or the share of its characters that occurrences cover.

    Attributes:
        pattern: A regular expression of Python, searched for anywhere; flags stand in it (`(?i)`).
        share: The share instead; 0 for an empty answer.

    >>> answers = Answers(["a"] * 2, ["so: <b>x</b>", "x"])
    >>> Regex("<b>.*</b>")(answers), Regex("[a-z]", share=True)(answers)
    ([1.0, 0.0], [0.4166666666666667, 1.0])
    """

    pattern: str
    share: bool = False

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        if not isinstance(self.share, bool):
            raise RewardError(f"share={self.share!r}: give true or false")

    def problems(self, rows: Sequence[Prompt]) -> Iterator[str]:
        """Say nothing: answers to all rows can be searched."""
        del rows
        yield from ()

    def __call__(self, answers: Answers) -> list[float]:
        """Return what was found in each."""
        if not self.share:
            return [float(re.search(self.pattern, text) is not None) for text in answers.completions]
        covered = [sum(len(m.group()) for m in re.finditer(self.pattern, text)) for text in answers.completions]
        return [n / max(len(text), 1) for n, text in zip(covered, answers.completions, strict=True)]


@dataclasses.dataclass(frozen=True)
class ExactAnswer:
    r"""Whether the final answer is that of the data, 1 or 0.

    What the pattern finds last is the final answer, of the data's column as of the text that was written. Where the
    column has nothing of the kind, all of it is. Where the text has not, its last number is, which `last_number=False`
    turns off. Two that are numbers are compared as numbers (`1,200` and `$1200.00` are equal), others as text without
    the white space and full stop around them.

    Attributes:
        column: The column of the data that holds the answer: text or a number.
        pattern: A regular expression; its first group is the answer, all of it where it has none. The default is how
            GSM8K writes answers.
        last_number: Whether to take the last number of a text in which the pattern does not occur.

    >>> known = {"answer": ["2 + 2 = 4\n#### 4"] * 3}
    >>> ExactAnswer()(Answers(["2 + 2"] * 3, ["It is 2 + 2 = 4.", "#### 4.0", "4 or 5"], known))
    [1.0, 1.0, 0.0]
    """

    column: str = "answer"
    pattern: str = r"####\s*([^\n]+)"
    last_number: bool = True

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        if not isinstance(self.column, str) or not self.column:
            raise RewardError(f"column={self.column!r}: give the name of a column")
        if not isinstance(self.last_number, bool):
            raise RewardError(f"last_number={self.last_number!r}: give true or false")

    def problems(self, rows: Sequence[Prompt]) -> Iterator[str]:
        """Name the rows that have no answer to compare with."""
        for row in rows:
            try:
                self._known(row.columns)
            except RewardError as error:
                yield f"{row.place}: {error}"

    def __call__(self, answers: Answers) -> list[float]:
        """Return whether each is right."""
        right = []
        for row, text in enumerate(answers.completions):
            try:
                known = self._known({name: values[row] for name, values in answers.columns.items()})
            except RewardError as error:
                raise RewardError(f"{answers.said(row)}: {error}") from None
            right.append(float(self._written(text) == known))
        return right

    def _known(self, columns: Mapping[str, Any]) -> Decimal | str:
        value = columns.get(self.column)
        if value is None:
            has = ", ".join(map(repr, columns)) or "none"
            what = "it is null" if self.column in columns else f"the row has no such column; it has {has} beside prompt"
            raise RewardError(f"{self.column}: the answer to compare with is expected, {what}")
        found = normal(self._last(str(value)) or str(value))
        if found == "":
            raise RewardError(f"{self.column}: the answer to compare with is empty: {str(value)[:SHOWN]!r}")
        return found

    def _written(self, text: str) -> Decimal | str | None:
        found = self._last(text)
        numbers = NUMBER.findall(text) if found is None and self.last_number else []
        found = numbers[-1] if numbers else found
        return None if found is None else normal(found)

    def _last(self, text: str) -> str | None:
        found = [m[1] if m.re.groups else m[0] for m in re.finditer(self.pattern, text)]
        return found[-1] if found else None


def normal(text: str) -> Decimal | str:
    """Return a text as the number that it is, or without the white space and full stop around it.

    >>> normal(" $1,200.50. "), normal("Paris.")
    (Decimal('1200.50'), 'Paris')
    """
    plain = text.strip().rstrip(".").rstrip()
    return Decimal(re.sub("[$,]", "", plain)) if NUMBER.fullmatch(plain) else plain


def check_pattern(pattern: Any) -> None:
    """Refuse what is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise RewardError(f"pattern={pattern!r}: not a regular expression ({error})") from None


NAMED: dict[str, type[Length] | type[Regex] | type[ExactAnswer]] = {
    "length": Length,
    "regex": Regex,
    "exact_answer": ExactAnswer,
}


def make_named(name: str, options: Mapping[str, Any]) -> Scorer:
    """Return one of the named rewards.

    Raises:
        RewardError: Options that it does not have, lacks, or that are wrong.

    >>> make_named("length", {"target": 20})
    Length(target=20, unit='words')
    """
    fields = {field.name: field for field in dataclasses.fields(NAMED[name])}
    wrong = [f"it has no option {key!r}; {nearest(key, fields)}" for key in options if key not in fields]
    needed = [key for key, field in fields.items() if field.default is dataclasses.MISSING]
    wrong += [f"the option {key!r} is missing" for key in needed if key not in options]
    refuse(RewardError, "its options", wrong)
    return NAMED[name](**options)
