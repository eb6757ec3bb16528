"""Rewards by a model: a sequence classifier with one output, read at the last real token of prompt and answer."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..data.prompts import Prompt
from ..errors import JaxftError, RewardError
from ..loading import bits_of, kind_of, labels_of, load, load_run, load_tokenizer, root_folder
from ..methods.method import adapters
from ..models.hub import family_of, read_config
from ..run import RunFolder
from .answers import Answers


@dataclasses.dataclass(frozen=True)
class ModelReward:
    """The one output of a sequence classifier on prompt and answer, as they were drawn: nothing is tokenised again.

    Attributes:
        path: A run of task reward (or a regression), or a folder of a sequence classifier.
        tokenizer: The tokenizer of the policy, whose ids it must read.
        model: The model; None before `load`.
    """

    path: str
    tokenizer: Any = None
    model: Any = None

    def problems(self, rows: Sequence[Prompt]) -> Iterator[str]:
        """Say why it cannot score the policy's answers; no weights are read for that."""
        del rows
        try:
            yield from self._unfit()
        except JaxftError as error:
            yield str(error)

    def _unfit(self) -> Iterator[str]:
        run = RunFolder(self.path)
        if run.started and not run.finished:
            yield "the run has not finished, so there is no model yet; go on with --resume"
            return
        folder = root_folder(self.path)
        config = read_config(folder)
        labels = labels_of(run) if run.started else config.labels
        if len(labels) != 1:
            yield f"its head has {len(labels) or 'no'} outputs, and a reward is one: give a reward model"
        elif (family := family_of(config.replace(labels=labels))).reads != "last":
            yield f"a {family.__name__} is no causal model: a reward is read at the last token of a causal one"
        if self.tokenizer is None:
            yield "a model reads tokens: give make_reward the tokenizer of the policy"
            return
        theirs = load_tokenizer(folder)
        if theirs is None:
            yield f"{folder} holds no tokenizer (tokenizer.json), which would tell that its tokens are the policy's"
        else:
            other = difference(self.tokenizer, theirs)
            if other:
                ours = getattr(self.tokenizer, "name_or_path", "") or "the tokenizer of the policy"
                yield f"{folder} has another vocabulary than {ours}: {other}"

    def load(self, base: Any = None, base_folder: str | Path | None = None) -> "ModelReward":
        """Return it with its model, over the arrays of `base` where the run began with that folder, in the same bits.

        Raises:
            RewardError: `base` carries adapters, which would change the score.
            CheckpointError: Files that are damaged, or do not fit.
        """
        run = RunFolder(self.path)
        if run.started and not run.model.is_dir() and base is not None and base_folder is not None:
            if adapters(base):
                raise RewardError(f"{self.path}: the base carries adapters, {list(adapters(base))}: detach them first")
            if root_folder(self.path).resolve() == Path(base_folder).resolve() and bits_of(run) == kind_of(base):
                return dataclasses.replace(self, model=load_run(run, over=base)[0])
        mesh = None if base is None else base.config.mesh
        return dataclasses.replace(self, model=load(self.path, mesh=mesh)[0])

    def __call__(self, answers: Answers) -> Any:
        """Return the scores.

        Raises:
            RewardError: There are no ids to score, more than the model has positions for, or the model is not loaded.
        """
        if self.model is None:
            raise RewardError("its model is not loaded")
        if answers.input_ids is None or answers.attention_mask is None:
            raise RewardError("a model reads tokens: give Answers input_ids and attention_mask")
        counts, positions = np.asarray(answers.attention_mask).sum(1), self.model.positions_left()
        if positions is not None and counts.max() > positions:
            row = int(counts.argmax())
            raise RewardError(f"{answers.said(row)}: {counts[row]} tokens, and the model has {positions} positions")
        scores = self.model(jnp.asarray(answers.input_ids), jnp.asarray(answers.attention_mask))
        return np.asarray(scores[:, 0], np.float32)


def difference(ours: Any, theirs: Any) -> str:
    """Return the first token at which two tokenizers differ, in words; "" where their vocabularies are the same."""
    left, right = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs))
    if left == right:
        return ""
    at = min(i for i in left.keys() | right.keys() if left.get(i) != right.get(i))
    named = [f"{vocabulary[at]!r}" if at in vocabulary else "nothing" for vocabulary in (right, left)]
    return f"token {at} is {named[0]} there, {named[1]} in the policy's"
