"""Weighted combinations and several adapters at once, beside peft."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from test_golden_weighted import delta
from weighted_cases import CASES, WEIGHTS

import jaxft

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
peers = pytest.importorskip("peers", reason="needs the [parity] extra")
torch = pytest.importorskip("torch")
theirs = pytest.importorskip("make_weighted")

GPT2 = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"]},
    "bb": {"r": 4, "lora_alpha": 2, "target_modules": ["c_attn", "c_fc"]},
}


def pair(base, tmp_path, options):
    """Two adapters in peft, and the same two here."""
    model = peers.adapted(base, options["a"], "a")
    peers.adapted(base, options["bb"], "bb", model)
    model.save_pretrained(tmp_path / "both")
    peers.base_model(base).save_pretrained(tmp_path / "base")
    ours, _ = jaxft.load(tmp_path / "base")
    for name in ("a", "bb"):
        ours = jaxft.load_adapter(ours, tmp_path / "both" / name, name=name)
    return model, ours


def inputs():
    return {k: jnp.asarray(v) for k, v in peers.batch().items()}


def compare(ours, want, tolerance=1e-5):
    real = peers.batch()["attention_mask"][..., None]
    assert np.abs((np.asarray(ours) - want) * real).max() < tolerance


@pytest.mark.parametrize(("base", "options"), [("llama", theirs.ADAPTERS), ("gpt2", GPT2)])
def test_every_combination(base, options, tmp_path):
    model, ours = pair(base, tmp_path, options)
    seen, modules = 0, 6 if base == "llama" else 8
    for case, want in theirs.made(model).items():
        got = delta(jaxft.add_weighted_adapter(ours, WEIGHTS, name="c", **CASES[case]), "c")
        assert got.keys() == want.keys()
        for module, change in want.items():
            np.testing.assert_allclose(got[module], change, atol=1e-5, err_msg=f"{case} {module}")
            seen += 1
    assert seen == 9 * modules


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dropping_by_the_same_masks(combination, tmp_path, monkeypatch):
    """The masks are a function of place and sign, whichever way round the array lies."""

    def thinned(x, density):
        i, j = np.indices(x.shape)
        return np.where(((i + j) % 2 == 0) ^ (x > 0), x / density, 0).astype(np.float32)

    monkeypatch.setattr(
        "peft.utils.merge_utils.random_pruning",
        lambda tensor, density, rescale: torch.tensor(thinned(tensor.detach().numpy(), density)),
    )
    monkeypatch.setattr("jaxft.methods.weighted.drop_and_rescale", lambda x, density, rng: thinned(x, density))
    model, ours = pair("llama", tmp_path, theirs.ADAPTERS)
    options = {"density": 0.5, **({"svd_rank": 8} if combination.endswith("svd") else {})}
    w = WEIGHTS
    model.add_weighted_adapter(list(w), list(w.values()), "c", combination_type=combination, **options)
    want = theirs.delta(model, "c")
    got = delta(jaxft.add_weighted_adapter(ours, w, name="c", combination=combination, **options), "c")
    assert got.keys() == want.keys()
    for module, change in want.items():
        np.testing.assert_allclose(got[module], change, atol=1e-5, err_msg=module)


def test_rslora_is_not_handed_on(tmp_path):
    """peft's result is scaled by sqrt(r) once more (its issue 3761); ours is the formula."""
    options = {name: {**o, "use_rslora": True} for name, o in theirs.ADAPTERS.items()}
    model, ours = pair("llama", tmp_path, options)
    model.add_weighted_adapter(["a", "bb"], [0.7, -0.4], "c", combination_type="cat")
    got = delta(jaxft.add_weighted_adapter(ours, WEIGHTS, name="c", combination="cat"), "c")
    parts = {name: theirs.delta(model, name) for name in ("a", "bb")}
    for module, change in theirs.delta(model, "c").items():
        want = sum(w * parts[name][module] for name, w in WEIGHTS.items() if module in parts[name])
        np.testing.assert_allclose(got[module], want, atol=1e-5, err_msg=module)
        np.testing.assert_allclose(change, want * 6**0.5, atol=1e-5, err_msg=module)


@pytest.mark.parametrize(("base", "options"), [("llama", theirs.ADAPTERS), ("gpt2", GPT2)])
def test_several_at_once(base, options, tmp_path):
    """The sum of two, each alone, none, and rows with adapters of their own."""
    model, ours = pair(base, tmp_path, options)
    for names in (["a"], ["bb"], ["a", "bb"]):
        model.base_model.set_adapter(names)
        compare(jaxft.set_adapter(ours, dict.fromkeys(names, 1.0))(**inputs()), peers.logits(model))
    with model.disable_adapter():
        compare(jaxft.set_adapter(ours, None)(**inputs()), peers.logits(model))
    rows = jaxft.set_adapter(ours, [[0, 1], [0, 0], [1, 0]])
    compare(rows(**inputs()), peers.logits(model, adapter_names=["bb", "__base__", "a"]))
    assert not jnp.array_equal(rows(**inputs()), ours(**inputs()))


def test_a_combination_is_written_for_peft(tmp_path):
    model, ours = pair("llama", tmp_path, theirs.ADAPTERS)
    made = jaxft.add_weighted_adapter(ours, WEIGHTS, name="c", combination="cat")
    jaxft.save_adapter(made, tmp_path / "c", name="c")
    model.load_adapter(tmp_path / "c", "c")
    model.base_model.set_adapter(["c"])
    compare(jaxft.set_adapter(made, "c")(**inputs()), peers.logits(model))
    assert dataclasses.asdict(jaxft.adapters(made)["c"])["r"] == 6
