"""jaxft against what the PyTorch peers computed and saved: no torch is needed here."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import jaxft
from jaxft.interop.entries import entries
from jaxft.methods.matching import find

GOLDEN = Path(__file__).parent / "golden"
BASES = sorted(f.parent.name for f in GOLDEN.glob("*/base"))
CASES = [
    (f.parent.parent.name, f.parent.name)
    for f in sorted(GOLDEN.glob("*/*/adapter_config.json"))
    if f.parent.parent.name in BASES
]
TOLERANCE = 1e-5


def batch():
    """The rows that the peers saw: whole, padded right, padded left."""
    ids = np.random.default_rng(0).integers(3, 64, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:], mask[2, :4] = 0, 0
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}


def compare(model, want, tolerance=TOLERANCE):
    inputs = batch()
    got = np.asarray(model(**inputs))
    assert np.isfinite(got).all()
    real = np.asarray(inputs["attention_mask"])[..., None]
    assert np.abs((got - want) * real).max() < tolerance


def base(name):
    return jaxft.load(GOLDEN / name / "base")[0]


def expected(name):
    return load_file(GOLDEN / name / "expected.safetensors")


def test_the_sweep_sees_every_case():
    assert len(BASES) == 5 and len(CASES) == 21


@pytest.mark.parametrize("name", BASES)
def test_base(name):
    compare(base(name), expected(name)["base"])


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_adapter(name, adapter):
    """What peft wrote loads, computes the same, merges to the same, and is written again as it was."""
    model = jaxft.load_adapter(base(name), GOLDEN / name / adapter)
    want = expected(name)
    assert np.abs(want[adapter] - want["base"]).max() > 1e-2
    compare(model, want[adapter])
    compare(jaxft.merge(model), want[adapter])
    compare(jaxft.set_adapter(model, None), want["base"])


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_written_again(name, adapter, tmp_path):
    model = jaxft.load_adapter(base(name), GOLDEN / name / adapter)
    jaxft.save_adapter(model, tmp_path)
    theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (GOLDEN / name / adapter, tmp_path))
    copies = {key for key in theirs if key.endswith("base_layer.weight")}  # peft repeats an adapted head
    assert set(ours) == set(theirs) - copies
    for key in ours:
        assert np.array_equal(ours[key], theirs[key]), key
    config, was = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, GOLDEN / name / adapter))
    for key in (
        "r",
        "lora_alpha",
        "bias",
        "use_rslora",
        "fan_in_fan_out",
        "task_type",
        "rank_pattern",
        "alpha_pattern",
    ):
        assert config[key] == was[key], key
    assert set(config) <= set(was)


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_ranks_and_scales(name, adapter):
    """Patterns, regular expressions, layers and exclusions mean per module what they mean in peft."""
    model = jaxft.load_adapter(base(name), GOLDEN / name / adapter)
    method = jaxft.adapters(model)["default"]
    want = json.loads((GOLDEN / name / "ranks.json").read_text())[adapter]
    got = {module: list(method.scale(module)) for target in method.targets(model) for module in target.names}
    assert got.keys() == want.keys()
    for module, (rank, scale) in want.items():
        assert got[module][0] == rank and abs(got[module][1] - scale) < 1e-12, module
    shapes = {k: e.shape for k, e in entries(model, "default", lambda *_: False).items() if "lora_A" in k}
    assert {k.split("base_model.model.")[1].split(".lora_A")[0]: s[0] for k, s in shapes.items()} == {
        module: rank for module, (rank, _) in want.items()
    }
    assert find(model, lambda name: name in want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_weights(name, tmp_path):
    model = jaxft.merge(jaxft.load_adapter(base(name), GOLDEN / name / "all"))
    jaxft.save_model(model, tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    want = {k.removeprefix("merged "): v for k, v in expected(name).items() if k.startswith("merged ")}
    assert len(want) > 8
    for key, value in want.items():
        np.testing.assert_allclose(ours[key], value, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_taken_out_again(name):
    start = base(name)
    merged = jaxft.merge(jaxft.load_adapter(start, GOLDEN / name / "all"))
    again = jaxft.unmerge(jaxft.load_adapter(merged, GOLDEN / name / "all"))
    was, now = jaxft.leaves(start), jaxft.leaves(again)
    for path, value in was.items():
        np.testing.assert_allclose(now[path], value, atol=1e-6, err_msg=path)


def test_several_adapters():
    folder, want = GOLDEN / "several", load_file(GOLDEN / "several" / "expected.safetensors")
    model = base("llama")
    for name in ("a", "bb"):
        model = jaxft.load_adapter(model, folder / name, name=name)
    compare(model, want["a"])  # the first that was loaded is active, the second waits
    for weights, key in (("bb", "bb"), ({"a": 1, "bb": 1}, "a+bb"), ("a", "a")):
        compare(jaxft.set_adapter(model, weights), want[key])
    compare(jaxft.set_adapter(model, [[0, 1], [0, 0], [1, 0]]), want["rows"])
    compare(jaxft.set_adapter(model, None), expected("llama")["base"])


def test_packs():
    """Best-fit decreasing, pack by pack and row by row as trl does it."""
    want = json.loads((GOLDEN / "packs.json").read_text())
    for limit, case in want.items():
        assert jaxft.data.pack(case["lengths"], int(limit)) == case["packs"]
    assert len(want) == 3


def test_bitfit_trains_the_names_that_hold_bias():
    """The selection by name and one SGD step, as the authors' code does them."""
    want = {k.removeprefix("bias step "): v for k, v in expected("gpt2").items() if k.startswith("bias step ")}
    state = jaxft.TrainState.create(base("gpt2"), jaxft.BitFit(), optax.sgd(0.1))
    inputs = batch()
    labels = jnp.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    labels = labels.at[2, 4].set(-100)  # a first token that transformers predicts from padding, and we do not
    state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, {**inputs, "labels": labels})
    places = entries(state.model, "default", lambda path, v: path in jaxft.leaves(state.trainable))
    got = {k.removeprefix("base_model.model."): e.read() for k, e in places.items()}
    assert got.keys() == want.keys() and len(got) == 13
    for key in want:
        np.testing.assert_allclose(got[key], want[key], atol=1e-6, err_msg=key)


def test_bitfit_on_llama_says_that_there_are_no_biases():
    with pytest.raises(jaxft.MethodError, match=r"has none. BitFit\(create=True\) gives each of its 14 linear layers"):
        jaxft.TrainState.create(base("llama"), jaxft.BitFit(), optax.sgd(0.1))
