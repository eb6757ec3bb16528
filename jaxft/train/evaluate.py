"""Figures of a model on held-out rows: its loss, and the answers it writes."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax

from ..data.batches import Batch, collate, eval_batches
from ..data.source import Dataset
from ..data.tokens import Example
from ..errors import DataError, refuse
from ..generation.generate import generate_ids, stops_of


def evaluate_loss(
    model: Any,
    loss: Callable[..., Any],
    datasets: Sequence[Dataset],
    *,
    batch_size: int = 8,
    collate: Callable[..., Batch] = collate,
    by_length: bool = True,
) -> dict[str, float]:
    """Return the loss per trained token over every row, dropout off, and the loss's further metrics likewise.

    Each is summed over all rows, and divided once.

    Args:
        model: The model.
        loss: A model loss.
        datasets: The sources.
        batch_size: Rows at a time; it changes nothing but speed, and which rows are negatives of each other.
        collate: Makes a batch of rows.
        by_length: Whether rows of like length come together; False: in their order, where that matters to the loss.

    Returns:
        `loss` and the metrics by name, and of each source, where there are several, `loss/NAME` and so on; without
        those that nothing was counted for.

    Raises:
        DataError: A source of which no token is trained, or two of one name.

    >>> import jaxft
    >>> from jaxft.data.tokens import example
    >>> rows = Dataset([example([1, 2, 3], [False, True, True])])
    >>> sorted(evaluate_loss(jaxft.testing.tiny_llama(), jaxft.losses.next_token_figures, [rows]))
    ['loss', 'token_accuracy']
    """
    names = [data.name for data in datasets]
    refuse(
        DataError, "sources of one name", [f"{n!r} stands twice" for n in dict.fromkeys(names) if names.count(n) > 1]
    )
    each = {data.name: _sums(model, loss, data, batch_size, collate, by_length) for data in datasets}
    whole = jax.tree.map(lambda *sums: sum(sums), *each.values())
    pairs = {f"{figure}/{name}": pair for name, sums in each.items() for figure, pair in sums.items()}
    pairs = {**(pairs if len(datasets) > 1 else {}), **whole}
    return {figure: total / weight for figure, (total, weight) in pairs.items() if weight}


def _sums(
    model: Any, loss: Callable[..., Any], data: Dataset, batch_size: int, collate: Callable[..., Batch], by_length: bool
) -> dict[str, tuple[float, float]]:
    """Return the pair (sum, weight) of each figure over the rows of one source."""
    sums: Any = None
    for batch in eval_batches(data.examples, batch_size, collate, by_length=by_length):
        more = jax.tree.map(float, _compiled(loss)(model, batch))
        sums = more if sums is None else jax.tree.map(float.__add__, sums, more)
    if sums is None or not sums["loss"][1]:
        raise DataError(f"{data.name}: nothing of it is trained, so there is no loss to measure")
    return dict(sums)


@lru_cache
def _compiled(loss: Callable[..., Any]) -> Callable[..., Any]:
    def figures(model: Any, batch: Any) -> dict[str, Any]:
        total, weight, metrics = loss(model, batch, key=None)
        return {"loss": (total, weight), **metrics}

    return jax.jit(figures)


def write_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, max_new_tokens: int = 64, batch_size: int = 32
) -> list[str]:
    """Let a model answer the prompts of examples, greedily.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Examples that have a prompt.
        max_new_tokens: Of an answer at most.
        batch_size: Prompts at a time; it changes nothing but speed.

    Returns:
        The answers, in the order of the examples.

    >>> import jaxft
    >>> from jaxft.data.formats import prompt_and_completion
    >>> row = prompt_and_completion(jaxft.testing.ToyTokenizer(), "ab", "c")
    >>> len(write_answers(jaxft.testing.tiny_llama(), jaxft.testing.ToyTokenizer(), [row], max_new_tokens=1))
    1
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].prompt)
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        filled = [*picked, *picked[-1:] * (batch_size - len(picked))]  # one shape: the last batch is filled up
        prompts = [examples[i].input_ids[: examples[i].prompt].tolist() for i in filled]
        new = generate_ids(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stops_of(model, tokenizer))
        answers |= {i: tokenizer.decode(ids, skip_special_tokens=True) for i, ids in zip(picked, new, strict=False)}
    return [answers[i] for i in range(len(examples))]


def prefixed(figures: Mapping[str, float], prefix: str = "eval_") -> dict[str, float]:
    """Return figures under the names that they have in a run's files.

    >>> prefixed({"loss": 1.0})
    {'eval_loss': 1.0}
    """
    return {prefix + name: value for name, value in figures.items()}
