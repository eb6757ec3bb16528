"""Adapters made of adapters: weighted combinations of LoRAs against their formulas, and plain means."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.methods import combine
from jaxft.models.names import named_modules, variables
from jaxft.models.stack import spread
from jaxft.testing import tiny_gpt2, tiny_llama, token_batch

IDS = token_batch()["input_ids"]
SPARSE = {"density": 0.4}


def with_adapters(base=None, **methods):
    """A model whose adapters do something, and wait."""
    model = base or tiny_llama()
    for name, method in methods.items():
        model = jaxft.attach(model, method, name=name, seed=len(name))
        model = jaxft.set_adapter(model, None)
    for i, (path, v) in enumerate(variables(model).items()):
        if ".delta." in path and path.endswith((".a", ".b")):
            v.set_value(v.get_value() + 0.1 * jax.random.normal(jax.random.key(i), v.get_value().shape))
    return model


def changes(model, name):
    """What one adapter adds to each kernel `[layers, in, out]`, by path; zeros in layers that it leaves alone."""
    return {
        n.path: np.asarray(spread(n.module.delta[name], len(n.names)).kernel_change(n.module.kernel))
        for n in named_modules(model)
        if name in (getattr(n.module, "delta", None) or {})
    }


def summed(model, weights):
    found = [(w, changes(model, name)) for name, w in weights.items()]
    paths = sorted({path for _, each in found for path in each})
    return {path: sum(w * each[path] for w, each in found if path in each) for path in paths}


@pytest.fixture(scope="module")
def two():
    return with_adapters(
        tiny_llama(num_key_value_heads=4),
        a=jaxft.LoRA(r=3, alpha=6),
        bb=jaxft.LoRA(r=3, alpha=9, use_rslora=True, target_modules=("v_proj", "up_proj")),
    )


@pytest.fixture(scope="module")
def uneven():
    """Other ranks by module, and one that sits in one layer only."""
    return with_adapters(
        a=jaxft.LoRA(r=2, rank_pattern={r"layers\.1\..*q_proj": 4}, alpha_pattern={"v_proj": 3}),
        bb=jaxft.LoRA(r=3, layers=(1,), target_modules=("q_proj", "k_proj")),
    )


@pytest.mark.parametrize("weights", [{"a": 0.7, "bb": 0.3}, {"a": -1.5, "bb": 2.0}, {"bb": 0.5}])
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_exact_ones_are_the_weighted_sum(two, uneven, combination, weights):
    for model in (two, uneven):
        options = {"svd_rank": 7} if combination == "svd" else {}
        made = jaxft.add_weighted_adapter(model, weights, name="c", combination=combination, **options)
        want, got = summed(model, weights), changes(made, "c")
        assert got.keys() == want.keys()
        for path, value in want.items():
            np.testing.assert_allclose(got[path], value, atol=1e-5, err_msg=path)
        assert max(np.abs(value).max() for value in want.values()) > 0.05


def test_svd_is_the_closest_of_its_rank(two):
    got = changes(jaxft.add_weighted_adapter(two, {"a": 1, "bb": -1}, name="c", svd_rank=2), "c")
    seen = 0
    for path, value in summed(two, {"a": 1, "bb": -1}).items():
        for ours, whole in zip(got[path], value, strict=True):
            u, s, vt = np.linalg.svd(whole)
            np.testing.assert_allclose(ours, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5, err_msg=path)
            seen += bool(s[2] > 1e-2)
    assert seen == 6, "in each of them the cut takes something away"


def by_hand(combination, a, b, weights, scales, masks):
    """The rules once more, entry by entry, from the papers: A `[in, r]` and B `[r, out]` of one kernel."""

    def rule(arrays, ws, masks):
        if "dare" in combination:
            arrays = [x * m / SPARSE["density"] for x, m in zip(arrays, masks, strict=True)]
        elif combination != "linear":
            cut = [np.sort(np.abs(x).ravel())[::-1][int(0.4 * x.size) - 1] for x in arrays]
            arrays = [np.where(np.abs(x) >= c, x, 0) for x, c in zip(arrays, cut, strict=True)]
        out = np.zeros_like(arrays[0])
        for at in np.ndindex(out.shape):
            values = [x[at] for x in arrays]
            if "ties" in combination:
                positive = sum(values) >= 0
                agree = [i for i, v in enumerate(values) if (v > 0 if positive else v < 0)]
                out[at] = sum(ws[i] * values[i] for i in agree) / max(len(agree), 1)
            else:
                out[at] = sum(w * v for w, v in zip(ws, values, strict=True))
        return out

    if combination.endswith("_svd"):
        return rule([s * x @ y for s, x, y in zip(scales, a, b, strict=True)], weights, masks[0])
    whole = [w * s for w, s in zip(weights, scales, strict=True)]
    left = rule(a, [np.sign(w) * abs(w) ** 0.5 for w in whole], masks[0])
    return left @ rule(b, [abs(w) ** 0.5 for w in whole], masks[1])


RULES = ["linear", "ties", "magnitude_prune", "dare_linear", "dare_ties"]
RULES += [f"{rule}_svd" for rule in RULES[1:]]


@pytest.mark.parametrize("combination", RULES)
def test_each_rule_by_hand(two, combination, monkeypatch):
    """One kernel that both change, one that one changes; the masks of dropping are drawn here."""
    drawn = []

    def mask(array, density, rng):
        keep = rng.random(array.shape) < density
        drawn.append(keep)
        return array * keep / np.float32(density)

    monkeypatch.setattr("jaxft.methods.weighted.drop_and_rescale", mask)
    weights = {"a": 0.7, "bb": -0.4}
    options = SPARSE if combination != "linear" else {}
    options = {**options, "svd_rank": 32} if combination.endswith("svd") else options
    made = jaxft.add_weighted_adapter(two, weights, name="c", combination=combination, **options)
    got, layer, seen = changes(made, "c"), 1, 0
    for path, names in (("self_attn.v_proj", ["a", "bb"]), ("mlp.up_proj", ["bb"]), ("self_attn.q_proj", ["a"])):
        module = operator.attrgetter(path)(two.model.layers)
        deltas = [module.delta[name] for name in names]
        a, b = ([np.asarray(getattr(d, leaf).get_value()[layer]) for d in deltas] for leaf in ("a", "b"))
        masks = masks_of(drawn, combination, path, layer) if drawn else [None, None]
        ws, scales = [weights[name] for name in names], [float(d.gate.get_value()[layer, 0]) for d in deltas]
        want = by_hand(combination, a, b, ws, scales, masks)
        np.testing.assert_allclose(got[f"model.layers.{path}"][layer], want, atol=1e-5, err_msg=path)
        seen += 1
    assert seen == 3


def masks_of(drawn, combination, path, layer):
    """The masks of one kernel, found by the order in which kernels are combined."""
    per_kernel = 1 if combination.endswith("svd") else 2
    n, at = {"mlp.up_proj": 1, "self_attn.q_proj": 1, "self_attn.v_proj": 2}, 0
    for name in ("mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"):  # by path
        for i in range(2):
            mine = drawn[at : at + per_kernel * n[name]]
            at += len(mine)
            if (name, i) == (path, layer):
                return [mine[k * n[name] : (k + 1) * n[name]] for k in range(per_kernel)]
    raise AssertionError(path)


def test_dropping_keeps_the_mean_and_follows_the_seed(two):
    options = {"name": "c", "combination": "dare_linear", "density": 0.5}
    one, again, other = (jaxft.add_weighted_adapter(two, {"a": 1}, seed=s, **options) for s in (0, 0, 1))
    for path, value in jaxft.leaves(one).items():
        if ".c." in path and path.endswith(".b"):
            np.testing.assert_array_equal(value, jaxft.leaves(again)[path])
            assert not np.array_equal(value, jaxft.leaves(other)[path])
            live = np.asarray(value)[np.asarray(value) != 0]
            assert 0.3 < live.size / value.size < 0.7
    big = np.ones(100_000)
    assert abs(combine.drop_and_rescale(big, 0.3, np.random.default_rng(0)).mean() - 1) < 0.02


def test_sign_by_number_of_votes(two):
    total, frequency = (
        jaxft.add_weighted_adapter(
            jaxft.average_adapters(two, ["a"], name="d"),
            {"a": 1, "d": 1, "bb": 1},
            name="c",
            combination="ties_svd",
            density=1,
            majority_sign_method=method,
        )
        for method in ("total", "frequency")
    )
    assert not np.array_equal(*(changes(m, "c")["model.layers.self_attn.v_proj"] for m in (total, frequency)))


def test_the_result_is_an_ordinary_adapter(uneven, tmp_path):
    made = jaxft.add_weighted_adapter(uneven, {"a": 1.0, "bb": -0.5}, name="c", combination="cat")
    np.testing.assert_array_equal(made(IDS), uneven(IDS))
    active = jaxft.set_adapter(made, "c")
    stacked = jaxft.set_adapter(uneven, {"a": 1.0, "bb": -0.5})
    np.testing.assert_allclose(active(IDS), stacked(IDS), atol=1e-5)
    again = jaxft.load_adapter(tiny_llama(), jaxft.save_adapter(made, tmp_path, name="c"))
    np.testing.assert_array_equal(again(IDS), jaxft.set_adapter(jaxft.detach(jaxft.detach(made, "a"), "bb"), "c")(IDS))
    assert jaxft.adapters(again)["default"].r == 7


def test_on_gpt2_and_by_default_the_targets_are_kept():
    model = with_adapters(tiny_gpt2(), a=jaxft.LoRA(r=2), bb=jaxft.LoRA(r=3, alpha=5))
    made = jaxft.add_weighted_adapter(model, {"a": 0.5, "bb": 0.5}, name="c", svd_rank=5)
    assert jaxft.adapters(made)["c"] == jaxft.LoRA(r=5, alpha=5)
    for path, value in summed(model, {"a": 0.5, "bb": 0.5}).items():
        np.testing.assert_allclose(changes(made, "c")[path], value, atol=1e-5)


def test_the_mean(two):
    model = with_adapters(a=jaxft.LoRA(r=2), bb=jaxft.LoRA(r=2, dropout=0.1), ccc=jaxft.LoRA(r=2))
    made = jaxft.average_adapters(model, ["a", "bb", "ccc"], name="m")
    found, seen = jaxft.leaves(made), 0
    for path, value in found.items():
        if ".m." in path and not path.endswith("gate"):
            want = sum(found[path.replace(".m.", f".{name}.")] for name in ("a", "bb", "ccc")) / 3
            np.testing.assert_allclose(value, want, atol=1e-6)
            seen += 1
    assert seen == 4
    assert made.adapter_weights.get_value().tolist() == [0, 0, 0, 0]
    copies = jaxft.LoRA(r=2, modules_to_save=("norm",))
    held = with_adapters(a=copies, bb=copies)
    variables(held)["model.norm.saved.bb.scale"].set_value(jnp.full(32, 3.0))
    both = jaxft.average_adapters(held, ["a", "bb"], name="m")
    np.testing.assert_allclose(jaxft.leaves(both)["model.norm.saved.m.scale"], 2.0)


MISTAKES = [
    ({"a": 1, "x": 1}, {}, "no adapter 'x'; there are: 'a', 'bb'"),
    ({}, {}, "name at least one adapter"),
    ({"a": 1}, {"name": "bb"}, "already has an adapter 'bb'"),
    ({"a": 1}, {"combination": "tie"}, "combination='tie'; nearest: 'ties'|combination='tie': nearest: 'ties'"),
    ({"a": float("nan")}, {}, "weight nan of 'a': give a finite number"),
    ({"a": 1}, {"combination": "ties"}, "density=None: say what share is kept"),
    ({"a": 1}, {"combination": "dare_linear", "density": 1.5}, "density=1.5"),
    ({"a": 1}, {"combination": "cat", "svd_rank": 3}, "svd_rank=3"),
    ({"a": 1}, {"combination": "ties", "density": 1, "majority_sign_method": "most"}, "majority_sign_method='most'"),
    ({"a": 1}, {"svd_rank": 99}, r"(?s)svd_rank=99.*svd_rank of at most 32.*v_proj, whose kernel is 32 x 32"),
    ({"a": 1}, {"svd_rank": True}, "svd_rank=True"),
    ({"a": 1}, {"combination": "linear", "density": 0.5}, "density=0.5: 'linear' keeps all"),
    ({"a": 1}, {"combination": "linear", "majority_sign_method": "foo"}, "majority_sign_method='foo': choose one of"),
    (
        {"a": 1},
        {"combination": "cat", "majority_sign_method": "frequency"},
        "majority_sign_method='frequency': .* 'cat'",
    ),
    ({"a": 1}, {"combination": "ties", "density": "half"}, "density='half'"),
    ({"a": 1}, {"combination": 5}, "combination=5"),
    ({"a": 1}, {"combination": "dare_linear", "density": 0.5, "seed": -1}, "seed=-1"),
    ({"a": True}, {}, "weight True of 'a'"),
    ("a", {}, "weights='a': give {name: weight}"),
    (["a", "bb"], {}, r"weights=\['a', 'bb'\]: give {name: weight}"),
]


@pytest.mark.parametrize(("weights", "options", "match"), MISTAKES)
def test_mistakes(two, weights, options, match):
    before = jax.tree.map(jnp.copy, jaxft.leaves(two))
    with pytest.raises(jaxft.MethodError, match=match):
        jaxft.add_weighted_adapter(two, weights, **{"name": "c", **options})
    assert jaxft.adapters(two).keys() == {"a", "bb"}
    for path, value in before.items():
        np.testing.assert_array_equal(jaxft.leaves(two)[path], value)


def test_ranks_that_add_up_past_a_kernel():
    model = jaxft.attach(tiny_llama(), jaxft.LoRA(r=10), name="a")
    model = jaxft.attach(model, jaxft.LoRA(r=10), name="b")
    match = r"(?s)'cat' adds the ranks up.*combination='svd' with an svd_rank of at most 16.*rank 20.*v_proj"
    with pytest.raises(jaxft.MethodError, match=match):
        jaxft.add_weighted_adapter(model, {"a": 1, "b": 1}, name="c", combination="cat")
    whole = jaxft.add_weighted_adapter(model, {"a": 1, "b": 1}, name="c", svd_rank=np.int64(16))
    assert jaxft.adapters(whole)["c"].r == 16


def test_numbers_of_any_kind(two):
    plain = jaxft.add_weighted_adapter(two, {"a": 0.5, "bb": 2}, name="c")
    given = jaxft.add_weighted_adapter(two, {"a": np.float32(0.5), "bb": np.int64(2)}, name="c")
    for path, value in jaxft.leaves(plain).items():
        np.testing.assert_array_equal(jaxft.leaves(given)[path], value)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a", "a", "bb"], "'a' stands there more than once"),
        ("a", "names='a': give"),
        (5, "names=5: give"),
        ([["a"]], "no"),
    ],
)
def test_names_that_cannot_be(two, names, match):
    with pytest.raises(jaxft.MethodError, match=match):
        jaxft.average_adapters(two, names, name="m")


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_unequal_ranks(uneven, combination):
    density = None if combination == "linear" else 0.5
    before = jaxft.leaves(uneven)
    with pytest.raises(jaxft.MethodError, match=r"'a' has rank 4, 'bb' has rank 3, at model.layers.self_attn.q_proj"):
        jaxft.add_weighted_adapter(uneven, {"a": 1, "bb": 1}, name="c", combination=combination, density=density)
    assert jaxft.leaves(uneven).keys() == before.keys()


def test_kinds_that_do_not_combine():
    model = with_adapters(
        a=jaxft.LoRA(r=2), bb=jaxft.BitFit(create=True), ccc=jaxft.LoRA(r=2, modules_to_save=("norm",))
    )
    with pytest.raises(
        jaxft.MethodError, match=r"'bb' is BitFit: only LoRA can be.*\n.*'ccc' has values in the base's place"
    ):
        jaxft.add_weighted_adapter(model, {"a": 1, "bb": 1, "ccc": 1}, name="d")
    with pytest.raises(jaxft.MethodError, match=r"unequal structure.*\n.*is only in"):
        jaxft.average_adapters(model, ["a", "bb"], name="d")
    scaled = with_adapters(a=jaxft.LoRA(r=2), bb=jaxft.LoRA(r=2, alpha=3), ccc=jaxft.LoRA(r=3))
    with pytest.raises(jaxft.MethodError, match=r"which is not trained \(a scale\), differs between 'a' and 'bb'"):
        jaxft.average_adapters(scaled, ["a", "bb"], name="d")
    with pytest.raises(jaxft.MethodError, match=r"\(2, 32, 2\) in 'a', \(2, 32, 3\) in 'ccc'"):
        jaxft.average_adapters(scaled, ["a", "ccc"], name="d")
    assert jaxft.adapters(scaled).keys() == {"a", "bb", "ccc"}
    abstract = jax.eval_shape(lambda: jaxft.attach(tiny_llama(), jaxft.LoRA(r=2), name="a"))
    with pytest.raises(jaxft.MethodError, match="shapes for arrays"):
        jaxft.average_adapters(abstract, ["a"], name="d")


def test_copies_do_not_stack():
    """Two whole heads in place of one are no sum: each alone, or each for rows of its own."""
    copies = jaxft.LoRA(r=2, modules_to_save=("norm", "lm_head"))
    model = with_adapters(a=copies, bb=copies, ccc=jaxft.LoRA(r=2))
    for weights in ({"a": 1, "bb": 1}, [[1, 0, 0], [0.5, 0.5, 0]]):
        with pytest.raises(jaxft.MethodError, match=r"'a' and 'bb' each have a copy of model.norm.scale"):
            jaxft.set_adapter(model, weights)
    for weights in ({"a": 1, "ccc": 1}, [[1, 0, 1], [0, 1, 1]]):
        jaxft.set_adapter(model, weights)
