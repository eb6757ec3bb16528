"""A person's own `nnx` model with `nnx.Linear` layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxft
from jaxft.testing.laws import LAWS


class Own(nnx.Module):
    """Two layers in a list, two more stacked, a norm, a head."""

    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.stack = nnx.split_rngs(splits=2)(nnx.vmap(lambda r: nnx.Linear(6, 6, rngs=r)))(rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = x + jnp.tanh(block(x))
        x, _ = jax.lax.scan(lambda x, layer: (x + jnp.tanh(layer(x)), None), x, self.stack)
        return self.head(self.norm(x))


def make():
    return jax.jit(lambda: Own(nnx.Rngs(0)))()


X = jax.random.normal(jax.random.key(0), (5, 6))
BATCH = {"x": X, "y": jnp.arange(5) % 3}


def loss(model, batch, *, key):
    del key
    values = optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])
    return values.sum(), jnp.float32(values.size), {}


METHODS = {
    "lora": jaxft.LoRA(r=2, alpha=4),
    "lora-some": jaxft.LoRA(r=1, target_modules=("blocks.1", "stack"), rank_pattern={"stack": 2}),
    "lora-saved": jaxft.LoRA(r=2, target_modules=("stack",), modules_to_save=("head",), bias="lora_only"),
    "bitfit": jaxft.BitFit(),
    "bitfit-create": jaxft.BitFit(create=True),
    "full": jaxft.Full(),
    "both": jaxft.LoRA(r=2) | jaxft.BitFit(),
}


def test_the_sweep():
    assert len(METHODS) == 7 and len(LAWS) == 9


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_laws_hold(method):
    jaxft.testing.check_method(method, make(), BATCH, loss=loss)


def test_paths_class_and_values_stay():
    model = make()
    attached = jaxft.attach(model, METHODS["lora"])
    assert isinstance(attached.head, nnx.Linear) and type(model.head) is nnx.Linear
    assert set(jaxft.leaves(model)) < set(jaxft.leaves(attached))
    np.testing.assert_array_equal(attached(X), model(X))
    assert jaxft.parameter_report(model, METHODS["lora"]).trainable == 2 * (4 * 12 + 9)


def test_switch_merge_and_take_out_again():
    state = jaxft.TrainState.create(make(), METHODS["lora-some"], optax.sgd(0.5))
    step = jaxft.make_train_step(loss)
    for _ in range(3):
        state, _ = step(state, BATCH)
    model = state.model
    assert np.abs(model(X) - make()(X)).max() > 1e-2
    np.testing.assert_array_equal(jaxft.set_adapter(model, None)(X), make()(X))
    rows = jaxft.set_adapter(model, [[1.0], [0.0], [1.0], [0.0], [1.0]])(X)
    np.testing.assert_allclose(rows[::2], model(X)[::2], atol=1e-6)
    np.testing.assert_allclose(rows[1::2], make()(X)[1::2], atol=1e-6)
    merged = jaxft.merge(model)
    np.testing.assert_allclose(merged(X), model(X), atol=1e-5)
    assert jax.tree.structure(merged) == jax.tree.structure(make())


def test_what_a_model_of_ones_own_cannot_have():
    cases = [
        (jaxft.LoRA(r=2, dropout=0.1), jaxft.MethodError, "is called without a dropout key: use dropout=0"),
        (jaxft.LoRA(r=2, modules_to_save=("norm",)), jaxft.MethodError, "norm is a LayerNorm of your own model"),
        (jaxft.LoRA(r=2, target_modules=("q_proj",)), jaxft.SelectionError, "matches no linear layer"),
        (jaxft.LoRA(r=4), jaxft.MethodError, "rank 4 for head, whose kernel is 6 x 3"),
    ]
    for method, error, match in cases:
        with pytest.raises(error, match=match):
            jaxft.attach(make(), method)


def test_a_model_without_linear_layers():
    with pytest.raises(jaxft.MethodError, match=r"this LayerNorm has no linear layer \(nnx.Linear\) to adapt"):
        jaxft.attach(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), jaxft.LoRA())


def test_one_thing_in_two_places():
    model = make()
    model.blocks[1].kernel = model.blocks[0].kernel
    with pytest.raises(jaxft.MethodError, match="holds one thing in two places"):
        jaxft.attach(model, jaxft.LoRA(r=2))


def test_adapters_in_different_layers_keep_their_weights():
    """A layer that gets its seams later knows of the adapters before it."""

    def moved(model, name):
        for path, variable in jaxft.models.names.variables(model).items():
            if f".{name}.b" in path:
                variable.set_value(variable.get_value() + 0.3)
        return model

    a, b = jaxft.LoRA(r=2, target_modules=("blocks.0",)), jaxft.LoRA(r=2, target_modules=("blocks.1",))
    first = moved(jaxft.attach(make(), a, name="a"), "a")
    both = moved(jaxft.attach(first, b, name="b"), "b")
    np.testing.assert_allclose(jaxft.set_adapter(both, "a")(X), first(X), atol=1e-6)
    np.testing.assert_allclose(jaxft.detach(both, "b")(X), first(X), atol=1e-6)
    only_b = jaxft.detach(both, "a")
    np.testing.assert_allclose(jaxft.set_adapter(both, "b")(X), only_b(X), atol=1e-6)
    assert np.abs(only_b(X) - first(X)).max() > 1e-3


def test_copies_cannot_differ_by_row():
    model = jaxft.attach(make(), METHODS["lora-saved"])
    with pytest.raises(jaxft.MethodError, match="cannot differ by row in a model of your own"):
        jaxft.set_adapter(model, [[1.0]] * 5)(X)


def test_an_attribute_called_depth_is_no_stack():
    model = make()
    model.depth = 2
    attached = jaxft.attach(model, METHODS["lora"])
    np.testing.assert_array_equal(attached(X), make()(X))
