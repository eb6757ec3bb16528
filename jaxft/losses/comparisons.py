"""Model losses over answers that were compared: of a scalar score, and of log-probabilities beside a reference's.

In a batch each answer is a column: `chosen_input_ids`, `rejected_input_ids`, ...; of ranked lists, best first,
`answer_1_input_ids`, `answer_2_input_ids`, ... All of a row's answers go through one forward pass. Shapes: B rows, K
answers of a row, T positions.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import BatchError
from .entropy import IGNORED
from .language import predicted
from .log_probs import token_log_probs
from .preference import dpo_loss, ranking_loss, reward_loss

Batch = Mapping[str, jax.Array]
PAIR = ("chosen", "rejected")


def make_reward_loss(*, margin: float = 0.0, centering: float = 0.0) -> Any:
    """Make the model loss of a reward model: `reward_loss` of pairs, `ranking_loss` of ranked lists.

    Args:
        margin: Of rows with two answers; a batch may hold others, `margin` `[B]` float, NaN where this one counts.
        centering: As of these losses.

    Returns:
        A loss `loss(model, batch, *, key)` for `jaxft.make_train_step`. The model has a head of one output
        (`jaxft.load(..., labels=("score",))`), and the batch `chosen_input_ids` and `rejected_input_ids` `[B, T]`, or
        `answer_1_input_ids` and so on, each with its `attention_mask`; an answer without a real token is not there, and
        a row with fewer than two counts nothing. The weight is the number of rows. Further metrics, over all pairs of a
        better and a worse answer: `accuracy` (at equal scores a half), `margin` (of the scores), `chosen_score` and
        `rejected_score`.

    >>> import jaxft, optax
    >>> from jaxft.models.sharing import with_head
    >>> model = with_head(jaxft.testing.tiny_llama(), ("score",))
    >>> state = jaxft.TrainState.create(model, jaxft.LoRA(r=2), optax.sgd(1e-3))
    >>> batch = {"chosen_input_ids": jnp.array([[5, 6, 7]]), "rejected_input_ids": jnp.array([[5, 6, 8]])}
    >>> state, metrics = jaxft.make_train_step(make_reward_loss())(state, batch)
    >>> sorted(metrics)[:3]
    ['accuracy', 'chosen_score', 'grad_norm']
    """

    def loss(model: Any, batch: Batch, *, key: jax.Array | None = None) -> Any:
        scores, there = answer_scores(model, batch, key=key)
        own = batch.get("margin", jnp.full(len(scores), jnp.nan))
        return *score_loss(scores, there, own, margin=margin, centering=centering), pair_figures(scores, there)

    return loss


def score_loss(
    scores: jax.Array, there: jax.Array, own: jax.Array, *, margin: float = 0.0, centering: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of scores summed over rows, and the number of rows that have two answers at least.

    Args:
        scores: `[B, K]`.
        there: `[B, K]` bool, where there is an answer.
        own: `[B]`, the margin of each row of two, NaN where `margin` counts; of longer lists none does.
        margin: As of `make_reward_loss`.
        centering: Likewise.
    """
    pair = there[:, :2].all(1) & (there.sum(1) == 2)
    wanted = jnp.where(jnp.isnan(own), margin, own)
    options: dict[str, Any] = {"centering": centering, "reduction": "none"}
    losses = reward_loss(scores[:, 0], scores[:, 1], margin=wanted, mask=pair, **options)
    if scores.shape[1] > 2:
        losses += ranking_loss(scores, there & ~pair[:, None], **options)
    return losses.sum(), (there.sum(1) > 1).sum().astype(jnp.float32)


def answer_scores(model: Any, batch: Batch, *, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Return the score of each answer `[B, K]` float32, 0 where there is none, and where there is one, bool.

    Args:
        model: A model with a head of one output.
        batch: As of `make_reward_loss`.
        key: Dropout key; None: no dropout.

    Raises:
        BatchError: No answers in the batch, or a model without such a head.
    """
    columns, inputs = together(batch, getattr(model, "inputs", ()))
    scores = model(**inputs, key=key)
    if scores.ndim != 2 or scores.shape[1] != 1:
        raise BatchError(
            f"a {type(model).__name__} gives {list(scores.shape)} where one score for each row is expected: load it "
            'with labels=("score",)'
        )
    mask = inputs.get("attention_mask")
    there = jnp.ones(len(scores), bool) if mask is None else (mask != 0).any(1)
    scores = jnp.where(there, scores[:, 0].astype(jnp.float32), 0)
    return scores.reshape(-1, len(columns)), there.reshape(-1, len(columns))


def pair_figures(scores: jax.Array, there: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return what is measured over all pairs of a better and a worse answer, each a (sum, number of pairs).

    >>> figures = pair_figures(jnp.array([[3.0, 1.0, 2.0]]), jnp.ones((1, 3), bool))
    >>> [float(x) for x in figures["accuracy"]], [float(x) for x in figures["margin"]]
    ([2.0, 3.0], [2.0, 3.0])
    """
    count = scores.shape[1]
    pairs = jnp.triu(jnp.ones((count, count), bool), 1)[None] & there[:, :, None] & there[:, None]
    better, worse = scores[:, :, None], scores[:, None]
    shown = {
        "accuracy": jnp.where(better == worse, 0.5, better > worse),
        "margin": better - worse,
        "chosen_score": jnp.broadcast_to(better, pairs.shape),
        "rejected_score": jnp.broadcast_to(worse, pairs.shape),
    }
    number = pairs.sum().astype(jnp.float32)
    return {name: (jnp.where(pairs, x, 0).sum(), number) for name, x in shown.items()}


def make_dpo_loss(*, beta: float = 0.1, kind: str = "sigmoid", label_smoothing: float = 0.0) -> Any:
    """Make the model loss of direct preference optimisation: `dpo_loss` of the answers' log-probabilities.

    They are summed over the tokens of an answer; for `kind="ipo"` they are means over these, as in trl, whose authors
    have it from those of IPO: the paper's equation 17 is silent on it, and a sum would make the squared loss grow with
    the length.

    Args:
        beta: As of `dpo_loss`.
        kind: Likewise.
        label_smoothing: Likewise.

    Returns:
        A loss `loss(model, batch, *, key)` for `jaxft.make_train_step`. The batch has for `chosen` and `rejected` an
        `input_ids`, `labels` (-100 on the prompt and at padding) and `attention_mask`, `[B, T]`, and what
        `reference_log_probs` returns. A row without a trained token in both answers counts nothing. The weight is the
        number of rows. Further metrics: `chosen_reward` and `rejected_reward` (beta times the log ratio to the
        reference), their difference `margin`, `accuracy` (how often it is above 0; at 0 a half), and `log_ratio`, how
        far the policy has moved from the reference on these answers, in nats per token.

    Raises:
        MethodError: An option that `dpo_loss` refuses.

    >>> import jaxft
    >>> model, ids = jaxft.testing.tiny_llama(), jnp.array([[5, 6, 7]])
    >>> batch = {f"{name}_{kind}": ids + n for n, name in enumerate(PAIR) for kind in ("input_ids", "labels")}
    >>> total, rows, _ = make_dpo_loss()(model, {**batch, **reference_log_probs(model, batch)}, key=None)
    >>> f"{total:.4f}"  # the policy is the reference: log 2
    '0.6931'
    """
    options: dict[str, Any] = {"beta": beta, "kind": kind, "label_smoothing": label_smoothing, "reduction": "none"}
    jax.eval_shape(lambda x: dpo_loss(x, x, x, x, **options), jax.ShapeDtypeStruct((1,), jnp.float32))  # it refuses

    def loss(model: Any, batch: Batch, *, key: jax.Array | None = None) -> Any:
        if any(f"{name}_reference" not in batch for name in PAIR):
            raise BatchError(
                "make_dpo_loss: the batch lacks chosen_reference and rejected_reference [B]: add what "
                "reference_log_probs(model, batch) returns of the model that training begins with"
            )
        sums, tokens = answer_log_probs(model, batch, key=key)
        there = (tokens > 0).all(1)
        reference = jnp.stack([batch[f"{name}_reference"] for name in PAIR], 1)
        ratio = jnp.where(there[:, None], sums - reference, 0)
        policy, reference = (x / jnp.maximum(tokens, 1) if kind == "ipo" else x for x in (sums, reference))
        given = (policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])
        losses = dpo_loss(*given, **options, mask=there)
        rows = there.sum().astype(jnp.float32)
        counted = jnp.where(there[:, None], tokens, 0).sum().astype(jnp.float32)
        figures = pair_figures(beta * ratio, jnp.stack([there, there], 1))
        figures = {name.replace("score", "reward"): pair for name, pair in figures.items()}
        return losses.sum(), rows, {**figures, "log_ratio": (ratio.sum(), counted)}

    return loss


def answer_log_probs(model: Any, batch: Batch, *, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of each answer, summed over its tokens, `[B, 2]` float32, and their number.

    Args:
        model: A causal language model.
        batch: As of `make_dpo_loss`; what stands at padding changes nothing.
        key: Dropout key; None: no dropout.
    """
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    columns, flat = together(batch, names)
    if "labels" not in flat:
        raise BatchError("the batch lacks chosen_labels and rejected_labels [B, T]: -100 on the prompt and at padding")
    trained = (flat["labels"][:, 1:] != IGNORED) & predicted(flat)
    found = jnp.where(trained, token_log_probs(model, flat, key=key), 0).sum(1)
    return found.reshape(-1, len(columns)), trained.sum(1).reshape(-1, len(columns))


@jax.jit
def reference_log_probs(model: Any, batch: Batch) -> dict[str, jax.Array]:
    """Return what a reference says of a batch's answers: `chosen_reference` and `rejected_reference` `[B]` float32.

    Args:
        model: The model that training begins with. A step consumes its state's trained arrays, so it is made before:
            `reference = jaxft.TrainState.create(...).model`, of a state of its own.
        batch: As of `make_dpo_loss`.

    >>> import jaxft
    >>> model, ids = jaxft.testing.tiny_llama(), jnp.array([[5, 6, 7]])
    >>> batch = {f"{name}_{kind}": ids for name in PAIR for kind in ("input_ids", "labels")}
    >>> sorted(reference_log_probs(model, batch))
    ['chosen_reference', 'rejected_reference']
    """
    sums, _ = answer_log_probs(model, batch)
    return {f"{name}_reference": sums[:, i] for i, name in enumerate(PAIR)}


def together(batch: Batch, kinds: Any) -> tuple[tuple[str, ...], dict[str, jax.Array]]:
    """Return the names of a batch's answers, and their arrays as one batch `[B * K, T]`.

    The answers of a row follow each other, so that on a mesh each device keeps its rows.

    Raises:
        BatchError: There are no two answers, or they differ in shape.
    """
    number = sum(name.startswith("answer_") and name.endswith("_input_ids") for name in batch)
    columns = tuple(f"answer_{i + 1}" for i in range(number)) if number else PAIR
    lacks = [f"{column}_input_ids" for column in columns if f"{column}_input_ids" not in batch]
    if lacks or len(columns) < 2:
        raise BatchError(
            f"a batch of compared answers has chosen_input_ids and rejected_input_ids [B, T], or answer_1_input_ids, "
            f"answer_2_input_ids and so on; this one has {', '.join(batch)}"
        )
    shapes = {name: batch[name].shape for name in (f"{column}_input_ids" for column in columns)}
    if len(set(shapes.values())) > 1:
        said = ", ".join(f"{name} is {list(shape)}" for name, shape in shapes.items())
        raise BatchError(f"the answers of a batch are padded to one width, but {said}")
    found = {}
    for kind in kinds:
        arrays = [batch[f"{column}_{kind}"] for column in columns if f"{column}_{kind}" in batch]
        if len(arrays) == len(columns):
            found[kind] = jnp.stack(arrays, 1).reshape(-1, arrays[0].shape[-1])
    return columns, found
