"""The partition as a research script uses it: masks, parts, a gradient of one's own, selections."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.models.seams import Delta
from jaxft.testing import tiny_gpt2, tiny_llama, token_batch

BATCH = token_batch()


def loss(model):
    total, weight, _ = jaxft.losses.next_token_loss(model, BATCH)
    return total / weight


def test_a_mask_with_optax_trains_what_a_part_with_our_step_trains():
    """The documented pairing: `multi_transform` with `set_to_zero` over the whole model."""
    model, method = jaxft.attach(tiny_gpt2(), jaxft.BitFit()), jaxft.BitFit()
    mask = jaxft.trainable_mask(model, method)
    tx = optax.multi_transform({True: optax.sgd(0.1), False: optax.set_to_zero()}, lambda params: mask)
    updates, _ = tx.update(jax.jit(jax.grad(loss))(model), tx.init(model), model)
    whole = jaxft.leaves(optax.apply_updates(model, updates))
    state = jaxft.TrainState.create(model, method, optax.sgd(0.1))
    state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, BATCH)
    for path, value in jaxft.leaves(state.model).items():
        np.testing.assert_allclose(whole[path], value, atol=1e-7, err_msg=path)
    kernels = [p for p in whole if p.endswith("kernel")]
    assert kernels and all(np.array_equal(whole[p], jaxft.leaves(model)[p]) for p in kernels)


def test_masked_takes_the_mask_as_it_is():
    model, method = jaxft.attach(tiny_gpt2(), jaxft.BitFit()), jaxft.BitFit()
    mask = jaxft.trainable_mask(model, method)
    assert jax.tree.structure(mask) == jax.tree.structure(model)
    rest = jax.tree.map(lambda m: not m, mask)
    tx = optax.chain(optax.masked(optax.adam(0.1), mask), optax.masked(optax.set_to_zero(), rest))
    state = tx.init(model)
    held = sum(x.size for x in jax.tree.leaves(state)) - 1
    assert held == 2 * jaxft.parameter_report(model, method).trainable
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, model), state, model)
    for path, update in jaxft.leaves(updates).items():
        assert bool(update.any()) is path.endswith("bias"), path


def test_a_gradient_of_ones_own():
    trainable, frozen = jaxft.partition(tiny_llama(), jaxft.LoRA(r=2))
    grads = jax.jit(jax.grad(lambda part: loss(jaxft.combine(part, frozen))))(trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    tx = optax.adamw(1e-2)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    assert loss(jaxft.combine(optax.apply_updates(trainable, updates), frozen)) < loss(tiny_llama())


def test_leaves_in_both_parts_or_in_neither():
    trainable, frozen = jaxft.partition(tiny_llama(), jaxft.LoRA(r=2))
    whole = jaxft.combine(trainable, frozen)
    with pytest.raises(jaxft.PartitionError, match=r"q_proj\.delta\.default\.a is in both parts"):
        jaxft.combine(trainable, whole)
    with pytest.raises(jaxft.PartitionError, match=r"model\.norm\.scale is in neither part"):
        jaxft.combine(trainable, jax.tree.map(lambda _: None, frozen))
    with pytest.raises(jaxft.PartitionError, match="not of one model"):
        jaxft.combine(trainable, tiny_llama())
    with pytest.raises(jaxft.PartitionError, match="not of one model"):
        jaxft.combine(trainable, tiny_gpt2())


def test_a_method_that_trains_nothing():
    class Nothing(jaxft.Method):
        def trains(self, path, variable, name):
            return False

    with pytest.raises(jaxft.SelectionError, match="Nothing trains no leaf of this LlamaForCausalLM"):
        jaxft.partition(tiny_llama(), Nothing())


def test_selections():
    model = jaxft.attach(tiny_llama(), jaxft.LoRA(r=2))
    assert jaxft.select(model, "model.layers.1.mlp.up_proj.weight") == ["model.layers.mlp.up_proj.kernel"]
    assert jaxft.select(model, "*.layers.*.mlp.*_proj") == [
        f"model.layers.mlp.{n}_proj.kernel" for n in ("down", "gate", "up")
    ]
    assert len(jaxft.select(model, Delta)) == len(jaxft.select(model, "*.delta.default.[ab]")) == 4
    assert jaxft.select(model, re.compile(r"model\.norm\.scale$")) == ["model.norm.scale"]
    assert jaxft.select(model, "lm_head", "model.norm") == ["lm_head.kernel", "model.norm.scale"]


@pytest.mark.parametrize("wanted", ["*.q_prj", re.compile("query"), jaxft.models.seams.Copies])
def test_a_selection_of_nothing(wanted):
    with pytest.raises(jaxft.SelectionError, match="selects no leaf of this LlamaForCausalLM; "):
        jaxft.select(tiny_llama(), "lm_head", wanted)


def test_the_nearest_name_is_given():
    with pytest.raises(jaxft.SelectionError, match="nearest: 'q_proj'"):
        jaxft.select(tiny_llama(), "*.q_prj")


def test_bitfit_creates_biases_only_where_there_are_none():
    created = jaxft.parameter_report(tiny_llama(), jaxft.BitFit(create=True))
    assert created.trainable == 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    with pytest.raises(jaxft.MethodError, match="every linear layer of this model has a bias"):
        jaxft.attach(tiny_gpt2(), jaxft.BitFit(create=True))
    state = jaxft.TrainState.create(tiny_llama(), jaxft.BitFit(create=True), optax.sgd(1.0))
    state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, BATCH)
    merged = jaxft.merge(state.model)
    assert "model.layers.mlp.up_proj.bias" in jaxft.leaves(merged)
    np.testing.assert_allclose(merged(BATCH["input_ids"]), state.model(BATCH["input_ids"]), atol=1e-5)
    assert jnp.isfinite(merged(BATCH["input_ids"])).all()
