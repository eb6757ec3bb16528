"""Contrastive tuning: positives together, negatives apart, of pairs, triplets, labelled and scored texts."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
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
from ..errors import ConfigError, refuse
from ..interop.sentence_transformers import save_sentence_transformer
from ..losses import make_contrastive_loss
from ..losses.pairs import KINDS
from ..methods import Method
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
from .texts import OfTexts, check_known, check_positives, check_scores_differ, classes_in

NEIGHBOURS, REFERENCES, PICTURED, RECALLS = 5, 4096, 2000, (1, 5, 10)
OPTIONS = ("temperature", "symmetric", "margin")
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

    def given(self) -> dict[str, Any]:
        """Return the options of the loss that the config gives.

        Raises:
            ConfigError: The loss has no such option, or no temperature to learn.
        """
        o, known = self.options, KINDS[self.kind][1]
        found = {name: value for name in OPTIONS if (value := getattr(o, name)) is not None}
        wrong = [f"{name}: {self.kind} of {self.form} has no such option" for name in found if name not in known]
        if o.learn_temperature and "temperature" not in known:
            wrong.append(f"learn_temperature: {self.kind} has no temperature")
        if o.augmentation is not None and self.form != "images":
            wrong.append("augmentation: it makes views of images")
        refuse(ConfigError, "contrastive", wrong)
        return found

    def learned(self) -> Method | None:
        """Return what is trained besides the method: the temperature, where the config says so."""
        if not self.options.learn_temperature:
            return None
        return LearnedTemperature(self.options.temperature or KINDS[self.kind][1]["temperature"])

    def load_state(self, steps: int, mesh: Mesh | None, data: Data) -> TrainState:
        """Return the state that the run begins with, a temperature of its own with it where that is learned.

        Raises:
            ConfigError: It is to be learned, and the config goes on with a run's adapter, which has none.
        """
        del data
        if self.config.method is None and self.options.learn_temperature:
            raise ConfigError("contrastive.learn_temperature: method is left out, so what is trained is the run's")
        return load_state(self.config, steps, mesh, more=self.learned())

    def check_rows(self) -> None:
        """Refuse batches in which a row would meet no other.

        Raises:
            ConfigError: They are of one row.
        """
        t = self.config.train
        if t.batch_size // t.accumulate < 2:
            raise ConfigError(
                f"train.batch_size {t.batch_size}, accumulate {t.accumulate}: rows are compared with those of their "
                "micro-batch, which has one: take two at least (contrastive.chunk saves memory and keeps them together)"
            )

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

    @cached_property
    def loss(self) -> ModelLoss:
        """The loss of a step."""
        return make_contrastive_loss(self.kind, chunk=self.options.chunk, **self.given())

    def load_data(self, *, train: bool = True) -> Data:
        """Read the rows; labelled training rows always, since the held-out ones are compared with them."""
        labelled = self.form == "labelled"
        names = classes_in(self.config.data.train) if labelled else None
        return self.read_texts(train=train or labelled, labels=names)

    def check_evaluation(self, data: Data) -> None:
        """Refuse held-out rows that nothing could be measured on."""
        if self.form == "scored_pairs":
            check_scores_differ(data)
        if self.form == "labelled" and data.held_out:
            check_known(data)
            check_positives(data, held_out=True)

    def make_batches(self, data: Data) -> TrainBatches:
        """Return the batches: random draws, so that any row may be a negative; of classes two and two rows of one."""
        t, steps = self.config.train, steps_of(self.config, data.train)
        self.check_rows()
        options: dict[str, Any] = {"batch_size": t.batch_size, "seed": t.seed, "steps": steps}
        options["collate"] = self.collate()
        if self.form != "labelled":
            return TrainBatches(data.train, window=1, **options)
        check_positives(data)
        return GroupedBatches(data.train, **options)

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], Any]:
        """Return the loss and the figures of the format, and the vectors `[N, D]`, of pairs `[2, N, D]`.

        Pairs and triplets: recall at 1, 5 and 10 and mean reciprocal rank of each anchor's positive among all positives
        and negatives. Scored pairs: Pearson and Spearman of cosine and score. Classes: accuracy by the nearest training
        rows, and of a linear probe that is fitted to these.
        """
        options: dict[str, Any] = {"batch_size": batch_size, "collate": self.collate(), "by_length": False}
        mixed = [dataclasses.replace(part, examples=mix(part.examples)) for part in data.held_out]
        figures = evaluate_loss(model, self.loss, mixed, **options)
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


def mix(rows: Sequence[Any]) -> list[Any]:
    """Return rows in a fixed random order, so that the negatives of a batch are any; of classes two and two of one."""
    draw = np.random.default_rng(0)
    shuffled = [rows[i] for i in draw.permutation(len(rows))]
    if not isinstance(rows[0].value, int):
        return shuffled
    groups: dict[int, list[Any]] = {}
    for row in shuffled:
        groups.setdefault(row.value, []).append(row)
    pairs = [group[i : i + 2] for group in groups.values() for i in range(0, len(group), 2)]
    return [row for i in draw.permutation(len(pairs)) for row in pairs[i]]


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
