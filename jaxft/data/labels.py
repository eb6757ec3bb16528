"""Labels of rows as class ids: numbers as they are, names in alphabetical order."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import DataError, nearest

NUMBER, FLOATS = re.compile(r"-?\d+"), (float, np.floating)


def as_label(value: Any) -> int | str:
    """Return a label as a class number or name; text that is a whole number is the number (a CSV has no other).

    >>> as_label(" 3"), as_label("shoes"), as_label(np.int64(4))
    (3, 'shoes', 4)
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer, str, np.str_)):
        hint = "; to predict numbers, set classify.problem: regression" if isinstance(value, FLOATS) else ""
        kind = type(value).__name__
        raise DataError(f"label: a class number or name is expected, this is {kind}: {str(value)[:80]}{hint}")
    text = str(value).strip()
    if not text:
        raise DataError("label: it is empty")
    if not NUMBER.fullmatch(text):
        return text
    if int(text) < 0:
        raise DataError(f"label: {text} is below 0")
    return int(text)


def classes_of(labels: Sequence[int | str]) -> tuple[str, ...]:
    """Return the names of the classes: of numbers 0 to the greatest, of names each of them, sorted.

    Raises:
        DataError: A number far above the number of labels: what is no class would make millions of them.

    >>> classes_of([2, 0]), classes_of(["shoes", "hat", "shoes"])
    (('0', '1', '2'), ('hat', 'shoes'))
    """
    if labels and all(isinstance(label, int) for label in labels):
        top = max(map(int, labels))
        if top > 100 * len(labels) + 1000:
            raise DataError(
                f"label: {top} is far too great for a class among {len(labels)} labels, since classes are counted from "
                "0: give names, or numbers in one sequence (to predict numbers, set classify.problem: regression)"
            )
        return tuple(map(str, range(top + 1)))
    return tuple(sorted({str(label) for label in labels}))


def class_id(label: int | str, classes: Sequence[str]) -> int:
    """Return the id of a label: its place among the classes by name, else, where no name is a number, that number.

    >>> class_id("hat", ("hat", "shoes")), class_id(1, ("hat", "shoes")), class_id(7, ("5", "7"))
    (0, 1, 1)
    """
    if str(label) in classes:
        return list(classes).index(str(label))
    if isinstance(label, int) and label < len(classes) and not any(map(NUMBER.fullmatch, classes)):
        return label
    raise DataError(f"label: {label!r} is none of the {len(classes)} classes; {nearest(str(label), classes)}")


def number_of(value: Any, column: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a number, given as one or as its text, within a range.

    Raises:
        DataError: It is none, not finite, or outside the range.

    >>> number_of("2.5", "score", 0, 5)
    2.5
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{column}: a finite number is expected, this is {str(value)[:80]!r}")
    if not low <= number <= high:
        raise DataError(f"{column}: {number:g} is outside {low:g} to {high:g}; data.score_range says what is possible")
    return number
