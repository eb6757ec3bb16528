"""Many adapters in one model as values: what compiles, what a second one leaves alone, rows that use different ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.generation.generate import decode_loop
from jaxft.models.causal import _logits
from jaxft.models.names import variables
from jaxft.testing import tiny_gpt2, tiny_llama, token_batch

BATCH = token_batch()
IDS = BATCH["input_ids"]
ROWS = len(IDS)
VALUES = ["a", "b", None, {"a": 1, "b": 1}, {"a": 0.5, "c": -1.0}, [0.0, 0.3, 2.0]]
ROW_VALUES = [np.eye(3)[[i % 3 for i in range(ROWS)]], np.zeros((ROWS, 3)), np.full((ROWS, 3), 0.5)]
METHODS = {
    "a": jaxft.LoRA(r=2, target_modules="all-linear"),
    "b": jaxft.LoRA(r=4, alpha=2, layers=(1,), target_modules=("q_proj", "up_proj")),
    "c": jaxft.LoRA(r=3, target_modules=("q_proj", "v_proj"), rank_pattern={"layers.0.self_attn.q_proj": 1}),
}


def filled(model=None, methods=METHODS):
    """A model with these adapters, every leaf of them drawn."""
    model = model or tiny_llama()
    for name, method in methods.items():
        model = jaxft.attach(model, method, name=name)
    for i, (path, v) in enumerate(variables(model).items()):
        if ".delta." in path and not path.endswith("gate"):
            v.set_value(0.1 * jax.random.normal(jax.random.key(i), v.get_value().shape))
    return model


@pytest.fixture(scope="module")
def three():
    return filled()


def test_forward_compiles_once(three):
    jaxft.set_adapter(three, "a")(IDS)
    jaxft.set_adapter(three, ROW_VALUES[0])(IDS)
    compiled, outs = _logits._cache_size(), []
    for weights in (*VALUES, *ROW_VALUES):
        outs.append(jaxft.set_adapter(three, weights)(IDS))
    assert _logits._cache_size() == compiled
    assert len({float(out.sum()) for out in outs}) == len(outs) - 1, "None and rows of zeros are the same"


def test_generation_follows_a_hot_swap_and_compiles_once(three):
    prompts = [[3, 4, 5]] * ROWS
    write = lambda weights: jaxft.generate_ids(
        jaxft.set_adapter(three, weights), prompts, max_new_tokens=8, stop_ids=[]
    )
    alone = {name: write(name)[0] for name in ("a", "b", "c", None)}
    rows = write([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]][:ROWS])
    compiled = decode_loop._cache_size()
    assert rows == [alone[name] for name in ("a", "c", "b", None)[:ROWS]]
    for weights in (*VALUES, *ROW_VALUES):
        write(weights)
    assert decode_loop._cache_size() == compiled
    assert len({tuple(text) for text in alone.values()}) > 1


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_compiles_once_and_follows(remat):
    state = jaxft.TrainState.create(filled(tiny_llama(remat=remat)), None, optax.sgd(0.0), name="b")
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    losses, sizes = [], []
    for weights in ("b", {"a": 1, "b": 1}, {"b": 0.1, "c": -1}, None, *ROW_VALUES):
        state, metrics = step(jaxft.set_adapter(state, weights), BATCH)
        losses.append(float(metrics["loss"]))
        sizes.append(step.program(state)._cache_size())
    assert sizes == [1, 1, 1, 1, 2, 2, 2], "one program for [n], one for [B, n]"
    assert len({round(loss, 5) for loss in losses}) == 6, "None and rows of zeros are the same"


def total(model, weights, rows):
    part, rest = jaxft.partition(jaxft.set_adapter(model, weights), None, name="a")

    def loss(part, rest):
        batch = {name: value[rows] for name, value in BATCH.items()}
        return jaxft.losses.next_token_loss(jaxft.combine(part, rest), batch)[0]

    return jax.jit(jax.value_and_grad(loss))(part, rest)


@pytest.mark.slow
def test_rows_give_the_gradients_of_each_alone(three):
    """All low-rank products as one, beside each row by itself with its adapter alone."""
    three = jaxft.set_adapter(three, "a")
    weights = np.array([[1, 0, 0], [0.5, 1, 0], [1, 0, -1], [0, 0, 1]])[:ROWS]
    loss, grads = total(three, weights, slice(None))
    each = [total(three, w, slice(i, i + 1)) for i, w in enumerate(weights)]
    np.testing.assert_allclose(loss, sum(one for one, _ in each), rtol=1e-5)
    want = jax.tree.map(lambda *g: sum(g), *(jaxft.leaves(g) for _, g in each))
    got, seen = jaxft.leaves(grads), 0
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, atol=2e-4, rtol=1e-4, err_msg=path)
        seen += bool(np.abs(value).max() > 1e-2)
    assert seen == 14


def test_rows_of_weight_zero_are_the_base(three):
    base = jax.jit(lambda m, i: m(i))(tiny_llama(), IDS)
    rows = jaxft.set_adapter(three, [[0.0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]][:ROWS])(IDS)
    np.testing.assert_array_equal(rows[0], base[0])
    assert not np.array_equal(rows[1], base[1])


def products(model, weights):
    text = str(jax.make_jaxpr(lambda m, i: m.hidden(i))(jaxft.set_adapter(model, weights), IDS))
    return text.count("dot_general")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_more_adapters_are_no_more_products(make):
    """Rows over eight adapters multiply as often as rows over one; one set of weights for all rows goes one by one."""
    method = jaxft.LoRA(r=2, target_modules="all-linear")
    one, eight = (filled(make(), {f"a{i}": method for i in range(n)}) for n in (1, 8))
    many = products(eight, np.eye(8)[:ROWS])
    assert many == products(one, np.ones((ROWS, 1)))
    assert products(eight, "a0") > many + 10


def test_dropped_inputs_are_each_adapters_own():
    method = jaxft.LoRA(r=2, dropout=0.5)
    model = filled(methods={"a": method, "b": method})
    noisy = jax.jit(lambda m, key: m(IDS, key=key))
    key = jax.random.key(0)
    each = [noisy(jaxft.set_adapter(model, np.eye(2)[[i] * ROWS]), key) for i in range(2)]
    rows = noisy(jaxft.set_adapter(model, np.eye(2)[[0, 1, 0, 1][:ROWS]]), key)
    for row in range(ROWS):
        np.testing.assert_allclose(rows[row], each[row % 2][row], atol=1e-5)
    assert not np.allclose(rows, jaxft.set_adapter(model, np.eye(2)[[0, 1, 0, 1][:ROWS]])(IDS), atol=1e-3)


def test_a_second_over_a_frozen_first_that_takes_part(three):
    first = jaxft.set_adapter(jaxft.detach(jaxft.detach(three, "b"), "c"), "a")
    before = jaxft.leaves(jax.tree.map(jnp.copy, first))
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    losses = {}
    for on in (True, False):
        base = first if on else jaxft.set_adapter(first, None)
        state = jaxft.TrainState.create(base, jaxft.LoRA(r=2), optax.sgd(0.5), name="b")
        for _ in range(2):
            state, metrics = step(state, BATCH)
            losses.setdefault(on, float(metrics["loss"]))
        after = jaxft.leaves(state.model)
        for path, value in before.items():
            if path != "adapter_weights":
                np.testing.assert_array_equal(after[path], value, err_msg=path)
        assert bool(after["model.layers.self_attn.q_proj.delta.b.b"].any())
    assert abs(losses[True] - losses[False]) > 1e-3, "the first takes part in what the second learns from"


def test_a_composition_is_saved_and_loaded(tmp_path):
    method = jaxft.LoRA(r=2, target_modules=("c_attn",)) | jaxft.BitFit()
    state = jaxft.TrainState.create(tiny_gpt2(), method, optax.sgd(0.5))
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    for _ in range(2):
        state, _ = step(state, BATCH)
    again = jaxft.load_adapter(tiny_gpt2(), jaxft.save_adapter(state, tmp_path))
    np.testing.assert_array_equal(again(IDS), state.model(IDS))
    found = jaxft.leaves(again)
    assert bool(found["transformer.ln_f.bias"].any()) and bool(found["transformer.h.attn.c_attn.delta.default.b"].any())


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_loading_one_leaves_the_other_alone(order, tmp_path):
    """Heads included, in either order."""
    kinds = {"a": jaxft.LoRA(r=2, modules_to_save=("lm_head",)), "b": jaxft.LoRA(r=3, modules_to_save=("lm_head",))}
    alone, folders = {}, {}
    for i, (name, method) in enumerate(kinds.items()):
        model = filled(methods={name: method})
        head = variables(model)[f"lm_head.saved.{name}.kernel"]
        head.set_value(head.get_value() + 0.1 * (i + 1))
        folders[name], alone[name] = jaxft.save_adapter(model, tmp_path / name, name=name), model
    model = tiny_llama()
    for name in order:
        model = jaxft.load_adapter(model, folders[name], name=name)
        np.testing.assert_array_equal(model(IDS), alone[order[0]](IDS))  # the second waits
    for name in order:
        np.testing.assert_array_equal(jaxft.set_adapter(model, name)(IDS), alone[name](IDS))
    assert list(jaxft.adapters(model)) == list(order)
