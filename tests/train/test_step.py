"""The step: one division, exact accumulation, what is kept where something is not finite, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.losses import next_token_loss
from jaxft.testing import tiny_gpt2, tiny_llama, token_batch
from jaxft.train.batch import check_batch

BATCH = token_batch()
SGD = optax.sgd(0.5)


def state_of(method=None, tx=SGD, model=None, **options):
    return jaxft.TrainState.create(model or tiny_llama(), method or jaxft.LoRA(r=2), tx, **options)


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def kept(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


@pytest.fixture(scope="module")
def step():
    return jaxft.make_train_step(next_token_loss)


def test_it_learns(step):
    state = state_of(jaxft.Full(), tx=optax.adamw(1e-2))
    losses = []
    for _ in range(30):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    assert int(state.step) == 30


def test_the_loss_is_divided_by_the_trained_tokens(step):
    total, weight, _ = next_token_loss(tiny_llama(), BATCH)
    _, metrics = step(state_of(), BATCH)
    np.testing.assert_allclose(metrics["loss"], total / weight, rtol=1e-6)
    assert metrics["trained_tokens"] == weight == (BATCH["labels"][:, 1:] != -100).sum() - 1  # one follows padding


def test_the_reported_norm_is_over_trained_leaves(step):
    state = state_of()
    before = kept(jaxft.leaves(state.trainable))
    state, metrics = step(state, BATCH)
    moved = [(before[p] - v) / 0.5 for p, v in jaxft.leaves(state.trainable).items()]
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum((m**2).sum() for m in moved)), rtol=1e-4)


def uneven():
    """Three micro-batches of two rows with 3, 20 and 0 trained tokens."""
    ids = np.random.default_rng(1).integers(1, 64, (6, 13))
    labels = np.full_like(ids, -100)
    labels[0, 5:8] = ids[0, 5:8]
    labels[2, 2:13], labels[3, 4:13] = ids[2, 2:13], ids[3, 4:13]
    counts = (labels.reshape(3, 2, 13)[..., 1:] != -100).sum((1, 2))
    assert counts.tolist() == [3, 20, 0]
    return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(labels)}


@pytest.mark.parametrize("method", [jaxft.LoRA(r=2, target_modules="all-linear"), jaxft.Full()], ids=["lora", "full"])
def test_accumulation_is_the_big_batch(step, method):
    whole, told = step(state_of(method), uneven())
    parts, also = jaxft.make_train_step(next_token_loss, accumulate=3)(state_of(method), uneven())
    for key in ("loss", "grad_norm", "trained_tokens"):
        np.testing.assert_allclose(told[key], also[key], rtol=1e-5)
    assert told["trained_tokens"] == 23
    for path, value in jaxft.leaves(whole.trainable).items():
        np.testing.assert_allclose(jaxft.leaves(parts.trainable)[path], value, atol=1e-6, err_msg=path)


def test_further_metrics_are_divided_by_their_own_weights():
    def loss(model, batch, *, key):
        total, weight, _ = next_token_loss(model, batch, key=key)
        first = jnp.float32(batch["input_ids"][:, 0].sum())
        return total, weight, {"first": (first, jnp.float32(len(batch["input_ids"])))}

    for accumulate in (1, 3):
        _, metrics = jaxft.make_train_step(loss, accumulate=accumulate)(state_of(), BATCH)
        np.testing.assert_allclose(metrics["first"], BATCH["input_ids"][:, 0].mean(), rtol=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradient", "update"])
def test_what_is_not_finite_changes_nothing(where):
    def poisoned(model, batch, *, key):
        total, weight, _ = next_token_loss(model, batch, key=key)
        w = model.model.layers.self_attn.q_proj.delta["default"].a.get_value()
        if where == "loss":
            total = total + jnp.where(batch["poison"].any(), jnp.nan, 0.0)
        if where == "gradient":  # sqrt at 0: the value is finite, its gradient is not
            total = total + jax.lax.cond(batch["poison"].any(), lambda w: jnp.sqrt(w - w).sum(), lambda w: 0.0, w)
        return total, weight, {}

    tx = optax.adam(1e-2)
    if where == "update":
        tx = optax.chain(tx, optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * 1e38 * 1e38, updates)))
    step, state = jaxft.make_train_step(poisoned), state_of(tx=tx)
    if where != "update":
        state, metrics = step(state, {**BATCH, "poison": jnp.zeros(3)})
        assert metrics["skipped"] == 0
    before = kept((state.trainable, state.opt_state))
    after, metrics = step(state, {**BATCH, "poison": jnp.ones(3)})
    assert metrics["skipped"] == 1
    assert same(before, (after.trainable, after.opt_state))
    assert int(after.step) == (2 if where != "update" else 1)
    if where != "update":
        again, metrics = step(after, {**BATCH, "poison": jnp.zeros(3)})
        assert metrics["skipped"] == 0 and not same(before[0], again.trainable)


def test_nothing_trained_on_an_accelerator_is_skipped(step, monkeypatch):
    """Where looking at the labels would wait for the device, the step itself keeps the state."""
    monkeypatch.setattr(jaxft.train.batch, "_on_host", lambda x: False)
    state = state_of(tx=optax.adam(1e-2))
    before = kept((state.trainable, state.opt_state))
    after, metrics = step(state, {**BATCH, "labels": jnp.full((3, 12), -100)})
    assert metrics["skipped"] == 1 and metrics["loss"] == 0 and metrics["trained_tokens"] == 0
    assert same(before, (after.trainable, after.opt_state))


def test_compiled_once_for_what_is_only_a_value():
    """A switch of adapters, another learning rate, another seed, another base of the same shape."""
    step = jaxft.make_train_step(next_token_loss)
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
    model = jaxft.attach(tiny_llama(), jaxft.LoRA(r=2), name="other")
    state = state_of(tx=tx, model=model)
    for i in range(3):
        state, _ = step(state, BATCH)
        state.opt_state.hyperparams["learning_rate"] = jnp.float32(10.0**-i)
        state = jaxft.set_adapter(state, {"default": 1, "other": i / 2})
    base = jaxft.attach(tiny_llama(seed=3), jaxft.LoRA(r=2), name="other", seed=5)
    state, _ = step(state_of(tx=tx, model=base, seed=7), token_batch(seed=2))
    assert step.program(state)._cache_size() == 1
    assert int(state.step) == 1


def test_the_learning_rate_that_is_a_value_is_used(step):
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    state = state_of(tx=tx)
    state.opt_state.hyperparams["learning_rate"] = jnp.float32(0.0)
    before = kept(state.trainable)
    state, _ = step(state, BATCH)
    assert same(before, state.trainable)


def test_all_randomness_is_the_root_folded_with_the_step(step):
    model = tiny_gpt2(resid_pdrop=0.3)

    def run(seed, first=0):
        state = state_of(jaxft.LoRA(r=2, dropout=0.3), model=model, seed=0)
        state = state.replace(key=jax.random.key(seed), step=jnp.int32(first))
        return [
            float(
                step(
                    state_of(jaxft.LoRA(r=2, dropout=0.3), model=model).replace(key=state.key, step=jnp.int32(n)), BATCH
                )[1]["loss"]
            )
            for n in range(first, first + 3)
        ]

    assert run(0) == run(0)
    assert run(0)[1:] == run(0, 1)[:2]
    assert len(set(run(0) + run(1))) == 6


def test_micro_batches_drop_out_differently():
    seen = []

    def loss(model, batch, *, key):
        total, weight, _ = next_token_loss(model, batch, key=None)
        draw = jax.random.uniform(key)
        return total, weight, {"draw": (draw, jnp.float32(1)), "square": (draw**2, jnp.float32(1))}

    _, metrics = jaxft.make_train_step(loss, accumulate=3)(state_of(), BATCH)
    seen = float(metrics["square"]) - float(metrics["draw"]) ** 2
    assert seen > 1e-4  # the draws of the three micro-batches differ


def test_the_state_is_consumed_and_the_base_is_not(step):
    model = tiny_llama()
    for method in (jaxft.Full(), jaxft.LoRA(r=2)):
        old = state_of(method, model=model)
        step(old, BATCH)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.trainable))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((old.frozen, model)))


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=jaxft.decay_mask),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9)),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "lookahead": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "noisy": lambda: optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(0)), optax.sgd(0.1)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimiser_of_optax(step, make):
    state = state_of(tx=make())
    for _ in range(3):
        state, metrics = step(state, BATCH)
        assert metrics["skipped"] == 0
    assert jnp.isfinite(metrics["loss"])


def test_clipping_sees_trained_leaves_only(step):
    clipped = state_of(tx=optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)))
    before = kept(jaxft.leaves(clipped.trainable))
    after, metrics = step(clipped, BATCH)
    moved = np.sqrt(sum(((before[p] - v) ** 2).sum() for p, v in jaxft.leaves(after.trainable).items()))
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-2)
    assert metrics["grad_norm"] > 1e-2


def test_decay_by_kind_of_leaf(step):
    """Biases and norm scales stay, though a stacked bias has two dimensions; kernels and tables decay."""
    tx = optax.chain(optax.add_decayed_weights(0.1, mask=jaxft.decay_mask), optax.scale(-1.0))
    zero = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])
    model = jax.tree.map(lambda x: x + 1, tiny_gpt2())
    for path, update in zero(jaxft.leaves(jaxft.partition(model, jaxft.Full())[0])).items():
        assert bool(update.any()) is path.endswith(("kernel", "embedding")), path


BAD = {
    "not a dict": ([1], "a batch is a dict of arrays, this is list"),
    "empty": ({}, "a batch is a dict of arrays"),
    "rows": ({**BATCH, "labels": BATCH["labels"][:2]}, "the first axis is the rows"),
    "tokens": (
        {**BATCH, "labels": BATCH["labels"][:, :5]},
        r"must have one shape, but input_ids is \(3, 12\), labels is \(3, 5\)",
    ),
    "mask": ({**BATCH, "attention_mask": np.ones((3, 11))}, r"attention_mask is \(3, 11\)"),
    "scalar": ({**BATCH, "temperature": np.float32(1)}, "the first axis is the rows"),
    "flat": ({k: v[:, 0] for k, v in BATCH.items()}, r"input_ids is \(3,\); it must be \[rows, tokens\]"),
    "floats": ({**BATCH, "input_ids": np.ones((3, 12))}, "input_ids is float64; token ids are integers"),
    "outside": ({**BATCH, "input_ids": BATCH["input_ids"] + 60}, "the model's tokens are 0 to 63"),
    "labels outside": ({**BATCH, "labels": np.full((3, 12), -1)}, "labels holds -1 to -1"),
    "lists": ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "input_ids is a list; give a numpy or jax array"),
    "strings": ({**BATCH, "text": np.array(["a", "b", "c"])}, "text is a ndarray"),
    "no labels": ({"input_ids": BATCH["input_ids"]}, "the batch lacks labels"),
    "untrained": ({**BATCH, "labels": np.full((3, 12), -100)}, "every label is -100"),
    "a class": (
        {"input_ids": BATCH["input_ids"], "labels": np.array([0, -1, 2])},
        "labels hold -1; classes count from 0",
    ),
    "no class": (
        {"input_ids": BATCH["input_ids"], "labels": np.full(3, -100)},
        "every label is -100: no row is trained",
    ),
    "no number": ({"input_ids": BATCH["input_ids"], "labels": np.full(3, np.nan)}, "every label is NaN"),
    "infinite": ({"input_ids": BATCH["input_ids"], "labels": np.array([1, np.inf, 0])}, "labels hold 1 infinite"),
    "column": (
        {"anchor_input_ids": BATCH["input_ids"], "anchor_attention_mask": np.ones((3, 5), int)},
        r"one shape in a column, but anchor_input_ids is \(3, 12\), anchor_attention_mask is \(3, 5\)",
    ),
    "outside of a column": (
        {"anchor_input_ids": BATCH["input_ids"], "positive_input_ids": np.full((3, 7), 64)},
        "positive_input_ids holds 64 to 64; the model's tokens are 0 to 63",
    ),
    "image": ({"view1_pixel_values": np.ones((3, 8, 8))}, r"it must be \[rows, channels, height, width\]"),
    "first only": (
        {**BATCH, "labels": np.where(np.arange(12) == 0, 5, -100) * np.ones((3, 1), int)},
        "every label is -100",
    ),
}


@pytest.mark.parametrize(("batch", "match"), BAD.values(), ids=BAD)
def test_bad_batches(step, batch, match):
    state = state_of()
    with pytest.raises(jaxft.BatchError, match=match):
        step(state, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))


def test_rows_that_do_not_divide():
    with pytest.raises(jaxft.BatchError, match="3 rows do not divide into accumulate=2"):
        jaxft.make_train_step(next_token_loss, accumulate=2)(state_of(), BATCH)
    for accumulate in (0, -1, 1.5):
        with pytest.raises(jaxft.BatchError, match="accumulate="):
            jaxft.make_train_step(next_token_loss, accumulate=accumulate)


@pytest.mark.parametrize("tx", [None, 1e-3, optax.adamw, "adamw"])
def test_an_optimiser_that_is_none(tx):
    with pytest.raises(jaxft.OptimizerError, match="is no optimiser: give an optax.GradientTransformation"):
        jaxft.TrainState.create(tiny_llama(), jaxft.LoRA(), tx)


@pytest.mark.parametrize("labels", [np.array([0, 4, -100]), np.array([0.5, np.nan, -3.0]), None])
def test_batches_of_whole_rows_and_of_columns(labels):
    """Labels of rows, columns of other lengths, images, scores, group ids; junk where a column's own mask is zero."""
    ids, mask = np.full((3, 7), 5), np.ones((3, 7), int)
    ids[1, 4:], mask[1, 4:] = 10**6, 0
    batch = {
        "input_ids": BATCH["input_ids"],
        "token_type_ids": np.zeros((3, 12), int),
        "positive_input_ids": ids,
        "positive_attention_mask": mask,
        "positive_ids": np.array([7, 10**6, 9]),
        "score": np.ones(3, np.float32),
        "view1_pixel_values": np.ones((3, 1, 8, 8), np.float32),
    }
    batch |= {} if labels is None else {"labels": labels}
    check_batch(batch, 3, 64, 1, 5)
    if labels is not None and labels.dtype.kind == "i":
        with pytest.raises(jaxft.BatchError, match="labels hold 4; the model's head has 4 classes, 0 to 3"):
            check_batch(batch, 3, 64, 1, 4)


def test_labels_of_rows_are_none_of_tokens(step):
    with pytest.raises(jaxft.BatchError, match=r"needs labels for tokens \[B, T\]; these are \[3\]"):
        step(state_of(), {"input_ids": BATCH["input_ids"], "labels": np.array([0, 1, 2])})


def test_junk_ids_in_padding_are_no_fault(step):
    junk = np.where(np.asarray(BATCH["attention_mask"]) == 0, 10**6, BATCH["input_ids"])
    _, metrics = step(state_of(), {**BATCH, "input_ids": junk})
    _, clean = step(state_of(), BATCH)
    np.testing.assert_allclose(metrics["loss"], clean["loss"], rtol=1e-6)
