"""Model losses over columns: array losses of what is embedded, what does not count, chunks, a mesh, a temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxft
from jaxft import losses
from jaxft.losses import classification_loss, make_contrastive_loss
from jaxft.methods import LearnedTemperature
from jaxft.models import CLASSIFIERS
from jaxft.models.hub import fresh_model
from jaxft.testing import check_method, tiny_bert
from jaxft.testing.laws import gradients

B, T, VOCABULARY = 8, 6, 64


INPUTS = ("input_ids", "attention_mask")


def encoder(mesh=None):
    model = tiny_bert(num_hidden_layers=1)
    return model if mesh is None else fresh_model(model.config.replace(mesh=mesh))


def column(seed, name="", length=T):
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(2, length + 1, (B, 1))
    made = {"input_ids": rng.integers(3, VOCABULARY, (B, length)), "attention_mask": mask}
    return {(f"{name}_{k}" if name else k): jnp.asarray(v, jnp.int32) for k, v in made.items()}


PAIRS = {**column(0, "anchor"), **column(1, "positive", 9)}
TRIPLETS = {**PAIRS, **column(2, "negative"), **column(3, "negative_2")}
SCORED = {
    **column(0, "sentence1"),
    **column(1, "sentence2", 9),
    "score": jnp.array([0, 1, 1, 0.5, 0, 1, 0.2, 0], jnp.float32),
}
LABELS = jnp.array([0, 1, 0, 2, 1, 3, 0, 1])
LABELLED = {**column(0), "labels": LABELS}
VIEWS = {**column(0, "view1"), **column(1, "view2")}
TEXTS = {
    **TRIPLETS,
    "anchor_ids": jnp.array([0, 1, 2, 3, 4, 5, 0, 7]),
    "positive_ids": jnp.array([10, 11, 12, 11, 14, 15, 16, 17]),
    "negative_ids": jnp.array([12, 21, 10, 23, 24, 25, 26, 7]),
    "negative_2_ids": jnp.arange(30, 38),
}


def kinds(e):
    """Each loss, a batch for it, and what it is of the embeddings, as a mean and the number of rows."""
    a, p, n, m = (e(TRIPLETS, c) for c in ("anchor", "positive", "negative", "negative_2"))
    s, t = e(SCORED, "sentence1"), e(SCORED, "sentence2")
    hard = jnp.concatenate([p, n, m])
    texts = jnp.concatenate([TEXTS[f"{c}_ids"] for c in ("positive", "negative", "negative_2")])
    twice = lambda x: jnp.concatenate([x, x])
    return {
        "pairs": (("info_nce", {}), PAIRS, losses.info_nce(a, p, temperature=0.05), B),
        "triplets": (
            ("info_nce", {"temperature": 0.2, "symmetric": True}),
            TRIPLETS,
            losses.info_nce(a, hard, temperature=0.2, symmetric=True),
            B,
        ),
        "texts": (
            ("info_nce", {"temperature": 0.2}),
            TEXTS,
            losses.info_nce(a, hard, temperature=0.2, mask=losses.different_text_mask(TEXTS["anchor_ids"], texts)),
            B,
        ),
        "classes": (
            ("info_nce", {"temperature": 0.2}),
            {**PAIRS, "labels": LABELS},
            losses.info_nce(a, p, temperature=0.2, mask=losses.different_label_mask(LABELS)),
            B,
        ),
        "views": (("info_nce", {}), VIEWS, losses.info_nce(e(VIEWS, "view1"), e(VIEWS, "view2"), temperature=0.05), B),
        "nt_xent": (
            ("nt_xent", {}),
            VIEWS,
            losses.nt_xent(e(VIEWS, "view1"), e(VIEWS, "view2"), temperature=0.5),
            2 * B,
        ),
        "nt_xent texts": (
            ("nt_xent", {}),
            {**PAIRS, "anchor_ids": TEXTS["anchor_ids"], "positive_ids": TEXTS["positive_ids"]},
            losses.supervised_contrastive(
                jnp.concatenate([a, p]), twice(jnp.array([0, 1, 2, 1, 4, 5, 0, 7])), temperature=0.5
            ),
            2 * B,
        ),
        "supervised": (
            ("supervised_contrastive", {}),
            LABELLED,
            losses.supervised_contrastive(e(LABELLED, ""), LABELS, temperature=0.07),
            6,  # two classes have one member
        ),
        "supervised views": (
            ("supervised_contrastive", {"temperature": 0.3}),
            {**VIEWS, "labels": LABELS},
            losses.supervised_contrastive(
                jnp.concatenate([e(VIEWS, "view1"), e(VIEWS, "view2")]), twice(LABELS), temperature=0.3
            ),
            2 * B,
        ),
        "triplet": (
            ("triplet", {"margin": 0.1}),
            TRIPLETS,
            losses.triplet(twice(a), twice(p), jnp.concatenate([n, m]), margin=0.1),
            2 * B,
        ),
        "pairwise": (
            ("pairwise_contrastive", {}),
            SCORED,
            losses.pairwise_contrastive(s, t, SCORED["score"]),
            B,
        ),
        "cosent": (("cosent", {}), SCORED, losses.cosent(s, t, SCORED["score"]), B),
        "regression": (("cosine_regression", {}), SCORED, losses.cosine_regression(s, t, SCORED["score"]), B),
    }


@pytest.fixture(scope="module")
def model():
    return encoder()


@pytest.fixture(scope="module")
def expected(model):
    cases = {}

    def values(model):
        names = lambda column: {k: f"{column}_{k}" if column else k for k in INPUTS}
        cases.update(kinds(lambda batch, c: model.pooled(**{k: batch[there] for k, there in names(c).items()})))
        return {name: want for name, (_, _, want, _) in cases.items()}

    wants = jax.jit(values)(model)
    return {name: (how, batch, wants[name], rows) for name, (how, batch, _, rows) in cases.items()}


NAMES = (
    "pairs", "triplets", "texts", "classes", "views", "nt_xent", "nt_xent texts", "supervised", "supervised views",
    "triplet", "pairwise", "cosent", "regression",
)  # fmt: skip


FILLED = ("triplets", "nt_xent", "supervised", "triplet", "cosent")  # also with two rows that have no token


@pytest.mark.parametrize("name", NAMES)
def test_each_is_the_loss_of_the_embeddings(name, model, expected):
    (kind, options), batch, want, rows = expected[name]
    assert tuple(expected) == NAMES
    run = jax.jit(make_contrastive_loss(kind, **options))
    total, weight, metrics = run(model, batch)
    assert float(weight) == rows
    np.testing.assert_allclose(total / weight, want, rtol=1e-5)
    if "in_batch_accuracy" in metrics:
        assert float(metrics["in_batch_accuracy"][1]) == rows
    if name in FILLED:
        filled = {k: jnp.concatenate([v, v[:2] * (0 if k.endswith("_mask") else 1)]) for k, v in batch.items()}
        again, counted, more = run(model, filled)
        np.testing.assert_allclose(again, total, rtol=1e-5)
        assert float(counted) == rows and jax.tree.all(jax.tree.map(jnp.allclose, more, metrics))


def test_the_positive_that_is_picked(model):
    same = {**PAIRS, **{k.replace("anchor", "positive"): v for k, v in PAIRS.items() if k.startswith("anchor")}}
    run = jax.jit(make_contrastive_loss("info_nce"))
    assert [float(x) for x in run(model, same)[2]["in_batch_accuracy"]] == [B, B]
    turned = {k: jnp.roll(v, 1, 0) if k.startswith("positive") else v for k, v in same.items()}
    assert [float(x) for x in run(model, turned)[2]["in_batch_accuracy"]] == [0, B]
    collapsed = {k: v * 0 + 5 for k, v in same.items()}
    assert float(run(model, collapsed)[2]["in_batch_accuracy"][0]) == 0  # all equal is nothing picked


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        ("supervised_contrastive", {**LABELLED, "labels": jnp.arange(B)}),
        ("cosent", {**SCORED, "score": jnp.ones(B)}),
        ("info_nce", {k: v * (0 if k.endswith("_mask") else 1) for k, v in PAIRS.items()}),
    ],
)
def test_nothing_to_pull_together_counts_nothing(kind, batch, model):
    total, weight, _ = jax.jit(make_contrastive_loss(kind))(model, batch)
    assert float(total) == float(weight) == 0


def test_a_step_with_nothing_to_pull_together_leaves_the_state_as_it_is(model):
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=2), optax.adamw(0.1, weight_decay=0.1))
    before = jax.tree.map(np.array, state.trainable)
    loss = make_contrastive_loss("supervised_contrastive")
    state, metrics = jaxft.make_train_step(loss)(state, {**LABELLED, "labels": jnp.arange(B)})
    assert int(metrics["skipped"]) == 1 and float(metrics["loss"]) == 0
    jax.tree.map(np.testing.assert_array_equal, state.trainable, before)


DROPPED = jaxft.LoRA(r=2, target_modules=("query",), dropout=0.2) | LearnedTemperature(0.2)


def trained(model, loss, batch):
    """The loss of a step, and its gradient, which is what SGD takes off."""
    state = jaxft.TrainState.create(model, DROPPED, optax.sgd(0.5), seed=3)
    before = host(state)
    state, metrics = jaxft.make_train_step(loss)(state, batch)
    return float(metrics["loss"]), {path: (before[path] - x) / 0.5 for path, x in host(state).items()}


def host(state):
    return {path: np.array(x) for path, x in jaxft.leaves(state.trainable).items()}


@pytest.mark.slow
def test_a_step_on_eight_devices_is_a_step_on_one(model):
    """In chunks, with dropout, equal texts, and a temperature that is learned."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    batch = {k: jnp.concatenate([v, v[::-1]]) for k, v in TEXTS.items() if not k.startswith("negative")}
    loss = make_contrastive_loss("info_nce", symmetric=True, chunk=8)
    want, got = (trained(m, loss, batch) for m in (model, encoder(mesh=jaxft.make_mesh(**mesh))))
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    assert np.abs(want[1]["temperature.default.log_scale"]) > 1e-3
    for path, value in want[1].items():
        np.testing.assert_allclose(got[1][path], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=path)


def test_chunks_are_the_whole_batch(model):
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=2), optax.sgd(0.5))
    want = gradients(state, PAIRS, make_contrastive_loss("info_nce", symmetric=True))
    got = gradients(state, PAIRS, make_contrastive_loss("info_nce", symmetric=True, chunk=3))
    assert len(want) == 4 and any(bool(np.any(value)) for value in want.values())
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=path)


def test_a_temperature_that_is_learned(model, tmp_path):
    method = jaxft.LoRA(r=2) | LearnedTemperature(0.2)
    loss = make_contrastive_loss("info_nce", temperature=0.1)
    state = jaxft.TrainState.create(model, method, optax.sgd(0.5))
    state, first = jaxft.make_train_step(loss)(state, PAIRS)
    np.testing.assert_allclose(first["temperature"], 0.2, rtol=1e-6)
    assert jaxft.leaves(state.trainable)["temperature.default.log_scale"].shape == ()
    run = jax.jit(lambda model: loss(model, PAIRS)[2]["temperature"][0])
    now = float(run(state.model))
    assert abs(now - 0.2) > 1e-4
    weighted = {1.0: now, 0.0: 0.1, 0.5: (now * 0.1) ** 0.5}
    for weight, want in weighted.items():
        np.testing.assert_allclose(run(jaxft.set_adapter(state.model, {"default": weight})), want, rtol=1e-6)
    assert run._cache_size() == 1
    again = jaxft.load_adapter(model, jaxft.save_adapter(state, tmp_path))
    assert jaxft.adapters(again)["default"] == method and float(run(again)) == now
    merged = jaxft.merge(again)
    assert merged.temperature is None and float(run(jaxft.detach(again, "default"))) == np.float32(0.1)
    rows = jaxft.set_adapter(again, jnp.ones((B, 1)))
    with pytest.raises(jaxft.BatchError, match="a learned temperature is one for the batch"):
        loss(rows, PAIRS)


@pytest.mark.slow
def test_the_laws_of_a_temperature(model):
    """With an adapter, under a loss that reads it; alone it is no method."""
    method = jaxft.LoRA(r=2) | LearnedTemperature(0.2)
    loss = make_contrastive_loss("supervised_contrastive")
    batch = {name: jnp.concatenate([x, x[:1]]) for name, x in LABELLED.items()}  # 48 tokens would be a width
    check_method(method, model, batch, loss=loss, identity=False, count=2 * 2 * 2 * 32 + 1)


def test_a_temperature_alone():
    method = LearnedTemperature()
    state = jaxft.TrainState.create(encoder(), method, optax.sgd(0.5))
    assert list(jaxft.leaves(state.trainable)) == ["temperature.default.log_scale"]
    np.testing.assert_allclose(state.model.temperature["default"].log_scale.get_value(), 2.6592, atol=1e-4)
    for initial in (0, -1, "0.1", True, float("inf"), float("nan")):
        with pytest.raises(jaxft.MethodError, match="give a number above 0"):
            LearnedTemperature(initial)
    with pytest.raises(jaxft.MethodError, match="no `temperature` slot"):
        jaxft.attach(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), method)


BAD = {
    "kind": (lambda: make_contrastive_loss("infonce"), "no contrastive loss 'infonce'; nearest: 'info_nce'"),
    "option": (lambda: make_contrastive_loss("nt_xent", symmetric=True), "symmetric: nt_xent has temperature"),
    "chunk": (lambda: make_contrastive_loss("nt_xent", chunk=0), "chunk=0: give a whole number"),
    "temperature": (lambda: make_contrastive_loss("nt_xent", temperature=-1), "temperature=-1: give a number above 0"),
}


@pytest.mark.parametrize(("call", "match"), BAD.values(), ids=BAD)
def test_what_cannot_be(call, match):
    with pytest.raises(jaxft.MethodError, match=match):
        call()


LACKING = {
    "info_nce": (SCORED, r"info_nce needs anchor_... and positive_..., or view1_... and view2_... \(of the inputs"),
    "supervised_contrastive": (PAIRS, r"supervised_contrastive needs labels \[B\]; the batch has anchor_input_ids"),
    "triplet": (PAIRS, "triplet needs anchor_... and positive_... and negative_..."),
    "cosent": ({**PAIRS, "score": jnp.ones(B)}, "cosent needs sentence1_... and sentence2_..."),
    "cosine_regression": (PAIRS, r"needs score \[B\]"),
}


@pytest.mark.parametrize("kind", LACKING)
def test_columns_that_are_not_there(kind, model):
    batch, match = LACKING[kind]
    with pytest.raises(jaxft.BatchError, match=match):
        make_contrastive_loss(kind)(model, batch)


@pytest.fixture(scope="module")
def classifier():
    kind, config = CLASSIFIERS["bert"], encoder().config
    return lambda labels: kind(config.replace(labels=labels), rngs=nnx.Rngs(1))


def test_classes_and_numbers(classifier):
    model = classifier(("a", "b", "c", "d"))
    outputs = np.asarray(model(LABELLED["input_ids"], LABELLED["attention_mask"]), np.float64)
    labels = LABELS.at[3].set(-100).at[:2].set(outputs[:2].argmax(-1))
    rows = [i for i in range(B) if i != 3]
    run = jax.jit(classification_loss)
    total, weight, metrics = run(model, {**LABELLED, "labels": labels})
    want = [np.log(np.exp(outputs[i]).sum()) - outputs[i, int(labels[i])] for i in rows]
    np.testing.assert_allclose(total, sum(want), rtol=1e-5)
    hits = sum(outputs[i].argmax() == int(labels[i]) for i in rows)
    assert float(weight) == 7 and [float(x) for x in metrics["accuracy"]] == [hits, 7] and hits
    with pytest.raises(jaxft.BatchError, match="the head has 4 outputs"):
        run(model, {**LABELLED, "labels": jnp.zeros(B)})
    with pytest.raises(jaxft.BatchError, match=r"labels \[B\], one for each row; the batch has none"):
        run(model, PAIRS)


def test_numbers_to_predict(classifier):
    model, numbers = classifier(("score",)), np.linspace(-1, 2, B).astype(np.float32)
    outputs = np.asarray(model(LABELLED["input_ids"], LABELLED["attention_mask"]), np.float64)
    labels = jnp.asarray(numbers).at[3].set(jnp.nan)
    total, weight, metrics = jax.jit(classification_loss)(model, {**LABELLED, "labels": labels})
    np.testing.assert_allclose(total, sum((outputs[i, 0] - numbers[i]) ** 2 for i in range(B) if i != 3), rtol=1e-5)
    assert float(weight) == 7 and not metrics
    gradient = jax.grad(lambda n: classification_loss(Guess(n), {"labels": jnp.array([1.0, jnp.nan])})[0])
    assert gradient(jnp.array([[2.0], [jnp.inf]])).tolist() == [[2.0], [0.0]]
    with pytest.raises(jaxft.BatchError, match=r"a Guess gives \[2, 3, 4\] for 2 rows: load it with labels"):
        classification_loss(Guess(jnp.zeros((2, 3, 4))), {"labels": jnp.zeros(2, int)})


class Guess:
    """What it says whatever it is given."""

    inputs = ()

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, key=None):
        return self.outputs
