"""LoRA: the selection layer by layer, counts, the backward rule, bad options."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxft
from jaxft.methods.low_rank import LowRank, narrow_product
from jaxft.testing import tiny_gpt2, tiny_llama, token_batch

IDS = token_batch()["input_ids"]


def adapted(model, method):
    return {name for target in method.targets(model) for name in target.names}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2 * 8 * (64 + 48)),
        ({"r": 4, "target_modules": "all-linear"}, 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)),
        ({"r": 4, "target_modules": ("q_proj", "up_proj"), "layers": (1,)}, 4 * (64 + 80)),
        ({"r": 4, "target_modules": ("q_proj",), "rank_pattern": {r"layers\.0\..*": 1}}, (1 + 4) * 64),
        ({"r": 2, "target_modules": ("lm_head",)}, 2 * (32 + 64)),
        ({"r": 2, "target_modules": ("q_proj",), "modules_to_save": ("norm",)}, 2 * 2 * 64 + 5 * 32),
        (
            {"r": 2, "target_modules": ("q_proj",), "modules_to_save": ("lm_head", "embed_tokens")},
            2 * 2 * 64 + 2 * 64 * 32,
        ),
    ],
)
def test_counts_by_the_formula(options, count):
    """r (in + out) a layer, and whole modules where they are saved."""
    assert jaxft.parameter_report(tiny_llama(), jaxft.LoRA(**options)).trainable == count


def test_which_modules():
    model = tiny_llama()
    every = adapted(model, jaxft.LoRA(target_modules="all-linear"))
    assert len(every) == 14 and "lm_head" not in every
    assert adapted(model, jaxft.LoRA(target_modules=("self_attn.q_proj",))) == {
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    }
    assert adapted(model, jaxft.LoRA(target_modules=("layers.1.mlp.up_proj", "lm_head"))) == {
        "model.layers.1.mlp.up_proj",
        "lm_head",
    }
    some = jaxft.LoRA(target_modules=r".*\.0\..*_proj", exclude_modules=("mlp.up_proj", "gate_proj"))
    assert adapted(model, some) == {
        f"model.layers.0.{n}_proj" for n in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.down")
    }
    assert adapted(tiny_gpt2(), jaxft.LoRA()) == {"transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}


def test_the_base_path_never_changes():
    model = tiny_llama()
    base = set(jaxft.leaves(model))
    attached = jaxft.attach(model, jaxft.LoRA(r=2, target_modules="all-linear", modules_to_save=("lm_head",)))
    assert base < set(jaxft.leaves(attached))
    assert all(jaxft.leaves(attached)[path] is value for path, value in jaxft.leaves(model).items())
    assert set(jaxft.leaves(model)) == base


def test_the_tree():
    """The trained part of a small model, written out."""
    method = jaxft.LoRA(r=3, target_modules=("q_proj", "lm_head"), layers_pattern="layers", modules_to_save=("norm",))
    trainable, _ = jaxft.partition(tiny_llama(tie_word_embeddings=True), method)
    assert {path: v.shape for path, v in jaxft.leaves(trainable).items()} == {
        "lm_head.delta.default.a": (32, 3),
        "lm_head.delta.default.b": (3, 64),
        "model.layers.input_layernorm.saved.default.scale": (2, 32),
        "model.layers.post_attention_layernorm.saved.default.scale": (2, 32),
        "model.layers.self_attn.q_proj.delta.default.a": (2, 32, 3),
        "model.layers.self_attn.q_proj.delta.default.b": (2, 3, 32),
        "model.norm.saved.default.scale": (32,),
    }


def test_a_layer_outside_the_selection_cannot_drift():
    """No leaf stands for it: AdamW's decay has nothing to move."""
    method = jaxft.LoRA(r=2, target_modules=("q_proj",), layers=(1,))
    state = jaxft.TrainState.create(tiny_llama(), method, optax.adamw(0.1, weight_decay=0.5))
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    for _ in range(3):
        state, _ = step(state, token_batch())
    merged = jaxft.leaves(jaxft.merge(state.model))["model.layers.self_attn.q_proj.kernel"]
    before = jaxft.leaves(tiny_llama())["model.layers.self_attn.q_proj.kernel"]
    assert np.array_equal(merged[0], before[0]) and (merged[1] != before[1]).any()


def test_padding_of_a_smaller_rank_counts_for_nothing():
    method = jaxft.LoRA(r=4, target_modules=("q_proj",), rank_pattern={r"layers\.0\..*": 1})
    model = jaxft.attach(tiny_llama(), method)
    delta = model.model.layers.self_attn.q_proj.delta["default"]
    delta.b.set_value(jnp.ones_like(delta.b.get_value()))
    before = model(IDS)
    delta.a.set_value(delta.a.get_value().at[0, :, 1:].set(1e3))
    delta.b.set_value(delta.b.get_value().at[0, 1:].set(1e3))
    np.testing.assert_array_equal(model(IDS), before)


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 3, 7)])
def test_the_backward_rule_is_the_gradient(shape):
    rows, i, o = shape
    x, w = jax.random.normal(jax.random.key(0), (2, rows, i)), jax.random.normal(jax.random.key(1), (i, o))

    def total(product):
        return lambda x, w: (product(x, w) * jnp.arange(o)[None, None]).sum()

    ours, plain = (jax.grad(total(f), (0, 1))(x, w) for f in (narrow_product, jnp.matmul))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_summed_in_float32():
    x, w = jnp.ones((1, 4096, 2), jnp.bfloat16), jnp.ones((2, 3))
    dw = jax.grad(lambda w: narrow_product(x, w).astype(jnp.float32).sum())(w)
    assert dw.dtype == jnp.float32
    np.testing.assert_array_equal(dw, 4096)  # in bfloat16 the sum would stop growing at 256


def test_float32_over_a_bfloat16_base():
    model = tiny_llama(dtype=jnp.bfloat16)
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=2, modules_to_save=("lm_head",)), optax.adamw(1e-4))
    assert {v.dtype for v in jaxft.leaves(state.trainable).values()} == {jnp.dtype(jnp.float32)}
    assert state.model(IDS).dtype == jnp.bfloat16
    before = jaxft.leaves(jax.tree.map(jnp.copy, state.trainable))
    state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, token_batch())
    moved = {path: bool((v != before[path]).any()) for path, v in jaxft.leaves(state.trainable).items()}
    assert moved["lm_head.saved.default.kernel"] and moved["model.layers.self_attn.q_proj.delta.default.b"]


def test_dropout_is_on_the_input_of_the_adapter_and_only_with_a_key():
    model = jaxft.attach(tiny_llama(), jaxft.LoRA(r=2, dropout=0.5))
    for _, delta in nnx.iter_modules(model):
        if isinstance(delta, LowRank):
            delta.b.set_value(jnp.ones_like(delta.b.get_value()))
    off, a, b = model(IDS), model(IDS, key=jax.random.key(0)), model(IDS, key=jax.random.key(1))
    assert (a != off).any() and (a != b).any()
    np.testing.assert_array_equal(model(IDS), off)
    assert "default" in jaxft.adapters(model)
    plain = tiny_llama()
    np.testing.assert_array_equal(plain(IDS), plain(IDS, key=jax.random.key(0)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r=0: a rank is a whole number of at least 1"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": True}, "r=True"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1"),
        ({"alpha": float("nan")}, "alpha=nan: give a finite number"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"bias": "some"}, "bias='some': choose one of 'none', 'all', 'lora_only'"),
        ({"init": "olora"}, "init='olora': choose one of"),
        ({"target_modules": ()}, "name at least one module"),
        ({"layers": (0,), "target_modules": ".*q_proj"}, "give target_modules as names"),
        ({"layers": 0.5}, "layers=.*: give indices of layers"),
        ({"rank_pattern": {"(": 2}}, "'\\(' is not a regular expression"),
        ({"rank_pattern": ["q"]}, "give a dict of regular expressions and numbers"),
        ({"rank_pattern": 5}, "give a dict of regular expressions and numbers"),
        ({"modules_to_save": 5}, "modules_to_save=.*: give names"),
        ({"layers_pattern": "("}, "is not a regular expression"),
        ({"target_modules": 5}, "target_modules=.*: give names, or one regular expression"),
        ({"exclude_modules": [3]}, "exclude_modules=.*: give names"),
        ({"dropout": "x"}, "dropout='x'"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(jaxft.MethodError, match=match):
        jaxft.LoRA(**options)


def test_all_wrong_options_at_once():
    with pytest.raises(jaxft.MethodError) as caught:
        jaxft.LoRA(r=0, alpha="x", dropout=2, bias="b")
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"target_modules": ("q_prj",)},
            jaxft.SelectionError,
            r"target_modules='q_prj' matches no linear layer .* nearest: 'q_proj'",
        ),
        ({"target_modules": ("q_proj", "query")}, jaxft.SelectionError, "target_modules='query'"),
        ({"target_modules": ".*query"}, jaxft.SelectionError, r"target_modules='\.\*query'"),
        ({"target_modules": "(q"}, jaxft.MethodError, "is not a regular expression"),
        ({"target_modules": ("norm",)}, jaxft.SelectionError, "matches no linear layer or embedding"),
        ({"exclude_modules": ("quux",)}, jaxft.SelectionError, "exclude_modules='quux' matches no module"),
        ({"exclude_modules": ("q_proj", "v_proj")}, jaxft.SelectionError, "leaves no module to adapt"),
        ({"layers": (7,), "target_modules": ("q_proj",)}, jaxft.SelectionError, "leaves no module to adapt"),
        ({"layers": (0, 7), "target_modules": ("q_proj",)}, jaxft.SelectionError, r"layers \[7\] hold no target"),
        (
            {"rank_pattern": {"k_proj": 2}},
            jaxft.SelectionError,
            "rank_pattern key 'k_proj' matches no module that is adapted",
        ),
        ({"alpha_pattern": {"o_prj": 2}}, jaxft.SelectionError, "alpha_pattern key 'o_prj'"),
        ({"modules_to_save": ("scores",)}, jaxft.SelectionError, "modules_to_save='scores' matches no module"),
        (
            {"r": 17},
            jaxft.MethodError,
            "rank 17 for model.layers.self_attn.v_proj, whose kernel is 32 x 16: at most 16",
        ),
        ({"bias": "lora_only"}, jaxft.MethodError, "no module that it means has a bias"),
    ],
)
def test_selections_that_do_not_fit(options, error, match):
    model = tiny_llama()
    before = jaxft.leaves(model)
    with pytest.raises(error, match=match):
        jaxft.attach(model, jaxft.LoRA(**options))
    assert {path: id(v) for path, v in jaxft.leaves(model).items()} == {path: id(v) for path, v in before.items()}


def test_every_match_is_logged(caplog):
    with caplog.at_level("INFO", logger="jaxft"):
        jaxft.attach(tiny_llama(), jaxft.LoRA(r=2))
    assert re.search(r"model\.layers\.self_attn\.q_proj - LoRA 'default'", caplog.text)
    assert len(caplog.records) == 2
