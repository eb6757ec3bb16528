"""Bottleneck adapters: the laws, what each kind computes, counts, bad options, what cannot be."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from loops import loop

import jaxft
from jaxft.models.hub import abstract_model
from jaxft.models.layers import Join
from jaxft.models.placement import shardings
from jaxft.models.seams import Context
from jaxft.testing import check_method, tiny_gpt2, tiny_llama, tiny_model, token_batch
from jaxft.testing.laws import TX, gradients

IDS = token_batch()["input_ids"]
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def bottleneck(r, sites=2, learned=0, width=32):
    """Down and up with their biases, in each layer and place."""
    return sites * (2 * width * r + r + width + learned)


LAWS = {
    "llama-pfeiffer": ("llama", {}, bottleneck(2)),
    "llama-houlsby-layer": ("llama", {"kind": "houlsby", "layers": 1, "size": 3}, bottleneck(3)),
    "llama-parallel": ("llama", {"kind": "parallel", "parallel_input": "normed"}, bottleneck(16)),
    "gpt2-pfeiffer-learned": ("gpt2", {"scale": "learned", "size": 4, "layers": [1]}, bottleneck(4, 1, 1)),
    "gpt2-houlsby": ("gpt2", {"kind": "houlsby", "non_linearity": "gelu"}, bottleneck(2, 4)),
    "gpt2-parallel": ("gpt2", {"kind": "parallel", "scale": "learned"}, bottleneck(16, 2, 1)),
}


def test_the_sweep():
    assert len(LAWS) == 6 and {o.get("kind", "pfeiffer") for _, o, _ in LAWS.values()} == {
        *("pfeiffer", "houlsby", "parallel")
    }


@pytest.mark.parametrize(("family", "options", "count"), LAWS.values(), ids=LAWS)
def test_laws(family, options, count):
    check_method(jaxft.Adapter(**options), MODELS[family](), count=count)


def test_the_init_of_the_reference_is_not_the_base():
    law = jaxft.testing.LAWS["step_0"]
    law(jaxft.Adapter(init="bert"), tiny_llama(), token_batch(), jaxft.losses.next_token_loss, identity=False)
    hung = jaxft.attach(tiny_llama(), jaxft.Adapter(init="bert", size=32)).model.layers.output_adapters.join["default"]
    for m in (hung.down, hung.up):
        assert abs(float(m.kernel.get_value().std()) - 0.02) < 1e-3 and not m.bias.get_value().any()


def moved(model, by=0.1):
    """The model with every leaf of its adapters moved away from its initial value."""
    for path, variable in jaxft.models.names.variables(model).items():
        if ".join." in path:
            value = variable.get_value()
            variable.set_value(value + by * jnp.sin(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape))
    return model


def attached(method, model=None, **more):
    return moved(jaxft.attach(tiny_llama() if model is None else model, method, **more))


def test_remat_jit_and_loop_agree(monkeypatch):
    """Law 8: remat and none the same gradients; jit and no jit, scan and the layers one by one the same logits."""
    method = jaxft.Adapter(kind="houlsby", layers=1, scale="learned")
    batch, loss = token_batch(), jaxft.losses.next_token_loss
    state, rematted = (
        jaxft.TrainState.create(moved(jaxft.attach(tiny_llama(remat=remat), method)), method, TX)
        for remat in ("none", "full")
    )
    want, got = gradients(state, batch, loss), gradients(rematted, batch, loss)
    assert got.keys() == want.keys() and len(want) == 10
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=1e-5, rtol=1e-4, err_msg=path)

    model = state.model
    logits = model(IDS)
    np.testing.assert_allclose(model.head(model.hidden(IDS)), logits, atol=1e-5)
    monkeypatch.setattr(jax.lax, "scan", loop)
    np.testing.assert_allclose(jax.jit(lambda m: m.head(m.hidden(IDS)))(model), logits, atol=1e-5)


class Norm(nnx.Module):
    """A norm whose effect shows: it doubles."""

    def __call__(self, x, ctx):
        return 2 * x


@pytest.mark.parametrize("norm", [None, Norm()], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, lambda x, h, n, norm: norm(h + x)),
        ({"kind": "houlsby"}, lambda x, h, n, norm: h),
        ({"kind": "parallel"}, lambda x, h, n, norm: x),
        ({"kind": "parallel", "parallel_input": "normed", "scale": 0.5}, lambda x, h, n, norm: n),
    ],
    ids=["pfeiffer", "houlsby", "parallel", "parallel-normed"],
)
def test_each_kind_reads_its_own_and_adds_to_the_stream(options, reads, norm):
    class One(nnx.Module):
        def __init__(self):
            self.attention_adapters, self.output_adapters = Join("attention", 8), Join("output", 8)

    x, h, n = jax.random.normal(jax.random.key(0), (3, 2, 5, 8))
    method = jaxft.Adapter(size=3, non_linearity="relu", **options)
    model = attached(method, One())
    ctx = Context(weights=jnp.array([0.5]), names=("default",))
    got = model.output_adapters(x, h, n, ctx, norm)
    hung = model.output_adapters.join["default"]
    u = reads(x, h, n, (lambda v: v) if norm is None else lambda v: 2 * v)
    (a, c), (b, d) = ((m.kernel.get_value(), m.bias.get_value()[None, None]) for m in (hung.down, hung.up))
    want = x + h + 0.5 * method.scale * (jax.nn.relu(u @ a + c) @ b + d)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(One().output_adapters(x, h, n, ctx, norm), x + h)
    two = jaxft.attach(model, method, name="b")
    at_zero = model.output_adapters(x, h, n, ctx.replace(weights=jnp.zeros(1)), norm)
    np.testing.assert_array_equal(at_zero, x + h)
    both = two.output_adapters(x, h, n, Context(weights=jnp.array([0.5, 1.0]), names=("default", "b")), norm)
    np.testing.assert_allclose(both, got, atol=1e-6)  # the second is the identity still


@pytest.mark.parametrize(
    ("kind", "make", "places"),
    [
        ("pfeiffer", tiny_llama, {"output"}),
        ("parallel", tiny_gpt2, {"output"}),
        ("houlsby", tiny_gpt2, {"attention", "output"}),
        ("houlsby", lambda: tiny_model("gemma3_text"), {"attention", "output"}),
    ],
)
def test_where_they_hang(kind, make, places):
    trainable, _ = jaxft.partition(make(), jaxft.Adapter(kind=kind))
    found = {re.search(r"(\w+)_adapters\.join\.default\.", path)[1] for path in jaxft.leaves(trainable)}
    assert found == places


def test_the_tree_and_the_base():
    model = tiny_llama()
    trainable, _ = jaxft.partition(model, jaxft.Adapter(size=3, scale="learned", layers=(1,)))
    place = "model.layers.output_adapters.join.default"
    assert {path: v.shape for path, v in jaxft.leaves(trainable).items()} == {
        f"{place}.down.bias": (1, 3),
        f"{place}.down.kernel": (1, 32, 3),
        f"{place}.scale": (1, 1),
        f"{place}.up.bias": (1, 32),
        f"{place}.up.kernel": (1, 3, 32),
    }
    assert jaxft.decay_mask(jaxft.leaves(trainable)) == {
        path: path.endswith("kernel") for path in jaxft.leaves(trainable)
    }
    base, whole = jaxft.leaves(model), jaxft.leaves(jaxft.attach(model, jaxft.Adapter(kind="houlsby")))
    assert all(whole[path] is value for path, value in base.items())


def test_a_layer_outside_the_selection_stays_the_base():
    layer = attached(jaxft.Adapter(layers=(1,)))
    layers = layer.model.layers
    hidden = jax.random.normal(jax.random.key(0), (1, 3, 32))
    held = jaxft.models.stack.spread(layers, 2).output_adapters
    ctx = Context(weights=jnp.ones(1), names=("default",))
    first, second = (jax.tree.map(lambda a, i=i: a[i], held)(hidden, hidden, hidden, ctx) for i in (0, 1))
    np.testing.assert_array_equal(first, 2 * hidden)
    assert np.abs(second - 2 * hidden).max() > 1e-2


def test_widths():
    assert [jaxft.Adapter(kind=kind).width(32) for kind in ("pfeiffer", "houlsby", "parallel")] == [2, 2, 16]
    assert jaxft.Adapter(reduction_factor=4.5).width(32) == 7 and jaxft.Adapter().width(8) == 1
    share = jaxft.parameter_report(tiny_llama(hidden_size=8, head_dim=2), jaxft.Adapter()).percent
    assert 0 < share < 25


def test_rows_with_adapters_of_their_own():
    model = attached(
        jaxft.Adapter(kind="parallel", size=2), attached(jaxft.Adapter(kind="houlsby"), name="a"), name="b"
    )
    rows = jaxft.set_adapter(model, [[1, 0], [0, 1], [0, 0]])(IDS)
    for row, weights in enumerate(("a", "b", None)):
        np.testing.assert_allclose(rows[row], jaxft.set_adapter(model, weights)(IDS)[row], atol=1e-5)
    assert np.abs(rows[1] - rows[2]).max() > 1e-2
    np.testing.assert_array_equal(jaxft.set_adapter(model, None)(IDS), tiny_llama()(IDS))


def test_dropout_is_on_what_is_added_and_only_with_a_key():
    model = attached(jaxft.Adapter(dropout=0.5))
    a, b = model(IDS, key=jax.random.key(0)), model(IDS, key=jax.random.key(1))
    assert (model(IDS) != a).any() and (a != b).any()
    np.testing.assert_array_equal(model(IDS), attached(jaxft.Adapter())(IDS))


def test_greedy_with_a_cache_is_the_likeliest_token_each_time():
    model = attached(jaxft.Adapter(kind="houlsby"), tiny_llama(seed=1))
    prompts, text = [[5, 6, 7, 8], [12]], [[5, 6, 7, 8], [12]]
    for row in text:
        for _ in range(5):
            row.append(int(model(jnp.array([row + [0] * (12 - len(row))]))[0, len(row) - 1].argmax()))
    got = jaxft.generate_ids(model, prompts, max_new_tokens=5)
    assert got == [row[len(prompt) :] for row, prompt in zip(text, prompts, strict=True)]
    assert got != jaxft.generate_ids(tiny_llama(seed=1), prompts, max_new_tokens=5)


def test_float32_over_a_bfloat16_base():
    state = jaxft.TrainState.create(tiny_llama(dtype=jnp.bfloat16), jaxft.Adapter(scale="learned"), optax.adam(1e-2))
    assert {v.dtype for v in jaxft.leaves(state.trainable).values()} == {jnp.dtype(jnp.float32)}
    assert state.model(IDS).dtype == jnp.bfloat16


def test_split_over_a_mesh_and_gathered_for_a_step():
    mesh = jaxft.make_mesh(data=2, fsdp=2, tensor=2)
    shapes = abstract_model(tiny_llama().config.replace(mesh=mesh))
    model = jaxft.attach(shapes, jaxft.Adapter(size=3, scale="learned"))
    stored, at_work = ({p.rsplit("default.")[-1]: tuple(s.spec) for p, s in f.items() if ".join." in p} for f in (
        shardings(model), shardings(model, at_work=True)
    ))  # fmt: skip
    vectors = {"down.bias": (), "up.bias": (), "scale": ()}
    assert stored == {"down.kernel": (None, "fsdp"), "up.kernel": (None, None, "fsdp"), **vectors}
    assert at_work == {"down.kernel": (), "up.kernel": (), **vectors}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "compacter"}, "kind='compacter': choose one of 'pfeiffer', 'houlsby', 'parallel'"),
        ({"init": "xavier"}, "init='xavier': choose one of 'default', 'bert'"),
        ({"non_linearity": "swis"}, "non_linearity='swis': nearest: .*'swish'"),
        ({"non_linearity": "tanhh2"}, "non_linearity='tanhh2': .*'relu'"),
        ({"reduction_factor": 0.5}, "reduction_factor=0.5: give a number of at least 1"),
        ({"reduction_factor": "16"}, "reduction_factor='16'"),
        ({"reduction_factor": float("nan")}, "reduction_factor=nan"),
        ({"size": 0}, "size=0: give a whole number of at least 1"),
        ({"size": 2.0}, "size=2.0"),
        ({"size": 4, "reduction_factor": 2}, "size=4 with reduction_factor=2: give one of them"),
        ({"scale": "channel"}, "scale='channel': give a finite number, or 'learned'"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"parallel_input": "normed"}, "parallel_input='normed' is for kind='parallel', this is 'pfeiffer'"),
        ({"parallel_input": "x", "kind": "parallel"}, "parallel_input='x': choose one of"),
        ({"dropout": 1}, "dropout=1: give a rate of at least 0 and below 1"),
        ({"layers": ()}, "layers=\\(\\): give indices"),
        ({"layers": [0.5]}, "layers=\\(0.5,\\): give indices"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(jaxft.MethodError, match=match):
        jaxft.Adapter(**options)


def test_all_wrong_options_at_once():
    with pytest.raises(jaxft.MethodError) as caught:
        jaxft.Adapter(kind="x", size=-1, scale="y", dropout=2, init="z")
    assert len(str(caught.value).splitlines()) == 6


class Plain(nnx.Module):
    """A person's own model without the seam."""

    def __init__(self, join=None):
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        if join is not None:
            self.join_here = join


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (
            tiny_llama,
            {"size": 33},
            jaxft.MethodError,
            "size=33 for model.layers.output_adapters, where the model is 32",
        ),
        (tiny_llama, {"layers": (0, 2)}, jaxft.SelectionError, r"layers \[2\] have no join; there are \[0, 1\]"),
        (Plain, {}, jaxft.MethodError, "the seam `join`, and this Plain has none for the output of its feed-forward"),
        (
            lambda: Plain(Join("output", 4)),
            {"kind": "houlsby"},
            jaxft.MethodError,
            "has none for the output of its att",
        ),
    ],
)
def test_models_that_it_does_not_fit(model, options, error, match):
    model = model()
    before = {path: id(v) for path, v in jaxft.leaves(model).items()}
    with pytest.raises(error, match=match):
        jaxft.attach(model, jaxft.Adapter(**options))
    assert {path: id(v) for path, v in jaxft.leaves(model).items()} == before


def test_unions_add_up_or_are_refused():
    union = jaxft.Adapter(kind="parallel", size=4) | jaxft.LoRA(r=2)
    assert jaxft.parameter_report(tiny_llama(), union).trainable == bottleneck(4) + 448
    np.testing.assert_array_equal(jaxft.attach(tiny_llama(), union)(IDS), tiny_llama()(IDS))
    with pytest.raises(jaxft.MethodError, match=r"claim `join` of the same module \(Join\)"):
        jaxft.attach(tiny_llama(), jaxft.Adapter() | jaxft.Adapter(kind="parallel"))


def test_what_cannot_be_merged():
    model = attached(jaxft.Adapter(kind="houlsby"), jaxft.attach(tiny_llama(), jaxft.LoRA(r=2), name="a"), name="b")
    for undo in (jaxft.merge, jaxft.unmerge):
        with pytest.raises(jaxft.MethodError, match="not all can be folded") as caught:
            undo(model)
        assert str(caught.value).count("_adapters has the Bottleneck of 'b'") == 2
    assert jaxft.merge(jaxft.detach(model, "b"))(IDS).shape == (3, 12, 64)


def test_the_method_must_describe_the_adapter_that_is_there():
    model = attached(jaxft.Adapter(size=2))
    again = jaxft.TrainState.create(model, jaxft.Adapter(reduction_factor=16, dropout=0.1), optax.sgd(1.0))
    np.testing.assert_array_equal(again.model(IDS), model(IDS))
    for other, match in (
        (jaxft.Adapter(size=3), r"output_adapters.join.default.down.kernel is \(2, 32, 2\), the method makes"),
        (jaxft.Adapter(kind="parallel", size=2), "computes .*'pfeiffer', 'relu', 1.0.*, the method's .*'parallel'"),
        (jaxft.Adapter(size=2, scale=2.0), "computes .*1.0.*the method's .*2.0"),
        (jaxft.Adapter(size=2, non_linearity="gelu"), "the method's .*'gelu'"),
        (jaxft.Adapter(size=2, kind="houlsby"), "is only in one of the two"),
    ):
        with pytest.raises(jaxft.MethodError, match=match):
            jaxft.TrainState.create(model, other, optax.sgd(1.0))


def test_every_place_is_logged(caplog):
    with caplog.at_level("INFO", logger="jaxft"):
        jaxft.attach(tiny_llama(), jaxft.Adapter(kind="houlsby", layers=1))
    assert len(caplog.records) == 2
    assert "model.layers.attention_adapters - Adapter 'default' (houlsby), size 2" in caplog.text
