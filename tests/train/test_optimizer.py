"""Schedules as transformers has them, optimisers by name."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.errors import OptimizerError
from jaxft.train.optimizer import OPTIMIZERS, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0]),
        ("cosine", [0, 0.5, 1, (1 + 0.5**0.5) / 2, 0.5, 0]),
    ],
)
def test_schedules(kind, expected):
    """At steps 0, 1, 2, 4, 6, 10 of 10 with 2 of warm-up; the numbers are worked out by hand."""
    schedule = make_schedule(kind, 2e-4, steps=10, warmup_steps=2)
    found = [float(schedule(n)) / 2e-4 for n in (0, 1, 2, 4, 6, 10)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert float(make_schedule(kind, 2e-4, steps=10)(0)) == pytest.approx(2e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimiser_moves_downhill(name):
    tx = make_optimizer(name, 0.1, clip_norm=1.0)
    params = {"x.kernel": jnp.ones((4, 4))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert (updates["x.kernel"] < 0).all()


def test_decay_leaves_vectors_alone():
    tx = make_optimizer("adamw", 1.0, weight_decay=0.1)
    params = {"x.kernel": jnp.ones((2, 2)), "x.bias": jnp.ones(2)}
    zeros = {k: jnp.zeros_like(v) for k, v in params.items()}
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["x.kernel"], -0.1, rtol=1e-6)
    assert not updates["x.bias"].any()


def test_clipping_is_by_the_norm_of_all():
    tx = make_optimizer("sgd", 1.0, clip_norm=1.0)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-6)


def test_options_reach_the_optimiser():
    tx = make_optimizer("adam", 1.0, b1=0.5, b2=0.5, eps=1.0)
    ours, peer = (
        t.update({"a": jnp.ones(1)}, t.init({"a": jnp.ones(1)}))[0] for t in (tx, optax.adam(1.0, 0.5, 0.5, 1.0))
    )
    assert ours["a"] == peer["a"] != optax.adam(1.0).update({"a": jnp.ones(1)}, tx.init({"a": jnp.ones(1)}))[0]["a"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_schedule("cosin", 1.0, steps=9), "schedule 'cosin' is unknown; nearest: 'cosine'"),
        (lambda: make_schedule("linear", 1.0, steps=9, warmup_steps=9), "nothing would be left after the warm-up"),
        (lambda: make_optimizer("adamv", 1.0), "name 'adamv' is unknown; nearest: 'adam', 'adamw'"),
        (lambda: make_optimizer("adam", 1.0, weight_decay=0.1), "adam has no decoupled decay"),
        (lambda: make_optimizer("sgd", 1.0, b1=0.9), "b1=0.9: sgd has no such option"),
        (lambda: make_optimizer("lion", 1.0, eps=1e-8), "lion has no such option"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(OptimizerError, match=message):
        call()


def test_decay_mask_is_public():
    assert jaxft.decay_mask({"a.bias": 0}) == {"a.bias": False}
