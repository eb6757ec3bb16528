"""Model losses over pairs, triplets, labelled rows and scored pairs: embed the columns of a batch, and compare them."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import BatchError, MethodError, nearest, refuse
from ..methods.temperature import temperature_of
from ..models.placement import mesh_of
from . import graded
from .cached import embed_in_chunks
from .contrastive import by_class, picked
from .entropy import IGNORED
from .masks import different_label_mask, different_text_mask, same_text_groups
from .vectors import check_options

Result = tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]
Loss = Callable[..., Result]


def make_contrastive_loss(kind: str, *, chunk: int | None = None, **options: Any) -> Loss:
    """Return the model loss of a kind: it embeds the columns of a batch with `model.pooled`, and compares them.

    A column's arrays are those of the model's `inputs` with its name before them, `anchor_input_ids` say:

    - `"info_nce"` (temperature=0.05, symmetric=False): `anchor`, `positive`, and as hard negatives, where they are,
      `negative`, `negative_2`, ...; or `view1` and `view2`. With `anchor_ids` and `positive_ids` (`negative_ids`, ...),
      equal where texts are, equal texts are no negatives; with `labels`, nor are positives of an anchor's class.
    - `"nt_xent"` (temperature=0.5): `view1` and `view2`, or `anchor` and `positive`. With `anchor_ids` and
      `positive_ids` rows that have a text in common are one class.
    - `"supervised_contrastive"` (temperature=0.07): `labels`, and the inputs as they are, or `view1` and `view2`.
    - `"triplet"` (margin=5.0, distance="euclidean"): as `info_nce` with at least one negative.
    - `"pairwise_contrastive"` (margin=0.5), `"cosent"` (temperature=0.05), `"cosine_regression"`: `sentence1`,
      `sentence2` and `score`.

    See the functions of these names. A row that an attention mask leaves no token of does not count, and is nobody's
    negative. A temperature that the model has learned (`LearnedTemperature`) is taken instead of `temperature`.

    The negatives are those of the rows that the loss is given: over all devices of a mesh, but each micro-batch of
    `accumulate` has its own. So a large batch is had with `chunk`: the gradients are those of the whole batch, in the
    memory of a chunk.

    Args:
        kind: One of those above.
        chunk: Rows that are embedded, and rows of the table of cosines that are formed, at a time, over all devices;
            None: all at once.
        options: Of the kind.

    Returns:
        `loss(model, batch, *, key) -> (total, weight, metrics)`. The weight is the number of rows that count (of
        anchors with a positive, of triplets), and total is the mean times it. Metrics: `in_batch_accuracy` where
        something is picked, and `temperature` where there is one.

    Raises:
        MethodError: No such kind, or an option that it does not have or that is out of range.
        BatchError: When called: the batch lacks columns.

    >>> import jaxft
    >>> loss = make_contrastive_loss("cosent", temperature=0.1)
    >>> make_contrastive_loss("cosine_regression", margin=1)
    Traceback (most recent call last):
    jaxft.errors.MethodError: cosine_regression: options that cannot be
      - margin: cosine_regression has no options
    """
    if kind not in KINDS:
        raise MethodError(f"no contrastive loss {kind!r}; {nearest(str(kind), KINDS)}")
    rule, defaults = KINDS[kind]
    has = f"has {', '.join(defaults)}" if defaults else "has no options"
    wrong = [f"{name}: {kind} {has}" for name in options if name not in defaults]
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        wrong.append(f"chunk={chunk!r}: give a whole number of at least 1, or None")
    refuse(MethodError, f"{kind}: options that cannot be", wrong)
    options = {**defaults, **options}
    check_options(kind, **{name: options[name] for name in ("temperature", "margin") if name in options})

    def loss(model: Any, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None) -> Result:
        given = dict(options)
        if "temperature" in given:
            given["temperature"] = temperature_of(model, given["temperature"])
        total, weight, metrics = rule(Columns(kind, model, batch, key, chunk), **given)
        if "temperature" in given:
            metrics["temperature"] = jnp.float32(given["temperature"]), jnp.float32(1)
        return total, weight, metrics

    return loss


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a batch, which are embedded one by one, each with a dropout key of its own.

    Attributes:
        kind: Of the loss, for messages.
        model: What embeds.
        batch: The arrays.
        key: Dropout key.
        chunk: Rows at a time.
    """

    kind: str
    model: Any
    batch: Mapping[str, jax.Array]
    key: jax.Array | None
    chunk: int | None

    @cached_property
    def mesh(self) -> Any:
        """The model's mesh."""
        return mesh_of(self.model)

    def inputs(self, column: str) -> dict[str, jax.Array]:
        """Return the model's inputs in a column; `{}` where the batch does not have it."""
        names = {name: f"{column}_{name}" if column else name for name in self.model.inputs}
        return {name: self.batch[there] for name, there in names.items() if there in self.batch}

    def choose(self, *choices: tuple[str, ...]) -> tuple[str, ...]:
        """Return the first choice of columns that the batch has all of."""
        for columns in choices:
            if all(map(self.inputs, columns)):
                return columns
        said = ", or ".join(" and ".join(f"{c}_..." if c else "the model's inputs" for c in cs) for cs in choices)
        raise BatchError(
            f"{self.kind} needs {said} (of the inputs {', '.join(self.model.inputs)}); the batch has "
            f"{', '.join(self.batch)}"
        )

    def array(self, name: str) -> jax.Array:
        """Return an array that must be there."""
        if name not in self.batch:
            raise BatchError(f"{self.kind} needs {name} [B]; the batch has {', '.join(self.batch)}")
        return self.batch[name]

    def negatives(self) -> tuple[str, ...]:
        """Return the names of the columns of hard negatives that there are."""
        names = ["negative"]
        while self.inputs(names[-1]):
            names.append(f"negative_{len(names) + 1}")
        return tuple(names[:-1])

    def embed(self, *columns: str) -> tuple[jax.Array, ...]:
        """Return the embeddings `[B, D]` of each column."""

        def one(rows: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
            return self.model.pooled(**rows, key=key)

        keys = [None if self.key is None else jax.random.fold_in(self.key, i) for i in range(len(columns))]
        return tuple(
            embed_in_chunks(one, self.inputs(column), chunk=self.chunk, key=key, mesh=self.mesh)
            for column, key in zip(columns, keys, strict=True)
        )

    def real(self, *columns: str) -> jax.Array:
        """Return `[B]` bool: which rows have a token in each of the columns; where no mask is, all have."""
        rows = [self.inputs(column) for column in columns]
        real = jnp.ones(len(next(iter(rows[0].values()))), bool)
        for inputs in rows:
            if "attention_mask" in inputs:
                real = real & (inputs["attention_mask"] != 0).any(1)
        return real


def _info_nce(columns: Columns, temperature: Any, symmetric: bool) -> Result:
    anchor, positive = columns.choose(("anchor", "positive"), ("view1", "view2"))
    negatives = columns.negatives()
    real = columns.real(anchor, positive)
    queries, *documents = columns.embed(anchor, positive, *negatives)
    queries, positives = (jnp.where(real[:, None], x, 0) for x in (queries, documents[0]))
    losses, hits = picked(
        queries,
        jnp.concatenate([positives, *documents[1:]]),
        temperature,
        symmetric=symmetric,
        mask=_true_negatives(columns, real, negatives),
        chunk=columns.chunk,
        mesh=columns.mesh,
    )
    return _sums(losses, real, hits)


def _true_negatives(columns: Columns, real: jax.Array, negatives: tuple[str, ...]) -> jax.Array:
    """Return `[B, N]` bool: which documents are there, and are not a query's text, its answer, or of its class."""
    batch = columns.batch
    mask = real[:, None] & jnp.concatenate([real, *(columns.real(column) for column in negatives)])[None]
    ids = [f"{column}_ids" for column in ("positive", *negatives)]
    if "anchor_ids" in batch and ids[0] in batch:
        documents = jnp.concatenate([columns.array(name) for name in ids])
        mask = mask & different_text_mask(batch["anchor_ids"], documents)
    if "labels" in batch:
        none = jnp.full(len(real) * len(negatives), IGNORED, batch["labels"].dtype)  # a hard negative has no class
        mask = mask & different_label_mask(batch["labels"], jnp.concatenate([batch["labels"], none]))
    return mask


def _nt_xent(columns: Columns, temperature: Any) -> Result:
    views = columns.choose(("view1", "view2"), ("anchor", "positive"))
    real = columns.real(*views)
    rows, ids = jnp.arange(len(real)), [f"{view}_ids" for view in views]
    if all(name in columns.batch for name in ids):
        rows = same_text_groups(*map(columns.array, ids))
    rows = jnp.where(real, rows, IGNORED)
    return _classes(columns, views, jnp.concatenate([rows, rows]), temperature)


def _supervised(columns: Columns, temperature: Any) -> Result:
    labels = columns.array("labels")
    views = columns.choose(("",), ("view1", "view2"))
    each = [jnp.where(columns.real(view), labels, IGNORED) for view in views]
    return _classes(columns, views, jnp.concatenate(each), temperature)


def _classes(columns: Columns, views: tuple[str, ...], labels: jax.Array, temperature: Any) -> Result:
    embeddings = jnp.concatenate(columns.embed(*views))
    return _sums(*by_class(embeddings, labels, temperature, chunk=columns.chunk, mesh=columns.mesh))


def _triplet(columns: Columns, margin: float, distance: str) -> Result:
    """Each hard negative makes a triplet with its row's anchor and positive."""
    negatives = columns.negatives()
    anchor, positive, *_ = columns.choose(("anchor", "positive", "negative"))
    real = jnp.concatenate([columns.real(anchor, positive, negative) for negative in negatives])
    anchors, positives, *others = columns.embed(anchor, positive, *negatives)
    times = len(negatives)
    nearer, farther, _ = graded.distances(
        jnp.tile(anchors, (times, 1)), jnp.tile(positives, (times, 1)), jnp.concatenate(others), distance, real
    )
    return _sums(jax.nn.relu(nearer - farther + margin), real, nearer < farther)


def _scored(columns: Columns) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the embeddings of both sentences, their scores, and which rows count."""
    scores = columns.array("score")
    pair = columns.choose(("sentence1", "sentence2"))
    left, right = columns.embed(*pair)
    return left, right, scores, columns.real(*pair)


def _pairwise(columns: Columns, margin: float) -> Result:
    left, right, labels, real = _scored(columns)
    return _sums(
        graded.pairwise_contrastive(left, right, labels, margin=margin, mask=real, reduction="none"), real, None
    )


def _regression(columns: Columns) -> Result:
    left, right, scores, real = _scored(columns)
    return _sums(graded.cosine_regression(left, right, scores, mask=real, reduction="none"), real, None)


def _cosent(columns: Columns, temperature: Any) -> Result:
    """The weight counts rows that are compared with one of another score: none where all are equal."""
    left, right, scores, real = _scored(columns)
    compared = graded.ordered(scores.astype(jnp.float32), real)
    rows = (compared | compared.T).any(1).sum().astype(jnp.float32)
    return graded.cosent(left, right, scores, temperature=temperature, mask=real) * rows, rows, {}


def _sums(losses: jax.Array, counted: jax.Array, hits: jax.Array | None) -> Result:
    """Return the sum over the rows that count, their number, and how often the positive was the nearest."""
    rows = counted.sum().astype(jnp.float32)
    total = jnp.where(counted, losses, 0).sum()
    accuracy = {} if hits is None else {"in_batch_accuracy": ((hits & counted).sum().astype(jnp.float32), rows)}
    return total, rows, accuracy


KINDS: dict[str, tuple[Callable[..., Result], dict[str, Any]]] = {
    "info_nce": (_info_nce, {"temperature": 0.05, "symmetric": False}),
    "nt_xent": (_nt_xent, {"temperature": 0.5}),
    "supervised_contrastive": (_supervised, {"temperature": 0.07}),
    "triplet": (_triplet, {"margin": 5.0, "distance": "euclidean"}),
    "pairwise_contrastive": (_pairwise, {"margin": 0.5}),
    "cosent": (_cosent, {"temperature": 0.05}),
    "cosine_regression": (_regression, {}),
}
