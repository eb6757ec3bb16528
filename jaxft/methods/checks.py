"""What is wrong with an option of a method, in the words that all of them use."""

from collections.abc import Iterable, Iterator
from typing import Any


def whole_number(**options: Any) -> Iterator[str]:
    """Yield a sentence for each option that is no whole number of at least 1."""
    for option, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{option}={value!r}: give a whole number of at least 1"


def rate(**options: Any) -> Iterator[str]:
    """Yield a sentence for each option that is no rate of dropout."""
    for option, value in options.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            yield f"{option}={value!r}: give a rate of at least 0 and below 1"


def choice(known: Iterable[str], **options: Any) -> Iterator[str]:
    """Yield a sentence for each option that is none of those there are."""
    known = tuple(known)
    for option, value in options.items():
        if value not in known:
            yield f"{option}={value!r}: choose one of {', '.join(map(repr, known))}"
