"""The loop's figures, evaluation and checkpoints."""

import jax
import numpy as np
import optax
import pytest

import jaxft
from jaxft.data import Dataset, collate
from jaxft.data.tokens import example
from jaxft.errors import CheckpointError, DataError, RunError
from jaxft.losses import next_token_loss
from jaxft.methods.partition import leaves
from jaxft.train.checkpoint import Checkpoints
from jaxft.train.evaluate import evaluate_loss, write_answers
from jaxft.train.loop import fit

ROWS = [example([i + 1, *[7] * (i + 2)], [False, *[True] * (i + 2)]) for i in range(6)]


def make_state(rate=0.1, **options):
    return jaxft.TrainState.create(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2, **options), optax.adam(rate), seed=3)


def batches(start=0):
    n = start
    while True:
        yield collate([ROWS[n % 6], ROWS[(n + 1) % 6]])
        n += 1


def run(state, steps, start=0, **options):
    return fit(state, jaxft.make_train_step(next_token_loss), batches(start), steps=steps, **options)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_loss_between_two_words_is_over_tokens_not_steps():
    """Rows of one step are longer than those of the other: a mean of means would be another number."""
    state, step = make_state(rate=0.0), jaxft.make_train_step(next_token_loss)
    sums = []
    for batch in (collate(ROWS[:2]), collate(ROWS[1:3])):
        state, metrics = step(state, batch)
        sums.append((float(metrics["loss"]) * int(metrics["trained_tokens"]), int(metrics["trained_tokens"])))
    expected = sum(a for a, _ in sums) / sum(b for _, b in sums)
    said = []
    run(make_state(rate=0.0), 2, log_every=2, log=lambda n, figures: said.append((n, figures)))
    ((n, figures),) = said
    assert n == 2
    assert figures["loss"] == pytest.approx(expected, rel=1e-6)
    assert abs(expected - sum(a / b for a, b in sums) / 2) > 1e-4
    assert figures["trained_tokens"] == sum(b for _, b in sums)


def test_hooks_come_when_they_should():
    calls = []
    run(
        make_state(),
        7,
        log_every=3,
        log=lambda n, _: calls.append(("log", n)),
        hooks={lambda state: calls.append(("look", int(state.step))): 2},
    )
    assert calls == [("look", 2), ("log", 3), ("look", 4), ("log", 6), ("look", 6), ("log", 7)]


def test_a_run_that_never_gets_anything_finite_stops():
    state = make_state()
    poisoned = jax.tree.map(lambda x: x * np.nan, state.trainable)
    state = jaxft.TrainState(**{**{f: getattr(state, f) for f in state.__dataclass_fields__}, "trainable": poisoned})
    with pytest.raises(RunError, match="steps 1 to 3: none .*\n  - in 3 loss, gradient .* not finite: lower") as told:
        run(state, 9, log_every=3)
    assert "trained_tokens 0" not in str(told.value)


def test_steps_that_train_nothing_are_not_those_that_are_not_finite():
    def pulled(model, batch, *, key=None):
        total, weight, metrics = next_token_loss(model, batch, key=key)
        return total, weight * 0, metrics

    step = jaxft.make_train_step(pulled)
    with pytest.raises(RunError, match="steps 1 to 2: none .*\n  - in 2 no row .* raise train.batch_size") as told:
        fit(make_state(), step, batches(), steps=4, log_every=2)
    assert "not finite" not in str(told.value)


def test_evaluation_is_over_tokens_whatever_the_batch():
    model = jaxft.testing.tiny_llama()
    sums = np.array([next_token_loss(model, collate([row]))[:2] for row in ROWS])
    expected = sums[:, 0].sum() / sums[:, 1].sum()
    data = [Dataset(ROWS[:4], "a"), Dataset(ROWS[4:], "b")]
    for size in (1, 4):
        figures = evaluate_loss(model, next_token_loss, data, batch_size=size)
        assert list(figures) == ["loss/a", "loss/b", "loss"]
        assert figures["loss"] == pytest.approx(expected, rel=1e-6)
        assert figures["loss/b"] == pytest.approx(sums[4:, 0].sum() / sums[4:, 1].sum(), rel=1e-6)
    with pytest.raises(DataError, match="nothing of it is trained"):
        evaluate_loss(model, next_token_loss, [Dataset([example([1, 2], [True, False])])])
    with pytest.raises(DataError, match="'data' stands twice"):
        evaluate_loss(model, next_token_loss, [Dataset([example([1, 2], [True, True])])] * 2)


def test_answers_come_in_the_order_of_the_rows():
    model, toy = jaxft.testing.tiny_llama(), jaxft.testing.ToyTokenizer()
    rows = [example([*range(1, n + 1), 0], [False] * n + [True], prompt=n) for n in (5, 2, 9, 3, 4)]
    alone = [write_answers(model, toy, [row], max_new_tokens=4, batch_size=1)[0] for row in rows]
    assert write_answers(model, toy, rows, max_new_tokens=4, batch_size=2) == alone
    assert len(set(alone)) > 1


def test_going_on_from_a_checkpoint_is_the_unbroken_run(tmp_path):
    whole = run(make_state(dropout=0.1), 6)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        run(make_state(dropout=0.1), 4, hooks={checkpoints.save: 2})
        assert checkpoints.latest == 4
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state = checkpoints.restore(make_state(dropout=0.1))
        assert int(state.step) == 4
        state = run(state, 6, start=4)
    assert same(leaves(state.trainable), leaves(whole.trainable))
    assert same(state.opt_state, whole.opt_state)


def test_only_what_is_trained_is_on_the_disk(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(state)
    size = sum(f.stat().st_size for f in (tmp_path / "c").rglob("*") if f.is_file())
    trained = sum(x.nbytes for x in jax.tree.leaves(state.trainable))
    base = sum(x.nbytes for x in jax.tree.leaves(state.frozen))
    assert 3 * trained < size < 3 * trained + 40_000 < base
    names = "".join(f.read_text(errors="ignore") for f in (tmp_path / "c").rglob("_METADATA"))
    assert "q_proj.delta.default.a" in names
    assert "embed_tokens" not in names


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(make_state())
        other = jaxft.TrainState.create(jaxft.testing.tiny_llama(), jaxft.LoRA(r=3), optax.adam(0.1))
        with pytest.raises(CheckpointError, match=r"q_proj.delta.default.a is \(2, 32, 2\) there, \(2, 32, 3\) here"):
            checkpoints.restore(other)
    with Checkpoints(tmp_path / "empty") as checkpoints, pytest.raises(CheckpointError, match="no checkpoint in it"):
        checkpoints.restore(other)
