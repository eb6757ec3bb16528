"""The loop: batches through the step, with a word at intervals."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ..errors import RunError, refuse
from .state import TrainState

OURS = ("loss", "grad_norm", "trained_tokens", "skipped", "drawn_tokens")  # metrics with a place of their own
Hook = Callable[[TrainState], None]


def fit(
    state: TrainState,
    step: Callable[..., Any],
    batches: Iterator[Mapping[str, Any]],
    *,
    steps: int,
    log_every: int = 10,
    log: Callable[[int, dict[str, float]], None] | None = None,
    hooks: Mapping[Hook, int] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train until `steps` optimiser steps are taken.

    Args:
        state: Where to begin; it is consumed.
        step: A step of `make_train_step`.
        batches: The batches from the state's step on.
        steps: Of the whole run, those of the state included.
        log_every: Steps between two calls of `log`, which comes at the last step too.
        log: Gets the step and its figures: `loss` per trained token since the last call, `grad_norm` of this step,
            `rows_per_second`, `tokens_per_second` (that are no padding, where rows have any; those that a step has
            drawn, its metric `drawn_tokens`, among them), `step_seconds`,
            `trained_tokens` (the weight of the loss) and `skipped` steps since the last call, and whatever else the
            metrics of the steps hold, as the mean over these steps.
        hooks: What to do with the state after every so many steps: `{evaluate: 100, save: 50}`; their time does
            not count.
        stop: Asked before each step: whether to leave it at the steps taken.

    Returns:
        The state at the end, or where `stop` said so.

    Raises:
        RunError: Not one step since the last call trained something and had a finite loss, gradient and result.

    >>> import itertools, jaxft, optax
    >>> state = TrainState.create(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2), optax.sgd(0.1))
    >>> rows = itertools.repeat(jaxft.testing.token_batch())
    >>> seen = []
    >>> _ = fit(state, jaxft.make_train_step(jaxft.losses.next_token_loss), rows, steps=2, log_every=2,
    ...         log=lambda step, figures: seen.append(step))
    >>> seen
    [2]
    """
    window: list[Any] = []
    tokens, rows, began = 0, 0, time.perf_counter()
    for n in range(int(state.step) + 1, steps + 1):
        if stop():
            break
        batch = next(batches)
        tokens, rows = tokens + count_tokens(batch), rows + len(next(iter(batch.values())))
        state, metrics = step(state, batch)
        window.append(metrics)
        if n % log_every == 0 or n == steps:
            figures = _figures(n, jax.device_get(window), tokens, rows, time.perf_counter() - began)
            if log is not None:
                log(n, figures)
            window, tokens, rows, began = [], 0, 0, time.perf_counter()
        for hook, every in (hooks or {}).items():
            if n % every == 0:
                jax.block_until_ready(state.trainable)  # the steps' own time ends here
                started = time.perf_counter()
                hook(state)
                began += time.perf_counter() - started
    return state


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Return how many tokens of a batch are no padding, over all its columns; 0 of images.

    >>> count_tokens({"anchor_attention_mask": np.array([[1, 1, 0]]), "positive_attention_mask": np.ones((1, 4))})
    6
    """
    masks = [x for name, x in batch.items() if name.endswith("attention_mask")]
    return int(sum(map(np.sum, masks))) if masks else batch["input_ids"].size if "input_ids" in batch else 0


def _figures(n: int, window: list[Any], tokens: int, rows: int, seconds: float) -> dict[str, float]:
    """Return the figures of some steps: sums over tokens divided once, never a mean of means."""
    good = [m for m in window if not m["skipped"]]
    if not good:
        refuse(RunError, f"steps {n - len(window) + 1} to {n}: none of them could be taken", _why(window))
    weight = float(sum(m["trained_tokens"] for m in good))
    tokens += int(sum(m.get("drawn_tokens", 0) for m in window))
    loss = float(sum(np.float64(m["loss"]) * m["trained_tokens"] for m in good)) / weight
    others = {name: [float(m[name]) for m in good] for name in good[-1] if name not in OURS}
    return {
        **{name: sum(values) / len(values) for name, values in others.items()},
        "loss": loss,
        "grad_norm": float(good[-1]["grad_norm"]),
        **({"tokens_per_second": tokens / max(seconds, 1e-9)} if tokens else {}),
        "rows_per_second": rows / max(seconds, 1e-9),
        "step_seconds": seconds / len(window),
        "trained_tokens": weight,
        "skipped": float(len(window) - len(good)),
    }


def _why(skipped: list[Any]) -> Iterator[str]:
    """Say why steps were not taken, and what to do."""
    empty = sum(m["trained_tokens"] == 0 for m in skipped)
    if empty:
        yield (
            f"in {empty} no row of the batch had a positive, or a token or label that is trained (trained_tokens 0): "
            "raise train.batch_size, or look at the rows"
        )
    if empty < len(skipped):
        yield (
            f"in {len(skipped) - empty} loss, gradient or new parameters were not finite: lower "
            "optimizer.learning_rate, set optimizer.clip_norm, or look at the rows"
        )
