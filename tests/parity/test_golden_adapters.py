"""Bottleneck adapters against what the adapters library computed and saved: no torch is needed here."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxft
from jaxft.interop.adapters import renamed
from jaxft.interop.entries import entries, fill_entries
from jaxft.models.attention import attend
from jaxft.models.layers import ACTIVATIONS, Join, LayerNorm, Linear
from jaxft.models.seams import Context
from jaxft.train.step import with_leaves

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = GOLDEN / "adapters"
KINDS = {"seq_bn": "pfeiffer", "double_seq_bn": "houlsby", "par_bn": "parallel", "scaled_par_bn": "parallel"}
CASES = sorted(f.parent.name for f in FOLDERS.glob("*/expected.safetensors"))
TOLERANCE = 1e-5  # of logits, absolute
RELATIVE = 1e-5  # of gradients, to the largest of their leaf


def batch():
    """The rows that the library saw: whole, padded right, padded left."""
    ids = np.random.default_rng(0).integers(3, 64, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:], mask[2, :4] = 0, 0
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}


def base(case):
    return jaxft.load(GOLDEN / case.partition("-")[0] / "base")[0]


def test_the_sweep_sees_every_case():
    assert sorted(f"{family}-{kind}" for family in ("gpt2", "llama") for kind in KINDS) == CASES


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case):
    """A folder of the library's loads, computes the same, and each of its leaves has the same gradient."""
    model, want = base(case), load_file(FOLDERS / case / "expected.safetensors")
    adapted = jaxft.load_adapter(model, FOLDERS / case)
    assert jaxft.adapters(adapted)["default"].kind == KINDS[case.partition("-")[2]]
    inputs = batch()
    real = np.asarray(inputs["attention_mask"])[..., None]
    assert np.abs((np.asarray(adapted(**inputs)) - want["logits"]) * real).max() < TOLERANCE
    assert np.abs((np.asarray(model(**inputs)) - want["logits"]) * real).max() > 0.1
    direction = jnp.cos(jnp.arange(want["logits"].size, dtype=jnp.float32)).reshape(want["logits"].shape) * real
    trainable, frozen = jaxft.partition(adapted, None)

    def product(leaves):
        return (jaxft.combine(with_leaves(trainable, leaves), frozen)(**inputs) * direction).sum()

    grads = jax.jit(jax.grad(product))(jaxft.leaves(trainable))
    name = json.loads((FOLDERS / case / "adapter_config.json").read_text())["name"]
    places = entries(jaxft.combine(with_leaves(trainable, grads), frozen), "default", lambda *_: False)
    got = {f"grad {key}": entry.read() for key, entry in renamed(places, name).items()}
    assert got.keys() == want.keys() - {"logits"}
    for key, gradient in got.items():
        assert np.abs(gradient - want[key]).max() <= RELATIVE * np.abs(want[key]).max(), key


@pytest.mark.parametrize("case", CASES)
def test_written_again(case, tmp_path):
    """The same tensors under the same names; every key of the config that says what is computed is the library's."""
    jaxft.save_adapter(jaxft.load_adapter(base(case), FOLDERS / case, name="here"), tmp_path, name="here")
    theirs, ours = (load_file(f / "adapter.safetensors") for f in (FOLDERS / case, tmp_path))
    config, was = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, FOLDERS / case))
    ours = {key.replace("adapters.here.", f"adapters.{was['name']}."): tensor for key, tensor in ours.items()}
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert config["name"] == "here" and config.keys() == was.keys()
    for key, value in config["config"].items():
        if not (key == "original_ln_before" and was["config"]["is_parallel"]):
            assert value == was["config"][key], key
    assert config["model_type"] == was["model_type"] and config["hidden_size"] == was["hidden_size"]


def test_a_head_beside_it(tmp_path):
    """The library writes a copy of the whole head unless told not to; one that is not the base's own is refused."""
    folder = shutil.copytree(FOLDERS / "with-head", tmp_path / "a")
    alone = jaxft.load_adapter(base("llama"), FOLDERS / "llama-scaled_par_bn")
    np.testing.assert_array_equal(jaxft.load_adapter(base("llama"), folder)(**batch()), alone(**batch()))
    with pytest.raises(
        jaxft.CheckpointError, match="has lm_head.weight, which is not the base's own; save the adapter"
    ):
        jaxft.load_adapter(jaxft.load(GOLDEN / "llama-biased" / "base")[0], folder)
    (folder / "model_head.safetensors").rename(folder / "pytorch_model_head.bin")
    with pytest.raises(jaxft.CheckpointError, match="a head in a pickle, which is not read; save the adapter without"):
        jaxft.load_adapter(base("llama"), folder)


class PostNorm(nnx.Module):
    """The layer of a BERT, one level of names flatter: each part is added to the stream, and the sum is normed."""

    def __init__(self):
        for name, i, o in (("query", 16, 16), ("key", 16, 16), ("value", 16, 16), ("mixed", 16, 16)):
            setattr(self, name, Linear(i, o, axes=("embed", "heads"), use_bias=True, rngs=nnx.Rngs(0)))
        self.wide = Linear(16, 24, axes=("embed", "mlp"), use_bias=True, rngs=nnx.Rngs(0))
        self.narrow = Linear(24, 16, axes=("mlp", "embed"), use_bias=True, rngs=nnx.Rngs(0))
        self.attention_norm, self.output_norm = LayerNorm(16, 1e-12), LayerNorm(16, 1e-12)
        self.attention_adapters, self.output_adapters = Join("attention", 16), Join("output", 16)

    def __call__(self, x, ctx):
        b, t, _ = x.shape
        q, k, v = (m(x, ctx).reshape(b, t, 2, 8).swapaxes(1, 2) for m in (self.query, self.key, self.value))
        heads = attend(q, k, v, jnp.ones((1, 1, t, t), bool), platform="cpu")
        y = self.mixed(heads.swapaxes(1, 2).reshape(b, t, -1), ctx)
        x = self.attention_norm(self.attention_adapters(x, y, x, ctx, self.attention_norm), ctx)
        y = self.narrow(ACTIVATIONS["gelu"](self.wide(x, ctx)), ctx)
        return self.output_norm(self.output_adapters(x, y, x, ctx, self.output_norm), ctx)


BERT = {
    **{f"attention.self.{name}": name for name in ("query", "key", "value")},
    **{"attention.output.dense": "mixed", "attention.output.LayerNorm": "attention_norm"},
    **{"intermediate.dense": "wide", "output.dense": "narrow", "output.LayerNorm": "output_norm"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_post_norm_block(kind):
    """BERT's layer: `LN(up(f(down LN(h + x))) + h + x)`, `LN(up(f(down h)) + h + x)`, `LN(h + s up(f(down x)) + x)`."""
    want = load_file(FOLDERS / "bert.safetensors")
    model = PostNorm()
    for theirs, ours in BERT.items():
        module = getattr(model, ours)
        if isinstance(module, LayerNorm):
            module.scale.set_value(jnp.asarray(want[f"{theirs}.weight"]))
        else:
            module.kernel.set_value(jnp.asarray(want[f"{theirs}.weight"].T))
        module.bias.set_value(jnp.asarray(want[f"{theirs}.bias"]))
    scale = "learned" if kind == "scaled_par_bn" else None
    model = jaxft.attach(model, jaxft.Adapter(kind=KINDS[kind], reduction_factor=4, scale=scale))
    places = renamed(entries(model, "default", lambda *_: False), kind)
    tensors = {
        key.replace("attention_adapters", "attention.output").replace("output_adapters", "output"): entry
        for key, entry in places.items()
    }
    theirs = {key.removeprefix(f"{kind} "): v for key, v in want.items() if key.startswith(f"{kind} ")}
    assert tensors.keys() == theirs.keys() - {"out"}
    fill_entries(tensors, theirs.__getitem__)
    ctx = Context(weights=model.adapter_weights.get_value(), names=("default",))
    assert np.abs(model(jnp.asarray(want["x"]), ctx) - theirs["out"]).max() < TOLERANCE
    off = model(jnp.asarray(want["x"]), ctx.replace(weights=jnp.zeros(1)))
    assert np.abs(off - theirs["out"]).max() > 0.05
