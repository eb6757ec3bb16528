"""Contrastive tuning: positives together, negatives apart, of pairs, triplets, labelled and scored texts."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..config.schema import Contrastive
from ..data import GroupedBatches, TrainBatches
from ..data.columns import TEXTS
from ..embedding import embed_rows
from ..embedding_picture import draw_embeddings, draw_pairs
from ..errors import ConfigError, DataError
from ..interop.sentence_transformers import save_sentence_transformer
from ..losses import make_contrastive_loss
from ..methods.temperature import LearnedTemperature
from ..models.sentence_folder import read_sentence_folder
from ..probes import knn_accuracy, linear_probe
from ..run import RunFolder
from ..similarity import mean_reciprocal_rank, paired_cosine, pearson, recall_at_k, retrieval_ranks, spearman
from ..train.evaluate import evaluate_loss
from ..train.state import TrainState
from ..train.step import ModelLoss
from .start import base_folder, load_state
from .task import Data, Task, steps_of
from .texts import OfTexts, check_scores_differ, classes_in

NEIGHBOURS, REFERENCES, PICTURED, RECALLS = 5, 4096, 2000, (1, 5, 10)
BEFORE, AFTER = "embedding-before.npy", "embedding-after.npy"


class ContrastiveTask(Task):
    """Train the vectors that a model makes of rows.

    Attributes:
        losses: For each format the losses that it can have, the first by default.
    """

    unit = "mean over rows"
    shown: ClassVar[Mapping[str, str]] = {
        "spearman": "Spearman's correlation",
        "pearson": "Pearson's correlation",
        "recall_at_1": "recall at 1",
        "recall_at_10": "recall at 10",
        "mrr": "mean reciprocal rank",
        "knn_accuracy": "accuracy by nearest neighbours",
        "probe_accuracy": "accuracy of a linear probe",
    }

    losses: ClassVar[dict[str, tuple[str, ...]]]

    @property
    def options(self) -> Contrastive:
        """The section `contrastive` of the config."""
        return self.config.contrastive or Contrastive()

    @property
    def form(self) -> str:
        """The format of the rows, one for all sources.

        Raises:
            ConfigError: There are several.
        """
        forms = {source.format for source in (*self.config.data.train, *(self.config.data.eval or ()))}
        if len(forms) > 1:
            raise ConfigError(f"data: one loss takes rows of one format, these are {', '.join(sorted(forms))}")
        return forms.pop()

    @property
    def kind(self) -> str:
        """The name of the loss.

        Raises:
            ConfigError: The rows do not have what it needs.
        """
        known = self.losses[self.form]
        kind = self.options.loss or known[0]
        if kind not in known:
            raise ConfigError(f"contrastive.loss: {kind} cannot be computed of {self.form}; {' or '.join(known)} can")
        return kind

    def load_state(self, steps: int, mesh: Mesh | None, data: Data) -> TrainState:
        """Return the state that the run begins with, a temperature of its own with it where that is learned."""
        del data
        more = LearnedTemperature(self.options.temperature) if self.options.learn_temperature else None
        return load_state(self.config, steps, mesh, more=more)

    def keep(self, run: RunFolder, step: int, data: Data, made: Any) -> None:
        """Keep the vectors of the first and the last evaluation, for the picture."""
        del data
        run.report.mkdir(parents=True, exist_ok=True)
        np.save(run.report / (AFTER if step else BEFORE), made[..., :PICTURED, :])

    def draw(self, run: RunFolder, data: Data) -> None:
        """Draw the held-out vectors before and after."""
        before, after = (run.report / name for name in (BEFORE, AFTER))
        if not (before.is_file() and after.is_file()):
            return
        then, now, values = np.load(before), np.load(after), self.values(data)[:PICTURED]
        known = None if any(value is None for value in values) else values
        if then.ndim == 3:
            figure = draw_pairs(tuple(then), tuple(now), known, title=str(run.path))
        else:
            figure = draw_embeddings(then, now, known or [0] * len(values), data.labels, title=str(run.path))
        figure.savefig(run.report / "embedding.png", dpi=120)

    def values(self, data: Data) -> list[Any]:
        """Return the class or score of each held-out row, None where there is none."""
        return [row.value for part in data.held_out for row in part.examples]


class TextContrast(OfTexts, ContrastiveTask):
    """Of texts."""

    formats = ("pairs", "triplets", "labelled", "scored_pairs")
    losses: ClassVar[dict[str, tuple[str, ...]]] = {
        "pairs": ("info_nce", "nt_xent"),
        "triplets": ("info_nce", "triplet"),
        "labelled": ("supervised_contrastive",),
        "scored_pairs": ("cosent", "cosine_regression", "pairwise_contrastive"),
    }

    def write(self, model: Any, folder: Path, data: Data) -> Path:
        """Write the whole model, as a folder that says how it pools and how long texts are."""
        prompts = read_sentence_folder(base_folder(self.config)).prompts
        return save_sentence_transformer(model, folder, data.tokenizer, prompts=prompts)

    @property
    def loss(self) -> ModelLoss:
        """The loss of a step."""
        o = self.options
        more: dict[str, Any] = {"temperature": o.temperature, "chunk": o.chunk}
        if self.kind == "info_nce":
            more["symmetric"] = o.symmetric
        if o.margin is not None and self.kind in ("triplet", "pairwise_contrastive"):
            more["margin"] = o.margin
        return make_contrastive_loss(self.kind, **more)

    def load_data(self, *, train: bool = True) -> Data:
        """Read the rows; labelled training rows always, since the held-out ones are compared with them."""
        labelled = self.form == "labelled"
        names = classes_in(self.config.data.train) if labelled else None
        return self.read_texts(train=train or labelled, labels=names)

    def check_evaluation(self, data: Data) -> None:
        """Refuse held-out scores that nothing can be correlated with."""
        if self.form == "scored_pairs":
            check_scores_differ(data)

    def make_batches(self, data: Data) -> TrainBatches:
        """Return the batches: random draws, so that any row may be a negative; of classes two and two rows of one."""
        t, steps = self.config.train, steps_of(self.config, data.train)
        options: dict[str, Any] = {"batch_size": t.batch_size, "seed": t.seed, "steps": steps}
        options["collate"] = self.collate()
        if self.form != "labelled":
            return TrainBatches(data.train, window=1, **options)
        values = [row.value for part in data.train for row in part.examples]
        if len(set(values)) in (1, len(values)):
            what = "all rows are of one class" if len(set(values)) == 1 else "every class has one row"
            raise DataError(f"data.train: {what}, so there are no positives and negatives")
        return GroupedBatches(data.train, **options)

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], Any]:
        """Return the loss and the figures of the format, and the vectors `[N, D]`, of pairs `[2, N, D]`.

        Pairs and triplets: recall at 1, 5 and 10 and mean reciprocal rank of each anchor's positive among all positives
        and negatives. Scored pairs: Pearson and Spearman of cosine and score. Classes: accuracy by the nearest training
        rows, and of a linear probe that is fitted to these.
        """
        options: dict[str, Any] = {"batch_size": batch_size, "collate": self.collate()}
        figures = evaluate_loss(model, self.loss, data.held_out, **options)
        rows = [row for part in data.held_out for row in part.examples]

        def vectors(rows: list[Any], column: str) -> Any:
            return embed_rows(model, [row.tokens[column] for row in rows], batch_size)

        if self.form == "labelled":
            known = references([row for part in data.train for row in part.examples])
            found = vectors(rows, "text")
            return {**figures, **by_class(vectors(known, "text"), classes(known), found, classes(rows))}, found
        columns = {name: vectors(rows, name) for name in rows[0].tokens}
        if self.form == "scored_pairs":
            pairs = columns["sentence1"], columns["sentence2"]
            return {**figures, **of_scores(*pairs, rows)}, np.stack(pairs)
        return {**figures, **retrieval(columns, rows)}, np.stack([columns["anchor"], columns["positive"]])

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest batch, as shapes."""
        row = jax.ShapeDtypeStruct((self.config.train.batch_size,), jnp.int32)
        if self.form == "labelled":
            return {**self.widest(), "labels": row}
        columns, scored = TEXTS[self.form], self.form == "scored_pairs"
        texts = {f"{column}_{name}": x for column in columns for name, x in self.widest().items()}
        scores = {"score": jax.ShapeDtypeStruct(row.shape, jnp.float32)} if scored else {}
        return {**texts, **{f"{column}_ids": row for column in columns}, **scores}


def by_class(known: Any, there: list[int], vectors: Any, labels: list[int]) -> dict[str, float]:
    """Return accuracy by the nearest of known vectors, and of a linear probe that is fitted to them."""
    nearest = knn_accuracy(known, there, vectors, labels, k=min(NEIGHBOURS, len(known)))
    return {"knn_accuracy": nearest, "probe_accuracy": linear_probe(known, there, vectors, labels)}


def references(rows: list[Any]) -> list[Any]:
    """Return the training rows that held-out ones are compared with: all, or of many the first of each class."""
    if len(rows) <= REFERENCES:
        return rows
    seen: Counter[int] = Counter()
    share = max(1, REFERENCES // len({row.value for row in rows}))
    kept = []
    for row in rows:
        seen[row.value] += 1
        kept += [row] if seen[row.value] <= share else []
    return kept


def classes(rows: list[Any]) -> list[int]:
    """Return the class of each row."""
    return [row.value for row in rows]


def of_scores(left: Any, right: Any, rows: list[Any]) -> dict[str, float]:
    """Return how the cosines of pairs go with their scores."""
    cosines, scores = paired_cosine(left, right), [row.value for row in rows]
    return {"pearson": pearson(cosines, scores), "spearman": spearman(cosines, scores)}


def retrieval(columns: dict[str, Any], rows: list[Any]) -> dict[str, float]:
    """Return how often and how high each anchor finds its positive; texts that are equal count as one."""
    others = [name for name in columns if name != "anchor"]
    texts, first = np.unique([row.same[name] for name in others for row in rows], return_index=True)
    pool = np.concatenate([columns[name] for name in others])[first]
    right = np.searchsorted(texts, [row.same["positive"] for row in rows])
    ranks = retrieval_ranks(columns["anchor"], pool, right.tolist())
    return {**{f"recall_at_{k}": recall_at_k(ranks, k) for k in RECALLS}, "mrr": mean_reciprocal_rank(ranks)}
