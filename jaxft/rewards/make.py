"""Several rewards as one: weighted, summed, and each by its own name."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..data.prompts import Prompt
from ..errors import JaxftError, RewardError, nearest, refuse
from .answers import SHOWN, Answers
from .functions import Function, is_function, load_function
from .models import ModelReward
from .named import NAMED, Scorer, make_named

Scores = dict[str, np.ndarray[Any, Any]]
HEADLINE = "rewards that cannot be had"


@runtime_checkable
class AnyTerm(Protocol):
    """One reward of several, as `Term` has it and a config's section."""

    @property
    def reward(self) -> str | Callable[..., Any]:
        """What scores."""

    @property
    def weight(self) -> float:
        """Its factor in the sum."""

    @property
    def options(self) -> Mapping[str, Any]:
        """What it takes besides."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One reward of several.

    Attributes:
        reward: `"length"`, `"regex"` or `"exact_answer"`; `"file.py:function"`; a run of task reward, or a folder of a
            sequence classifier with one output; in a script also a function itself.
        weight: Its factor in the sum.
        options: Of a named reward its attributes; of a function further arguments.
    """

    reward: str | Callable[..., Any]
    weight: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Part:
    """A reward that is made: its name in figures, its factor, and what scores."""

    name: str
    weight: float
    scorer: Scorer


@dataclasses.dataclass(frozen=True)
class Reward:
    """What answers are worth.

    Attributes:
        parts: The rewards that are added.

    >>> reward = make_reward([Term("length", 0.5, {"target": 2}), "exact_answer"])
    >>> answers = Answers(["2 + 2 ="] * 2, ["is 4", "5"], {"answer": [4, 4]})
    >>> reward(answers).tolist(), reward.each(answers)["length"].tolist()
    ([1.5, 0.25], [1.0, 0.5])
    """

    parts: tuple[Part, ...]

    def each(self, answers: Answers) -> Scores:
        """Return what each reward says, `{name: [B] float32}`, without its weight.

        Raises:
            RewardError: What came is not one finite number for each answer; reward, row and what came are named.
        """
        return {part.name: _score(part, answers) for part in self.parts}

    def total(self, scores: Scores) -> np.ndarray[Any, Any]:
        """Return the weighted sum of what each says, `[B]` float32."""
        return np.sum([part.weight * scores[part.name].astype(np.float64) for part in self.parts], 0).astype(np.float32)

    def __call__(self, answers: Answers) -> np.ndarray[Any, Any]:
        """Return the reward of each answer, `[B]` float32. Errors as of `each`."""
        return self.total(self.each(answers))

    def models(self) -> dict[str, Any]:
        """Return the models that score, by their paths, once they are loaded."""
        scorers = [part.scorer for part in self.parts if isinstance(part.scorer, ModelReward)]
        return {scorer.path: scorer.model for scorer in scorers if scorer.model is not None}

    def load(self, base: Any = None, base_folder: str | Path | None = None) -> "Reward":
        """Return it with the models of its rewards. Arguments and errors as of `make_reward`."""
        loaded = [
            dataclasses.replace(part, scorer=part.scorer.load(base, base_folder))
            if isinstance(part.scorer, ModelReward)
            else part
            for part in self.parts
        ]
        return Reward(tuple(loaded))


def make_reward(
    terms: Any,
    *,
    tokenizer: Any = None,
    rows: Sequence[Prompt] = (),
    base: Any = None,
    base_folder: str | Path | None = None,
) -> Reward:
    r"""Make one reward of several.

    Args:
        terms: A reward as of `Term.reward`, a `Term`, or a list of these.
        tokenizer: Of the policy; models are asked whether their tokens are the same.
        rows: Prompts that answers will be drawn to: what of them cannot be scored is said now.
        base: The causal language model that the policy stands on, without adapters. A reward model whose run began
            with it shares its arrays, and only an adapter and a head are read.
        base_folder: Where `base` was loaded from.

    Returns:
        The reward: `reward(answers)` is an array, `[B]` float32.

    Raises:
        RewardError: Everything that is wrong with the rewards, at once.
        CheckpointError: A model whose files are damaged.

    >>> make_reward(lambda prompts, completions: [len(text) for text in completions])(Answers(["a"], ["abc"])).tolist()
    [3.0]
    >>> make_reward("lenght")
    Traceback (most recent call last):
    jaxft.errors.RewardError: rewards that cannot be had
      - 'lenght': no reward of this name, no file.py:function, and no folder; nearest: 'length'
    """
    return read_rewards(terms, tokenizer=tokenizer, rows=rows).load(base, base_folder)


def read_rewards(terms: Any, *, tokenizer: Any = None, rows: Sequence[Prompt] = ()) -> Reward:
    """Make one reward of several and check everything, but load no model yet. Arguments, errors as of `make_reward`."""
    problems: list[str] = []
    parts: list[Part] = []
    for term in _terms(terms):
        name = _name(term.reward, [part.name for part in parts])
        said = repr(term.reward if isinstance(term.reward, str) else name)
        try:
            scorer = _scorer(term, tokenizer)
            problems += [f"{said}: {problem}" for problem in scorer.problems(rows)]
            parts.append(Part(name, float(term.weight), scorer))
        except JaxftError as error:
            problems += [f"{said}: {line}" for line in _lines(error)]
    refuse(RewardError, HEADLINE, dict.fromkeys(problems))  # rows to train and to evaluate on may be the same
    return Reward(tuple(parts))


def _terms(terms: Any) -> list[AnyTerm]:
    """Return terms that may be written shorter in the one form."""
    given = list(terms) if isinstance(terms, (list, tuple)) else [terms]
    if not given:
        raise RewardError("no reward was given")
    made = []
    for term in given:
        short = isinstance(term, str) or (callable(term) and not isinstance(term, AnyTerm))
        one = Term(term) if short else term
        if not isinstance(one, AnyTerm):
            raise RewardError(f"{one!r} is no reward: give a name, file.py:function, a folder, a function, or a Term")
        if isinstance(one.weight, bool) or not np.isfinite(_number(one.weight)):
            raise RewardError(f"{one.reward!r}: weight {one.weight!r}: give a finite number")
        made.append(one)
    return made


def _scorer(term: AnyTerm, tokenizer: Any) -> Scorer:
    reward, options = term.reward, dict(term.options)
    if not isinstance(reward, str):
        return Function(reward, options)
    if reward in NAMED:
        return make_named(reward, options)
    if is_function(reward):
        function, file = load_function(reward)
        return Function(function, options, file)
    if not Path(reward).exists() and "/" not in reward:
        what = "no reward of this name, no file.py:function, and no folder"
        raise RewardError(f"{what}; {nearest(reward, NAMED)}")
    if options:
        raise RewardError(f"a model takes no options, and these are {', '.join(map(repr, options))}")
    return ModelReward(reward, tokenizer)


def _name(reward: Any, taken: Sequence[str]) -> str:
    """Return what a reward is called in figures: its own name, the function's, or the folder's."""
    if isinstance(reward, str):
        name = reward.rpartition(":")[2] if is_function(reward) else Path(reward).name or reward
    else:
        name = getattr(reward, "__name__", type(reward).__name__)
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _lines(error: JaxftError) -> Iterator[str]:
    """Yield what an error says: of several problems each."""
    lines = [line.removeprefix("  - ") for line in str(error).splitlines()]
    yield from lines[1:] if len(lines) > 1 else lines


def _score(part: Part, answers: Answers) -> np.ndarray[Any, Any]:
    """Return what one reward says, as numbers that are looked at."""
    try:
        came = part.scorer(answers)
    except RewardError as error:
        raise RewardError(f"reward {part.name!r}: {error}") from error.__cause__
    if not isinstance(came, (list, tuple)) and getattr(came, "ndim", None) != 1:
        shape = getattr(came, "shape", None)
        what = f"{type(came).__name__}{f' of shape {shape}' if shape is not None else ''}: {came!r}"[:SHOWN]
        raise RewardError(f"reward {part.name!r}: it gave no list of numbers, but {what} for {len(answers)} answers")
    values = list(came)
    if len(values) != len(answers):
        raise RewardError(f"reward {part.name!r}: it gave {len(values)} numbers for {len(answers)} answers")
    with np.errstate(over="ignore"):
        scores = np.array([_number(value) for value in values], np.float64).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        row = int(bad[0])
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        what = f"it gave {str(values[row])[:SHOWN]!r}, and one finite number is expected{more}"
        raise RewardError(f"reward {part.name!r}: {answers.said(row)}: {what}")
    return scores


def _number(value: Any) -> float:
    """Return a value as a number, NaN where it is none."""
    try:
        return float("nan") if value is None or isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")
