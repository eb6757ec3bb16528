"""From a model to its quantised one: what changes and what does not, what a step keeps, merging, meshes, refusals."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxft
from jaxft.models.hub import abstract_model
from jaxft.models.names import variables
from jaxft.quant import NF4, Int8, bits_report, dequantize, is_quantized, quantize, quantize_int8, quantize_nf4
from jaxft.testing import tiny_gpt2, tiny_llama, token_batch
from jaxft.train.state import with_leaves

BIG = {"hidden_size": 64, "intermediate_size": 128}
KERNELS = {
    *(f"model.layers.self_attn.{name}_proj.kernel" for name in "qkvo"),
    *(f"model.layers.mlp.{name}_proj.kernel" for name in ("gate", "up", "down")),
}


def quantised_paths(model):
    return {path for path, v in variables(model).items() if is_quantized(v.get_value())}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_kernels_of_the_layers_change_and_nothing_else(kind):
    model = tiny_llama(**BIG)
    before = {path: np.array(v) for path, v in jaxft.leaves(model).items()}
    small = quantize(model, kind)
    assert quantised_paths(small) == KERNELS and not quantised_paths(model)
    one, other = variables(model), variables(small)
    assert list(one) == list(other)
    for path, v in one.items():
        meta = v.get_metadata()
        assert type(v) is type(other[path]) and meta == other[path].get_metadata()
        np.testing.assert_array_equal(v.get_value(), before[path])
        if path in KERNELS:
            assert other[path].get_value().shape == v.get_value().shape
            want = quantize_nf4(v.get_value(), transposed=True) if kind == "nf4" else quantize_int8(v.get_value())
            jax.tree.map(np.testing.assert_array_equal, other[path].get_value(), want)
        else:
            assert other[path].get_value() is v.get_value()


def test_a_layer_of_it_is_what_bitsandbytes_would_make_of_the_checkpoints_tensor():
    model = tiny_llama(**BIG)
    weight = model.model.layers.mlp.up_proj.kernel.get_value()[1].T  # (out, in), as on disk
    codes = quantize(model).model.layers.mlp.up_proj.kernel.get_value().codes[1]
    np.testing.assert_array_equal(codes, quantize_nf4(weight).codes)


def test_skip():
    model = tiny_llama()
    left = KERNELS - quantised_paths(quantize(model, skip=["down_proj", "*.self_attn.[qv]_proj"]))
    assert left == {f"model.layers.{name}_proj.kernel" for name in ("mlp.down", "self_attn.q", "self_attn.v")}
    assert KERNELS - quantised_paths(quantize(model, skip=["mlp.*"])) == {p for p in KERNELS if ".mlp." in p}
    with pytest.raises(jaxft.SelectionError, match="skip='dwn_proj' matches no linear layer.*nearest: 'down_proj'"):
        quantize(model, skip=["dwn_proj"])
    with pytest.raises(jaxft.SelectionError, match="no index"):
        quantize(model, skip=["layers.0.mlp.down_proj"])
    with pytest.raises(jaxft.SelectionError, match="leaves no kernel"):
        quantize(model, skip=["*"])
    with pytest.raises(jaxft.SelectionError, match="is one string"):
        quantize(model, skip="down_proj")


def test_refusals():
    model = tiny_llama()
    with pytest.raises(jaxft.MethodError, match="kind 'nf8'; nearest: 'nf4'"):
        quantize(model, "nf8")
    with pytest.raises(jaxft.MethodError, match="quantise first, then attach"):
        quantize(jaxft.attach(model, jaxft.LoRA(r=2)))
    with pytest.raises(jaxft.MethodError, match="(?s)quantised already.*model.layers.mlp.down_proj"):
        quantize(quantize(model))
    with pytest.raises(jaxft.MethodError, match="no linear layers in a stack"):
        quantize(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    with pytest.raises(jaxft.MethodError, match="state.model"):
        quantize(jaxft.TrainState.create(model, jaxft.LoRA(r=2), optax.sgd(0.1)))
    hurt = tiny_llama()
    kernel = hurt.model.layers.mlp.up_proj.kernel
    kernel.set_value(kernel.get_value().at[1, 2, 3].set(jnp.nan))
    with pytest.raises(jaxft.MethodError, match=r"(?s)up_proj.kernel: quantize_nf4: 1 of 3,072 values.*NaN"):
        quantize(hurt)
    with pytest.raises(jaxft.MethodError, match="jaxft.quant.dequantize"):
        jaxft.save_model(quantize(model), "nowhere")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_shapes_alone(kind):
    model = tiny_llama(**BIG, dtype="bfloat16")
    real, shapes = quantize(model, kind), quantize(abstract_model(model.config), kind)

    def form(tree):
        return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    assert form(real) == form(shapes) and bits_report(real) == bits_report(shapes)
    assert form(dequantize(real)) == form(dequantize(shapes)) == form(model)
    report = jaxft.parameter_report(shapes, jaxft.LoRA(r=2))
    assert (report.trainable, report.total) == (896, bits_report(real).total + 896)


def test_bits():
    report = bits_report(quantize(tiny_llama(**BIG, dtype="bfloat16"), "nf4", skip=["down_proj"]))
    kernels = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 * 128)
    rest = 2 * 64 * 64 + 5 * 64 + 2 * 64 * 128
    assert (report.quantized, report.total) == (kernels, kernels + rest)
    nested = sum(n * 4 for n in (1, 1, 1, 1, 1, 1)) * 2  # fewer than 256 scales in each
    assert report.quantized_bytes == kernels // 2 + kernels // 64 + nested + 4 * 2 * 6
    assert report.total_bytes == report.quantized_bytes + 2 * rest
    assert str(report).startswith(f"quantised params: {kernels:,} at 4.1")
    assert bits_report(tiny_llama()).quantized_bits == 0


def residuals(model, method):
    """Bytes of whole kernels in float that the gradient of a loss keeps, and of all that it keeps beside the model."""
    state = jaxft.TrainState.create(model, method, optax.sgd(0.1))
    batch = token_batch(64)

    def total(params):
        whole = jaxft.combine(with_leaves(state.trainable, params), state.frozen)
        return jaxft.losses.next_token_loss(whole, batch, key=jax.random.key(0))[0]

    kept = jax.tree.leaves(jax.vjp(total, jaxft.leaves(state.trainable))[1])
    given = {id(x) for x in jax.tree.leaves((state.trainable, state.frozen))}
    shapes = {v.get_value().shape for path, v in variables(model).items() if path in KERNELS}
    shapes |= {(s[0], s[2], s[1]) for s in shapes}
    weights = sum(x.nbytes for x in kept if x.shape in shapes and id(x) not in given)
    return weights, sum(x.nbytes for x in kept if id(x) not in given)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    "method",
    [
        jaxft.LoRA(r=2, target_modules="all-linear"),
        jaxft.LoRA(r=2, target_modules="all-linear", use_dora=True, dropout=0.1),
    ],
    ids=["lora", "dora"],
)
def test_no_dequantised_kernel_is_kept_for_the_backward_pass(kind, remat, method):
    model = quantize(tiny_llama(hidden_size=128, intermediate_size=192, remat=remat), kind)
    weights, kept = residuals(model, method)
    codes = bits_report(model).quantized_bytes
    _, plain = residuals(dequantize(model), method)
    assert weights == 0
    assert kept <= plain + codes  # activations, and at most the codes once more


def test_that_test_can_fail(monkeypatch):
    monkeypatch.setattr("jaxft.models.layers.product", lambda x, kernel: x @ kernel.dequantize(x.dtype))
    model = quantize(tiny_llama(hidden_size=128, intermediate_size=192))
    weights, _ = residuals(model, jaxft.LoRA(r=2, target_modules="all-linear"))
    assert weights >= 4 * 2 * (2 * 128 * 128 + 3 * 128 * 192)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_generation_is_that_of_the_dequantised_model(kind):
    model = quantize(tiny_llama(**BIG), kind)
    model = jaxft.attach(model, jaxft.LoRA(r=2, init="gaussian"))
    whole = jaxft.attach(dequantize(quantize(tiny_llama(**BIG), kind)), jaxft.LoRA(r=2, init="gaussian"))
    prompts = [[3, 4, 5], [7]]
    one, other = (jaxft.generate_ids(m, prompts, max_new_tokens=6) for m in (model, whole))
    assert one == other and all(len(ids) == 6 for ids in one)


def trained(model, method, steps=3):
    state = jaxft.TrainState.create(model, method, optax.adam(3e-2))
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    for _ in range(steps):
        state, metrics = step(state, token_batch(64))
    assert not metrics["skipped"]
    return state.model


MERGED = {
    "lora": jaxft.LoRA(r=4, target_modules="all-linear"),
    "dora": jaxft.LoRA(r=4, use_dora=True),
    "pissa": jaxft.LoRA(r=4, init="pissa"),
    "ia3": jaxft.IA3(),
}


@pytest.mark.parametrize("method", MERGED.values(), ids=MERGED)
def test_merging_into_what_it_was_trained_beside(method, caplog):
    base = tiny_llama(**BIG)
    model = trained(quantize(base), method)
    with caplog.at_level(logging.INFO, "jaxft"):
        merged = jaxft.merge(model)
    assert not quantised_paths(merged) and not jaxft.adapters(merged)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
    ids = token_batch(64)["input_ids"]
    np.testing.assert_allclose(merged(ids), model(ids), atol=1e-5)
    said = [r.getMessage() for r in caplog.records if "merged into the dequantised kernels" in r.getMessage()]
    assert len(said) == 1 and "rounding to float32" in said[0]
    # The known trap: beside the kernels that were quantised the adapter is another model.
    trap = jaxft.merge(jaxft.combine(*_onto(base, model)))
    assert float(jnp.abs(trap(ids) - model(ids)).max()) > 100 * float(jnp.abs(merged(ids) - model(ids)).max())


def _onto(base, model):
    """The two parts of a model with the kernels of another base."""
    name = next(iter(jaxft.adapters(model)))
    trainable, frozen = jaxft.partition(model, jaxft.adapters(model)[name])
    known = jaxft.leaves(base)
    return trainable, with_leaves(frozen, {path: known[path] for path in KERNELS})


def test_a_narrow_dtype_loses_what_is_said(caplog):
    model = trained(quantize(tiny_llama(**BIG, dtype="bfloat16")), MERGED["lora"])
    with caplog.at_level(logging.INFO, "jaxft"):
        merged = jaxft.merge(model)
    [said] = [r.getMessage() for r in caplog.records if "merged into" in r.getMessage()]
    share = float(said.split(" by ")[1].split(" ")[0])
    assert "rounding to bfloat16" in said and "kernel" in said
    before, after = jaxft.leaves(dequantize(model)), jaxft.leaves(merged)
    off = added = 0.0
    for path in KERNELS:
        module = path.rsplit(".", 1)[0]
        a, b = before[f"{module}.delta.default.a"], before[f"{module}.delta.default.b"]
        gate = before[f"{module}.delta.default.gate"]
        change = jnp.matmul(a * gate[:, None], b, precision="highest")
        lost = after[path].astype(jnp.float32) - before[path].astype(jnp.float32) - change
        added, off = added + float(jnp.mean(change**2)), off + float(jnp.mean(lost**2))
    assert share == pytest.approx((off / added) ** 0.5, rel=0.02) and share > 1e-3
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_four_bits_of_a_merged_model_are_refused():
    model = jaxft.attach(quantize(tiny_llama()), jaxft.LoRA(r=2))
    with pytest.raises(jaxft.MethodError, match=r"quantize='nf4'.*keep it beside.*jaxft.quant.quantize\(merged"):
        jaxft.merge(model, quantize="nf4")
    with pytest.raises(jaxft.MethodError, match="unmerge: this base is quantised"):
        jaxft.unmerge(model)
    assert isinstance(quantize(jaxft.merge(model)).model.layers.mlp.up_proj.kernel.get_value(), NF4)


def test_an_adapter_is_saved_and_loaded_beside_quantised_kernels(tmp_path):
    base = quantize(tiny_gpt2(n_embd=64), "int8")
    model = trained(base, jaxft.LoRA(r=2, use_dora=True))
    again = jaxft.load_adapter(base, jaxft.save_adapter(model, tmp_path / "adapter"))
    np.testing.assert_array_equal(again([[3, 4, 5]]), model([[3, 4, 5]]))
    assert isinstance(again.transformer.h.mlp.c_fc.kernel.get_value(), Int8)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["fsdp", "tensor"])
def test_eight_devices_are_one_with_quantised_kernels(kind, axes):
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    mesh, method, batch = jaxft.make_mesh(**axes), jaxft.LoRA(r=4, target_modules="all-linear"), token_batch(64, rows=8)
    plain = tiny_llama(**size)
    spread = jaxft.models.placement.place(_on(plain, mesh))
    small = quantize(spread, kind)
    leaf = small.model.layers.mlp.up_proj.kernel.get_value()
    shard = leaf.codes.addressable_shards[0].data
    assert shard.size * axes["fsdp"] * axes.get("tensor", 1) == leaf.codes.size
    again = jaxft.models.placement.place(small).model.layers.mlp.up_proj.kernel.get_value()
    assert all(one is other for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(again), strict=True))
    losses = []
    for model in (quantize(plain, kind), small):
        state = jaxft.TrainState.create(model, method, optax.sgd(0.1))
        step = jaxft.make_train_step(jaxft.losses.next_token_loss)
        state, first = step(state, batch)
        state, second = step(state, batch)
        losses.append((float(first["loss"]), float(second["loss"])))
    np.testing.assert_allclose(*losses, rtol=2e-5)


def _on(model, mesh):
    fresh = jax.tree.map(lambda x: x, model)
    for _, module in nnx.iter_modules(fresh):
        if hasattr(module, "config"):
            module.config = module.config.replace(mesh=mesh)
    return fresh
