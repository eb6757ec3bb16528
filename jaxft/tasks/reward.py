"""Reward models: one score for an answer, so that the better of two has the higher one."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..calibration import brier_score, expected_calibration_error, pair_margins
from ..calibration_picture import draw_margins
from ..config.preferences import RewardModel
from ..data.batches import Batch, eval_batches
from ..data.preference import Comparison, collate_comparisons
from ..losses.comparisons import answer_scores, make_reward_loss, score_loss
from ..run import RunFolder
from ..train.step import ModelLoss
from .comparisons import OfComparisons
from .task import Data

SCORE = ("score",)
BEFORE, AFTER = "margins-before.npy", "margins-after.npy"
Scored = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


class RewardModelling(OfComparisons):
    """Score answers by a head on the last token, or on what an encoder's head reads."""

    formats = ("preference", "ranking")
    unit = "mean over rows"
    shown: ClassVar[Mapping[str, str]] = {"accuracy": "pairs ranked right (share)"}

    @property
    def options(self) -> RewardModel:
        """The section `reward` of the config."""
        return self.config.reward or RewardModel()

    @cached_property
    def loss(self) -> ModelLoss:
        """The loss of a step."""
        loss: ModelLoss = make_reward_loss(margin=self.options.margin, centering=self.options.centering)
        return loss

    def head_labels(self, data: Data) -> tuple[str, ...]:
        """Return the one output of the head."""
        del data
        return SCORE

    def planned_labels(self) -> tuple[str, ...]:
        """Return the same."""
        return SCORE

    def pad(self, examples: Sequence[Comparison], *, rows: int | None = None) -> Batch:
        """Return a batch of rows, with their margins."""
        options: dict[str, Any] = {"rows": rows, "count": self.count, "limit": self.positions}
        return collate_comparisons(examples, **options, margins=True)

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], Any]:
        """Return the figures over all pairs of a better and a worse answer, and the scores `[N, K]` of each source.

        The share that is ranked right, the mean margin and scores, the Brier score and the expected calibration error
        of `sigmoid(margin)`, and the loss; of several sources each by itself too.
        """
        made = {part.name: self.score(model, part.examples, batch_size) for part in data.held_out}
        figures = self.judge(*(np.concatenate(x) for x in zip(*made.values(), strict=True)))
        for name, found in made.items() if len(made) > 1 else ():
            figures |= {f"{figure}/{name}": value for figure, value in self.judge(*found).items()}
        return figures, [found[:2] for found in made.values()]

    def score(self, model: Any, rows: Any, batch_size: int) -> tuple[np.ndarray[Any, Any], ...]:
        """Return scores `[N, K]`, where there are any, and the margins `[N]` of rows, in their order."""
        order = np.argsort([len(row) for row in rows], kind="stable")
        batches = eval_batches([rows[i] for i in order], batch_size, self.collate())
        found = [_scored(model, batch) for batch in batches]
        scores, there = (np.concatenate(jax.device_get(part))[: len(rows)] for part in zip(*found, strict=True))
        back = np.argsort(order)
        margins = [np.nan if row.margin is None else row.margin for row in rows]
        return scores[back], there[back], np.array(margins, np.float32)

    def judge(self, scores: Any, there: Any, margins: Any) -> dict[str, float]:
        """Return the figures of scores `[N, K]`."""
        o, pairs = self.options, pair_margins(scores, there)
        total, rows = score_loss(*map(jnp.asarray, (scores, there, margins)), margin=o.margin, centering=o.centering)
        better, worse = np.triu_indices(scores.shape[1], 1)
        counted = there[:, better] & there[:, worse]
        return {
            "loss": float(total / rows),
            "accuracy": float(np.where(pairs == 0, 0.5, pairs > 0).mean()),
            "margin": float(pairs.mean()),
            "chosen_score": float(scores[:, better][counted].mean()),
            "rejected_score": float(scores[:, worse][counted].mean()),
            "brier": brier_score(pairs),
            "calibration_error": expected_calibration_error(pairs),
        }

    def keep(self, run: RunFolder, step: int, data: Data, made: Any) -> None:
        """Write down some of the rows with their scores, and keep the margins of the first and the last evaluation."""
        margins = np.concatenate([pair_margins(*found) for found in made])
        run.report.mkdir(parents=True, exist_ok=True)
        np.save(run.report / (BEFORE if step == 0 else AFTER), margins)
        rows = [row for part in data.held_out for row in part.examples]
        scores = [of for found, _ in made for of in found]
        shown = self.config.evaluation.samples
        every = max(1, len(rows) // shown) if shown else 1
        run.add_samples(
            [
                {
                    "step": step,
                    "prompt": self.asked(data, row),
                    "expected": " > ".join(str(answer.answer) for answer in row.answers),
                    "answer": " > ".join(f"{score:.3f}" for score in of[: len(row.answers)]),
                }
                for row, of in list(zip(rows, scores, strict=True))[::every][:shown]
            ]
        )

    def asked(self, data: Data, row: Any) -> str:
        """Return the prompt of a row, as a text."""
        best = row.answers[0]
        return str(data.tokenizer.decode(best.input_ids[: best.prompt], skip_special_tokens=True))

    def draw(self, run: RunFolder, data: Data) -> None:
        """Draw the margins of the held-out pairs and how far they can be trusted, before and after."""
        del data
        files = {"before": run.report / BEFORE, "after": run.report / AFTER}
        found = {name: np.load(file) for name, file in files.items() if file.is_file()}
        if found:
            draw_margins(found, title=str(run.path)).savefig(run.report / "scores.png", dpi=120)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest batch, as shapes."""
        margin = jax.ShapeDtypeStruct((self.config.train.batch_size,), jnp.float32)
        return {**super().shapes(), "margin": margin}


@jax.jit
def _scored(model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    return answer_scores(model, batch)
