"""A step on eight devices is a step on one: losses, gradients, bytes, and what the program sends around."""

import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.losses import chunked, next_token_loss
from jaxft.models.hub import fresh_model
from jaxft.parallel.rules import rows_sharding
from jaxft.testing import tiny_gpt2, tiny_llama

MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}
MODELS = {
    "llama": tiny_llama(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=8, intermediate_size=48),
    "gpt2": tiny_gpt2(n_head=4),
}
METHODS = {
    "full": jaxft.Full(),
    "bitfit": jaxft.BitFit(),
    "lora": jaxft.LoRA(r=2, target_modules="all-linear", dropout=0.1),
    "lora, layers and ranks": jaxft.LoRA(
        r=4, rank_pattern={"up_proj": 2}, layers=[1], target_modules=("q_proj", "up_proj")
    ),
    "lora, biases and head": jaxft.LoRA(r=2, modules_to_save=("lm_head",)),
    "lora | bitfit": jaxft.LoRA(r=2) | jaxft.BitFit(create=True),
}
CASES = [("llama", method, mesh) for method in METHODS if method != "bitfit" for mesh in MESHES]  # it has no bias
CASES += [("gpt2", method, mesh) for method, mesh in (("full", "mixed"), ("bitfit", "tensor"), ("bitfit", "fsdp"))]
CASES += [("gpt2", "lora", "mixed")]
RATE = 0.1
TX = optax.sgd(RATE)


def batch():
    """Sixteen rows whose trained tokens are spread unevenly: two of eight devices have none."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (16, 12)).astype(np.int32)
    labels = ids.copy()
    labels[:4] = -100
    labels[4, :10] = -100
    mask = np.ones_like(ids)
    mask[5, 6:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@cache
def alone(model, method):
    """Losses, gradients and parameters of one device, made once for a method."""
    return run(MODELS[model], METHODS[method])


@cache
def split_over(model, mesh):
    return fresh_model(MODELS[model].config.replace(mesh=jaxft.make_mesh(**MESHES[mesh])))


def run(model, method, accumulate=1):
    """Losses and parameters of three steps; of the first also the gradient, which is what SGD takes off."""
    state = jaxft.TrainState.create(model, method, TX, seed=3)
    step = jaxft.make_train_step(next_token_loss, accumulate=accumulate)
    losses, params = [], [host(state)]
    for _ in range(3):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
        params.append(host(state))
    assert step.program(state)._cache_size() == 1
    return np.array(losses), {path: (x - params[1][path]) / RATE for path, x in params[0].items()}, params[-1]


def host(state):
    return {path: np.array(x) for path, x in jaxft.leaves(state.trainable).items()}


@pytest.mark.parametrize(("model", "method", "mesh"), CASES)
def test_eight_devices_are_one(model, method, mesh):
    """With dropout too: its masks do not depend on the mesh. Parameters under SGD alone, since Adam blows up noise."""
    losses, grads, params = alone(model, method)
    got_losses, got_grads, got_params = run(split_over(model, mesh), METHODS[method])
    np.testing.assert_allclose(got_losses, losses, atol=1e-5)
    assert len(np.unique(losses)) == 3
    for want, got in ((grads, got_grads), (params, got_params)):
        assert want.keys() == got.keys()
        for path, value in want.items():
            np.testing.assert_allclose(got[path], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=path)


def test_these_are_all_methods():
    # the others are put on a mesh in tests/methods: test_bottleneck.py, test_virtual.py, test_lowrank.py
    elsewhere = {jaxft.Adapter, jaxft.PrefixTuning, jaxft.PromptTuning, jaxft.PTuning, jaxft.PTuningV2, jaxft.IA3}
    here = {type(part) for m in METHODS.values() for part in getattr(m, "parts", (m,))}
    assert here | elsewhere == set(jaxft.methods.METHODS.values())
    assert len(CASES) == 24


@pytest.mark.parametrize("method", ["full", "lora"])
def test_chunks_of_the_loss_on_a_mesh(method, monkeypatch):
    """The logits of six chunks of two positions; a trained head takes them as one."""
    monkeypatch.setitem(chunked.LOGITS, "cpu", 2 * 16 * 64 // 8)
    losses, _, params = run(split_over("llama", "fsdp"), METHODS[method])
    np.testing.assert_allclose(losses, alone("llama", method)[0], atol=1e-5)
    for path, value in alone("llama", method)[2].items():
        np.testing.assert_allclose(params[path], value, atol=1e-5, err_msg=path)


def test_micro_batches_on_a_mesh():
    split = split_over("llama", "mixed")
    whole, parts = run(split, METHODS["lora | bitfit"]), run(split, METHODS["lora | bitfit"], accumulate=4)
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "matrices"), [("full", 9 * 3), ("lora", 9 + 14 * 3), ("lora, biases and head", 9 + 5 * 3)]
)
def test_each_device_holds_its_share(method, matrices):
    """Of parameters and of the optimiser's moments: an eighth of every matrix, vectors and gates whole."""
    split = split_over("llama", "fsdp")
    state = jaxft.TrainState.create(split, METHODS[method], optax.adamw(1e-3))
    step = jaxft.make_train_step(next_token_loss)
    state, _ = step(state, batch())
    seen = 0
    for path, x in {**jaxft.leaves(state.model), **moments(state)}.items():
        held = x.addressable_shards[0].data.nbytes / x.nbytes
        whole = path.endswith(("scale", "bias", "gate", "adapter_weights"))
        assert held == (1 if whole else 1 / 8), f"{path} {x.shape}: a device holds {held}"
        seen += not whole
    assert seen == matrices


def moments(state):
    return {f"{name} {path}": x for name in ("mu", "nu") for path, x in getattr(state.opt_state[0], name).items()}


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-3, weight_decay=0.1, mask=jaxft.decay_mask),
        optax.adafactor(1e-3, min_dim_size_to_factor=4),
        optax.lion(1e-3),
        optax.masked(optax.adam(1e-3), lambda params: dict.fromkeys(params, True)),
        optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(1e-3)),
    ],
    ids=["adamw", "adafactor", "lion", "masked", "multi_steps", "injected", "muon"],
)
def test_any_optimiser_lies_beside_its_parameters(tx):
    state = jaxft.TrainState.create(split_over("llama", "fsdp"), METHODS["full"], tx)
    params = {path: (x.shape, x.sharding) for path, x in jaxft.leaves(state.trainable).items()}
    beside = 0
    for keys, x in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        path = next((k.key for k in keys if getattr(k, "key", None) in params), None)
        if path is not None and x.shape == params[path][0]:
            assert x.sharding == params[path][1], keys
            beside += 1
        else:
            assert x.sharding.is_fully_replicated, keys
    assert beside >= 3
    state, metrics = jaxft.make_train_step(next_token_loss)(state, batch())
    assert int(metrics["skipped"]) == 0


def compiled(mesh, method, **raw):
    config = tiny_llama(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=8, intermediate_size=96, **raw
    ).config
    mesh = jaxft.make_mesh(**MESHES[mesh])
    state = jaxft.TrainState.create(fresh_model(config.replace(mesh=mesh)), METHODS[method], optax.adamw(1e-3))
    ids = jax.ShapeDtypeStruct((16, 48), jnp.int32, sharding=rows_sharding(mesh))
    step = jaxft.make_train_step(next_token_loss).trace(state, {"input_ids": ids, "labels": ids}).lower().compile()
    return state, step


def sent(text):
    """What the collectives of a compiled program bring: `{kind: Counter of shapes}`."""
    found = {}
    for result, kind in re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text
    ):
        found.setdefault(kind, Counter()).update(re.findall(r"\w+\[[\d,]*\]", result))
    return found


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fsdp_gathers_kernels_and_never_sends_activations(method):
    """Sharded weights alone are not FSDP: left alone, XLA would split the activations and add them up."""
    state, step = compiled("fsdp", method, remat="full")
    brought = sent(step.as_text())
    parts = brought.pop("all-to-all")  # of the embedded vectors, which are looked up in parts
    assert set(parts) <= {"f32[1,2,48,8]", "f32[2,48,1,8]"}
    assert set(brought) <= {"all-gather", "all-reduce", "reduce-scatter"}
    kernels = {"f32[64,64]", "f32[64,96]", "f32[96,64]"}
    assert kernels <= set(brought["all-gather"])
    rows, width = 16 // 8, 48
    activations = [
        shape for shapes in brought.values() for shape in shapes if re.search(rf"f32\[({rows}|16),{width}", shape)
    ]
    assert activations == []
    layers = [x for path, x in jaxft.leaves(state.frozen).items() if ".layers." in path and path.endswith("kernel")]
    stacks = {f"f32[{','.join(map(str, x.shape))}]" for x in layers}
    assert not stacks & set(brought["all-gather"])  # one layer at a time, never the stack


def test_tensor_adds_activations_within_a_layer():
    _, step = compiled("tensor", "lora")
    brought = sent(step.as_text())
    assert set(brought) == {"all-reduce"}
    assert any(shape.startswith("f32[8,48,64]") for shape in brought["all-reduce"])


def test_data_adds_gradients_alone():
    state, step = compiled("data", "lora")
    brought = sent(step.as_text())
    assert set(brought) == {"all-reduce"}
    sizes = [int(np.prod([int(n) for n in shape[4:-1].split(",") if n])) for shape in brought["all-reduce"]]
    assert max(sizes) <= max(x.size for x in jaxft.leaves(state.trainable).values())


def test_rows_that_do_not_divide_are_refused():
    split = split_over("llama", "mixed")
    state = jaxft.TrainState.create(split, jaxft.LoRA(r=2), TX)
    six = {name: x[:6] for name, x in batch().items()}
    with pytest.raises(jaxft.BatchError, match="6 rows do not divide over 4 devices"):
        jaxft.make_train_step(next_token_loss)(state, six)
    twelve = {name: x[:12] for name, x in batch().items()}
    with pytest.raises(jaxft.BatchError, match="6 rows of a micro-batch do not divide over 4 devices"):
        jaxft.make_train_step(next_token_loss, accumulate=2)(state, twelve)
