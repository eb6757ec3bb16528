"""Named adapters: attach, switch, stack, weight, disable, detach, merge; all values, all on one base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.testing import tiny_llama, token_batch

IDS = token_batch()["input_ids"]


def trained(method, name, seed=0, base=None):
    """A base with one adapter that does something."""
    state = jaxft.TrainState.create(base or tiny_llama(), method, optax.sgd(2.0), seed=seed, name=name)
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    for _ in range(2):
        state, _ = step(state, token_batch(seed=seed))
    return state.model


@pytest.fixture(scope="module")
def two():
    first = trained(jaxft.LoRA(r=2), "a")
    return trained(jaxft.LoRA(r=3, target_modules=("up_proj", "q_proj")), "b", seed=1, base=first)


def test_weights_are_values(two):
    """Switching, stacking, weighting and disabling compile nothing, and give what each adapter gives alone."""
    traced = []

    @jax.jit
    def logits(model, ids):
        traced.append(1)
        return model(ids)

    outs = {}
    for weights in ("a", "b", None, {"a": 1, "b": 1}, {"a": 0.5}, [0.3, -1.0], jnp.array([0.0, 2.0])):
        outs[str(weights)] = logits(jaxft.set_adapter(two, weights), IDS)
    assert len(traced) == 1
    np.testing.assert_array_equal(outs["None"], jax.jit(lambda m, i: m(i))(tiny_llama(), IDS))
    assert len({float(out.sum()) for out in outs.values()}) == 7


def test_alone_is_alone(two):
    alone = jaxft.detach(two, "b")
    np.testing.assert_array_equal(jaxft.set_adapter(two, "a")(IDS), alone(IDS))
    assert list(jaxft.adapters(alone)) == ["a"]
    assert not any(".b." in path for path in jaxft.leaves(alone))


def test_rows_with_adapters_of_their_own(two):
    rows = jaxft.set_adapter(two, [[1, 0], [0, 1], [0, 0]])(IDS)
    for row, weights in enumerate(("a", "b", None)):
        np.testing.assert_allclose(rows[row], jaxft.set_adapter(two, weights)(IDS)[row], atol=1e-5)
    with pytest.raises(jaxft.BatchError, match="for 3 rows, the batch has 2"):
        jaxft.set_adapter(two, [[1, 0], [0, 1], [0, 0]])(IDS[:2])


def test_a_second_adapter_over_a_frozen_first():
    first = trained(jaxft.LoRA(r=2), "a")
    before = jaxft.leaves(jax.tree.map(jnp.copy, first))
    both = trained(jaxft.LoRA(r=2, target_modules=("k_proj",)), "b", base=first)
    for path, value in before.items():
        if path != "adapter_weights":
            np.testing.assert_array_equal(jaxft.leaves(both)[path], value)
    assert jaxft.adapters(both).keys() == {"a", "b"}
    assert both.adapter_weights.get_value().tolist() == [1, 1]


def test_copies_of_modules_are_named_too():
    """Two adapters with heads of their own on one base: neither sees the other's."""
    method = jaxft.LoRA(r=2, modules_to_save=("lm_head", "norm", "embed_tokens"))
    a = trained(method, "a")
    both = trained(method, "b", seed=1, base=jaxft.set_adapter(a, None))
    np.testing.assert_array_equal(jaxft.set_adapter(both, "a")(IDS), a(IDS))
    np.testing.assert_array_equal(jaxft.set_adapter(both, None)(IDS), tiny_llama()(IDS))
    rows = jaxft.set_adapter(both, [[1, 0], [0, 1], [0, 0]])(IDS)
    for row, weights in enumerate(("a", "b", None)):
        np.testing.assert_allclose(rows[row], jaxft.set_adapter(both, weights)(IDS)[row], atol=1e-5)


@pytest.mark.parametrize("weights", ["a", {"a": 1, "b": 1}, {"a": 0.5, "b": -0.5}])
def test_merged_is_unmerged(two, weights):
    active = jaxft.set_adapter(two, weights)
    merged = jaxft.merge(active)
    assert set(jaxft.leaves(merged)) == set(jaxft.leaves(tiny_llama()))
    np.testing.assert_allclose(merged(IDS), active(IDS), atol=1e-5)


def test_several_merged_and_taken_out_again(two):
    both = jaxft.set_adapter(two, {"a": 1, "b": 0.5})
    merged = jaxft.merge(both)
    base = jaxft.leaves(tiny_llama())
    holding = jaxft.combine(*jaxft.partition(both, jaxft.Full()))
    for path, value in jaxft.leaves(merged).items():
        jaxft.models.names.variables(holding)[path].set_value(value)
    again = jaxft.leaves(jaxft.unmerge(holding))
    for path, value in base.items():
        np.testing.assert_allclose(again[path], value, atol=1e-6, err_msg=path)


def test_an_adapter_on_a_tied_head_unties_it_on_merge(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    model = trained(jaxft.LoRA(r=2, target_modules=("lm_head",)), "default", base=base)
    merged = jaxft.merge(model)
    np.testing.assert_allclose(merged(IDS), model(IDS), atol=1e-5)
    table = "model.embed_tokens.embedding"
    np.testing.assert_array_equal(jaxft.leaves(merged)[table], jaxft.leaves(base)[table])
    assert merged.config.tie_word_embeddings is False
    np.testing.assert_array_equal(jaxft.load(jaxft.save_model(merged, tmp_path))[0](IDS), merged(IDS))


def test_merging_into_bfloat16():
    model = trained(jaxft.LoRA(r=2), "a", base=tiny_llama(dtype=jnp.bfloat16))
    merged = jaxft.merge(model)
    assert {v.dtype for v in jaxft.leaves(merged).values()} == {jnp.dtype(jnp.bfloat16)}
    apart = jnp.abs(merged(IDS).astype(jnp.float32) - model(IDS).astype(jnp.float32)).max()
    assert apart < 2e-2


def test_what_cannot_be_merged(two):
    with pytest.raises(jaxft.MethodError, match="no adapter to merge"):
        jaxft.merge(tiny_llama())
    with pytest.raises(jaxft.MethodError, match="each row has adapter weights of its own"):
        jaxft.merge(jaxft.set_adapter(two, [[1, 0]]))
    saved = jaxft.attach(tiny_llama(), jaxft.LoRA(r=2, modules_to_save=("lm_head",)))
    with pytest.raises(jaxft.MethodError, match="lm_head was replaced"):
        jaxft.unmerge(saved)


def test_names_and_weights_that_do_not_fit(two):
    cases = [
        ("c", "no adapter 'c'; there are: 'a', 'b'"),
        ({"a": 1, "x": 1}, "no adapter 'x'"),
        ([1, 2, 3], r"adapter weights \(3,\): give \[2\] or \[rows, 2\]"),
    ]
    for weights, match in cases:
        with pytest.raises(jaxft.MethodError, match=match):
            jaxft.set_adapter(two, weights)
    with pytest.raises(jaxft.MethodError, match="carries no adapter"):
        jaxft.set_adapter(tiny_llama(), "a")
    with pytest.raises(jaxft.MethodError, match="already has an adapter 'a'"):
        jaxft.attach(two, jaxft.LoRA(), name="a")
    with pytest.raises(jaxft.MethodError, match="adapter name 'a.b'"):
        jaxft.attach(two, jaxft.LoRA(), name="a.b")
    with pytest.raises(jaxft.MethodError, match="no adapter 'x'"):
        jaxft.detach(two, "x")
    with pytest.raises(jaxft.MethodError, match="is no method"):
        jaxft.attach(two, jaxft.LoRA, name="c")


def test_the_method_must_describe_the_adapter_that_is_there():
    model = trained(jaxft.LoRA(r=2, alpha=4), "default")
    goes_on = jaxft.TrainState.create(model, None, optax.sgd(1.0))
    again = jaxft.TrainState.create(model, jaxft.LoRA(r=2, alpha=4, dropout=0.1), optax.sgd(1.0))
    np.testing.assert_array_equal(goes_on.model(IDS), model(IDS))
    np.testing.assert_array_equal(again.model(IDS), model(IDS))
    assert again.model.model.layers.self_attn.q_proj.delta["default"].rate == 0.1
    for other, match in (
        (jaxft.LoRA(r=3), r"q_proj.delta.default.a is \(2, 32, 2\), the method makes \(2, 32, 3\)"),
        (jaxft.LoRA(r=2, alpha=8), "the adapter's scale is not the method's"),
        (jaxft.LoRA(r=2, alpha=4, target_modules=("q_proj",)), "is only in one of the two"),
    ):
        with pytest.raises(jaxft.MethodError, match=match):
            jaxft.TrainState.create(model, other, optax.sgd(1.0))
    with pytest.raises(jaxft.MethodError, match="no method given"):
        jaxft.TrainState.create(tiny_llama(), None, optax.sgd(1.0))


def test_other_layers_are_another_adapter():
    model = jaxft.attach(tiny_llama(), jaxft.LoRA(r=2, layers=(0,), target_modules=("q_proj",)))
    with pytest.raises(jaxft.MethodError, match=r"delta.default: layers \(0,\), the method's \(1,\)"):
        jaxft.TrainState.create(model, jaxft.LoRA(r=2, layers=(1,), target_modules=("q_proj",)), optax.sgd(1.0))


def test_an_adapter_that_is_off_is_not_trained_silently():
    model = jaxft.set_adapter(jaxft.attach(tiny_llama(), jaxft.LoRA(r=2)), None)
    with pytest.raises(jaxft.MethodError, match="'default' has weight 0 and would not train"):
        jaxft.TrainState.create(model, None, optax.sgd(1.0))


@pytest.mark.parametrize(
    "method", [jaxft.LoRA(r=2, bias="all") | jaxft.BitFit(), jaxft.LoRA(r=2, modules_to_save=("ln_f",)) | jaxft.Full()]
)
def test_parts_that_hide_each_other(method):
    with pytest.raises(
        jaxft.MethodError, match=r"do not add up\n  - one trains a leaf .* hides it: transformer\..*saved\.default"
    ):
        jaxft.partition(jaxft.testing.tiny_gpt2(), method)


def test_created_biases_are_in_the_written_config(tmp_path):
    merged = jaxft.merge(trained(jaxft.BitFit(create=True), "default"))
    again, _ = jaxft.load(jaxft.save_model(merged, tmp_path))
    np.testing.assert_array_equal(again(IDS), merged(IDS))
    assert again.config.attention_bias and again.config.mlp_bias


def test_a_state_is_no_model(tmp_path):
    state = jaxft.TrainState.create(tiny_llama(), jaxft.LoRA(r=2), optax.sgd(1.0))
    for use in (
        lambda s: jaxft.attach(s, jaxft.LoRA(), name="b"),
        jaxft.merge,
        lambda s: jaxft.save_model(s, tmp_path),
    ):
        with pytest.raises(jaxft.MethodError, match="state.model"):
            use(state)
    with pytest.raises(jaxft.GenerationError, match="state.model"):
        jaxft.generate_ids(state, [[1]])


def test_weights_that_are_no_numbers(two):
    for weights in ({"a": "x"}, [float("nan"), 1.0]):
        with pytest.raises(jaxft.MethodError, match="adapter weights"):
            jaxft.set_adapter(two, weights)


def test_no_method_means_the_one_that_is_there(two):
    parts = jaxft.partition(two, None, name="b")
    assert all(".b." in path for path in jaxft.leaves(parts[0]))
    with pytest.raises(jaxft.MethodError, match="takes a TrainState, or a model and the method"):
        jaxft.parameter_report(two)
