"""Rewards by a person's own function: from a file that is named by its path, with the signature that trl has."""

import dataclasses
import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from ..data.prompts import Prompt, columns_of
from ..errors import RewardError, nearest
from .answers import Answers

GIVEN = ("prompts", "completions")


@dataclasses.dataclass(frozen=True)
class Function:
    """A function `f(prompts, completions, **columns) -> list of float`, called by keyword.

    Of the columns it gets those that it names, or all where it takes any (`**`); options go to it as they are.

    Attributes:
        function: The function.
        options: Further arguments.
        file: Where it was read from; "" where it was given as it is.

    >>> def short(prompts, completions, limit):
    ...     return [float(len(text) < limit) for text in completions]
    >>> Function(short, {"limit": 3})(Answers(["a", "a"], ["ab", "abcd"]))
    [1.0, 0.0]
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    file: str = ""

    def problems(self, rows: Sequence[Prompt]) -> Iterator[str]:
        """Say how it cannot be called on answers to these rows."""
        if inspect.iscoroutinefunction(self.function):
            yield "it is an async function: give a plain one"
        takes, anything = parameters(self.function)
        columns = set(columns_of(rows))
        for name in GIVEN:
            if name not in takes and not anything:
                yield f"it does not take {name}: it is called as f(prompts, completions, **columns)"
        for name in self.options:
            if name in GIVEN or name in columns:
                yield f"the option {name!r} is what the function gets of the answers: call it otherwise"
            elif name not in takes and not anything:
                yield f"it has no option {name!r}; {nearest(name, takes)}"
        for name, parameter in takes.items():
            if parameter.kind is parameter.POSITIONAL_ONLY:
                yield f"it takes {name} by position alone, and is called by keyword: take the / away"
            elif rows and parameter.default is parameter.empty and name not in (*GIVEN, *self.options, *columns):
                has = ", ".join(map(repr, sorted(columns))) or "none"
                yield f"it takes {name}, which is no column of the rows (they have {has} beside prompt) and no option"

    def __call__(self, answers: Answers) -> Any:
        """Return what it returns.

        Raises:
            RewardError: It raised something: what, where, and at which row.
        """
        try:
            return self._called(answers)
        except Exception as error:
            row = self._guilty(answers)
            where = answers.said(row) if row is not None else f"{len(answers)} answers, from {answers.said(0)} on"
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.file]
            at = f" ({self.file}:{lines[-1]})" if lines else ""
            raise RewardError(f"{where}: it raised {type(error).__name__}: {error}{at}") from error

    def _called(self, answers: Answers) -> Any:
        takes, anything = parameters(self.function)
        given = {"prompts": answers.prompts, "completions": answers.completions, **answers.columns}
        lists = {name: list(values) for name, values in given.items() if anything or name in takes}
        return self.function(**lists, **self.options)

    def _guilty(self, answers: Answers) -> int | None:
        """Return the first row on which it raises alone; None where it does so on several together only."""
        for row in range(len(answers)):
            try:
                self._called(answers.alone(row))
            except Exception:
                return row
        return None


def parameters(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters of a function by name, and whether it takes any others by keyword.

    >>> takes, anything = parameters(lambda prompts, **more: None)
    >>> list(takes), anything
    (['prompts'], True)
    """
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some functions written in C nothing is known
        return {}, True
    loose = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name: p for p in found if p.kind not in loose}, any(p.kind is loose[0] for p in found)


def is_function(reward: str) -> bool:
    """Tell whether a reward is written as a function of a file.

    >>> is_function("rewards.py:polite"), is_function("runs/reward"), is_function("rewards.py")
    (True, False, True)
    """
    return ".py:" in reward or reward.endswith(".py")


def load_function(reward: str) -> tuple[Callable[..., Any], str]:
    """Return the function that `file.py:function` names, and its file.

    The file is run, as a module that belongs to nothing; it may import what is installed.

    Raises:
        RewardError: No function is named, there is no such file, it cannot be run, or has no such function.
    """
    path, colon, name = reward.rpartition(":")
    if not colon or not name or not path.endswith(".py"):
        raise RewardError("give the function too: file.py:function")
    file = Path(path)
    if not file.is_file():
        raise RewardError(f"{path}: no such file (paths are relative to the working directory)")
    module = _run(file)
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, x in vars(module).items() if callable(x) and not key.startswith("_")]
        raise RewardError(f"{path}: there is no {name!r} in it; {nearest(name, known) if known else 'no function is'}")
    if not callable(function):
        raise RewardError(f"{path}: {name} is a {type(function).__name__}, no function")
    return function, str(file)


class _Source(SourceFileLoader):
    """Reads the file as it is: what a cache beside it holds may be of an earlier one, and none is written."""

    def get_code(self, fullname: str) -> Any:
        del fullname
        return self.source_to_code(self.get_data(self.path), self.path)


def _run(file: Path) -> Any:
    name = f"_reward_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # where dataclasses of the file look their types up
    try:
        _Source(name, str(file)).exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        at = f"{file}:{line}" if line else str(file)
        raise RewardError(f"{at}: the file cannot be run ({type(error).__name__}: {error})") from error
    return module
