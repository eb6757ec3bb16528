"""Prefixes and virtual tokens: the laws, and what stands before a sequence however it is batched, packed or decoded."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loops import loop
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.models.attention import attend, causal_mask
from jaxft.models.seams import Past
from jaxft.testing import check_method, tiny_gpt2, tiny_llama, tiny_model, token_batch
from jaxft.testing.laws import TX, gradients
from jaxft.train.step import with_leaves

P, D = 5, 32
MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mistral": lambda **kw: tiny_model("mistral", sliding_window=7, **kw),
    "gemma3": lambda **kw: tiny_model("gemma3_text", sliding_window=7, sliding_window_pattern=2, **kw),
}
OUT = {"llama": 2 * 2 * 16, "gpt2": 2 * 2 * 32}  # layers, keys and values, width of a layer's keys
METHODS = {
    "prefix": jaxft.PrefixTuning(P),
    "prefix-projected": jaxft.PrefixTuning(P, prefix_projection=True, encoder_hidden_size=6),
    "prefix-unshifted": jaxft.PrefixTuning(P, position_offset=False, init="random"),
    "prompt": jaxft.PromptTuning(P),
    "p-mlp": jaxft.PTuning(P, encoder_hidden_size=6),
    "p-lstm": jaxft.PTuning(P, encoder="lstm", encoder_hidden_size=6, encoder_num_layers=1),
    "v2": jaxft.PTuningV2(P),
    "v2-mlp": jaxft.PTuningV2(P, encoder="mlp"),
    "v2-transformer": jaxft.PTuningV2(P, encoder="transformer", encoder_hidden_size=6, encoder_num_layers=1),
    "both": jaxft.PrefixTuning(3) | jaxft.PromptTuning(4),
}
LAWFUL = {
    "llama": ["prefix", "prompt", "p-lstm", "v2-transformer", "both"],
    "gpt2": ["prefix-projected", "prompt", "p-mlp", "v2"],
}


def count(family, name):
    """The closed formulas: P vectors, and what each layer of an encoder has."""
    out, h = OUT[family], 6
    w = out // 4
    lstm = 2 * (4 * h * (D + h + 2)) + 2 * h * (2 * h + 1) + D * (2 * h + 1)
    block = 4 * w + (w + 1) * 3 * w + (w + 1) * w + (w + 1) * h + (h + 1) * w
    return {
        "prefix": P * out,
        "prefix-projected": P * w + (w + 1) * h + (h + 1) * out,
        "prompt": P * D,
        "p-mlp": P * D + (D + 1) * h + (h + 1) * h + (h + 1) * D,
        "p-lstm": P * D + lstm,
        "v2": P * out,
        "v2-transformer": P * w + block + (w + 1) * out,
        "both": 3 * out + 4 * D,
    }[name]


def adapted(family, method, name="default", seed=0, base=None):
    """A model whose adapter is far from where it began."""
    model = jaxft.attach(MODELS[family]() if base is None else base, method, name=name, seed=seed)
    for path, variable in jaxft.models.names.variables(model).items():
        if f".{name}." in path and not path.endswith("adapter_weights"):
            value = variable.get_value()
            variable.set_value(value + 0.5 * jnp.sin(seed + jnp.arange(value.size)).reshape(value.shape))
    return model


def ids(rows=3, length=12, seed=0):
    return np.random.default_rng(seed).integers(1, 64, (rows, length))


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in LAWFUL.items() for name in names])
def test_laws(family, name):
    check_method(METHODS[name], MODELS[family](), identity=False, count=count(family, name))


def test_the_laws_see_every_method():
    assert {type(METHODS[name]) for names in LAWFUL.values() for name in names} >= {
        *(jaxft.PrefixTuning, jaxft.PromptTuning, jaxft.PTuning, jaxft.PTuningV2)
    }


ONE_BY_ONE = [("llama", "prefix-projected"), ("gpt2", "p-lstm"), ("mistral", "both")]


@pytest.mark.parametrize(
    ("family", "name"), [ONE_BY_ONE[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in ONE_BY_ONE[1:])]
)
def test_remat_and_the_layers_one_by_one(family, name, monkeypatch):
    """Rematerialisation, which breaks the reference's prefixes, changes nothing here; nor does a loop."""
    batch, loss = {k: v[:, :6] for k, v in token_batch().items()}, jaxft.losses.next_token_loss
    state, rematted = (jaxft.TrainState.create(MODELS[family](remat=r), METHODS[name], TX) for r in ("none", "full"))
    rematted = rematted.replace(trainable=with_leaves(rematted.trainable, jaxft.leaves(state.trainable)))
    want, got = gradients(state, batch, loss), gradients(rematted, batch, loss)
    assert want and got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=1e-5, rtol=1e-4, err_msg=path)
    if name != "both":
        return

    scanned, alone = (jax.jit(lambda model: loss(model, batch)[0]) for _ in range(2))
    want = scanned(state.model)
    monkeypatch.setattr(jax.lax, "scan", loop)
    np.testing.assert_allclose(alone(state.model), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "prefix"), ("gpt2", "both"), ("gpt2", "prefix-unshifted"), ("mistral", "both"), ("gemma3", "prefix")],
)
def test_packed_and_padded_rows_are_rows_alone(family, name):
    """Every segment has the virtual tokens before it, and a padded row before its first real token."""
    model, row = adapted(family, METHODS[name]), ids(1)[0]
    a, b = row[:7], row[7:]
    alone = np.concatenate([model(part[None])[0] for part in (a, b)])
    packed = model(row[None], segment_ids=np.array([[1] * 7 + [2] * 5]))[0]
    np.testing.assert_allclose(packed, alone, atol=1e-5)
    left = model(np.array([[9, 9, *b]]), attention_mask=np.array([[0, 0, 1, 1, 1, 1, 1]]))[0]
    assert np.isfinite(left).all()
    np.testing.assert_allclose(left[2:], alone[7:], atol=1e-5)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_with_adapters_of_their_own(family, name):
    """A row sees the adapters that it has weights for, and one that has none is the base to the bit."""
    base = MODELS[family]()
    a, b = (adapted(family, METHODS[name], n, seed, base) for seed, n in enumerate(("a", "b"), 1))
    model = adapted(family, METHODS[name], "b", 2, a)
    x = ids(4)
    weights = np.array([[1, 0], [0, 0], [0, 1], [1, 1]])
    got = jaxft.set_adapter(model, weights)(x)
    for row, want in enumerate([a(x)[0], base(x)[1], b(x)[2], jaxft.set_adapter(model, [1, 1])(x)[3]]):
        np.testing.assert_allclose(got[row], want, atol=1e-5)
    assert np.array_equal(got[1], base(x)[1])
    assert np.abs(got[3] - a(x)[3]).max() > 1e-3 < np.abs(got[3] - b(x)[3]).max()


def test_a_weight_counts_how_often_it_stands_there():
    """Twice the same prefix is one of weight 2; below 0 is 0; half of one lies between it and the base."""
    base, x = tiny_llama(), ids()
    method = METHODS["prefix-unshifted"]
    model = adapted("llama", method, "b", 1, adapted("llama", method, "a", 1, base))
    model = jaxft.set_adapter(model, "a")
    same = jax.tree.map(lambda v: v, model)
    same.past["b"].vectors.set_value(same.past["a"].vectors.get_value())
    np.testing.assert_allclose(jaxft.set_adapter(same, [1, 1])(x), jaxft.set_adapter(same, {"a": 2})(x), atol=1e-5)
    assert np.array_equal(jaxft.set_adapter(same, {"a": -1})(x), base(x))
    tiny = jaxft.set_adapter(same, {"a": 1e-6})(x)
    np.testing.assert_allclose(tiny, base(x), atol=1e-4)


def test_switching_compiles_nothing():
    model, x = adapted("llama", METHODS["both"]), ids()
    model(x)
    before = jaxft.models.causal._logits._cache_size()
    for weights in ([0.0], [0.3], None, "default"):
        jaxft.set_adapter(model, weights)(x)
    assert jaxft.models.causal._logits._cache_size() == before


def test_a_window_slides_past_the_prefix():
    """As over tokens: place p of 5 is seen by the tokens t with t + 5 - p < 7, wherever pads or segments stand."""
    model = adapted("mistral", METHODS["prefix"], base=MODELS["mistral"](num_hidden_layers=1))
    row = ids(1)[0]
    batches = (
        {"input_ids": row[None]},
        {"input_ids": np.concatenate([[9, 9, 9], row])[None], "attention_mask": np.array([[0] * 3 + [1] * 12])},
        {"input_ids": np.concatenate([row, row])[None], "segment_ids": np.array([[1] * 12 + [2] * 12])},
    )
    vectors = model.past["default"].vectors
    value, starts = vectors.get_value(), ([0], [3], [0, 12])
    for batch, start in zip(batches, starts, strict=True):
        before = np.asarray(model(**batch))[0]
        for p in range(P):
            vectors.set_value(value.at[p].add(1.0))
            moved = (np.asarray(model(**batch))[0] != before).any(-1)
            vectors.set_value(value)
            for first in start:
                assert moved[first : first + 12].tolist() == [t + P - p < 7 for t in range(12)]


def greedy(model, prompt, new):
    """One token after the other, each from a whole forward pass."""
    row = list(prompt)
    for _ in range(new):
        rest = 20 - len(row)
        logits = model(np.array([row + [1] * rest]), attention_mask=np.array([[1] * len(row) + [0] * rest]))
        row.append(int(np.asarray(logits)[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize(("family", "name"), [("llama", "prefix"), ("gpt2", "prompt"), ("gemma3", "both")])
def test_generation_is_the_forward_pass_step_by_step(family, name):
    """Left padded, with grouped queries, past a window, and with an adapter or none for each row."""
    base = MODELS[family]()
    model = adapted(family, METHODS[name], "b", 2, adapted(family, METHODS[name], "a", 1, base))
    prompts = [ids(1)[0].tolist(), [3, 4], [5, 6, 7, 8]]
    weights = np.array([[1.0, 0], [0, 1], [0, 0]])
    got = jaxft.generate_ids(jaxft.set_adapter(model, weights), prompts, max_new_tokens=6)
    want = [greedy(jaxft.set_adapter(model, w), prompt, 6) for w, prompt in zip(weights, prompts, strict=True)]
    assert got == want
    assert got[0] != greedy(jaxft.set_adapter(model, None), prompts[0], 6)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_the_position_table(name):
    """GPT-2: virtual tokens take positions; what does not fit is refused when attached, in a batch, in generation."""
    model = tiny_gpt2(n_positions=12)
    with pytest.raises(jaxft.MethodError, match="12 positions 12 are free, so give at most 11"):
        jaxft.attach(model, dataclasses.replace(METHODS[name], num_virtual_tokens=12))
    one = jaxft.attach(model, METHODS[name])
    assert one(ids(2, 7)).shape == (2, 7, 64)
    with pytest.raises(jaxft.BatchError, match="rows of 8 tokens: this model has 12 positions, of which .* take 5"):
        one(ids(2, 8))
    assert len(jaxft.generate_ids(one, [[1, 2, 3]], max_new_tokens=4)[0]) == 4
    with pytest.raises(jaxft.GenerationError, match="7 positions beside those of its virtual tokens"):
        jaxft.generate_ids(one, [[1, 2, 3]], max_new_tokens=5)
    with pytest.raises(jaxft.MethodError, match="7 are free, so give at most 6"):
        jaxft.attach(one, dataclasses.replace(METHODS[name], num_virtual_tokens=7), name="second")
    if name == "prefix":
        unshifted = jaxft.attach(model, jaxft.PrefixTuning(20, position_offset=False))
        assert unshifted(ids(2, 12)).shape == (2, 12, 64)


@pytest.mark.slow
def test_a_mesh_gives_the_same():
    mesh = jaxft.make_mesh(data=2, fsdp=2, tensor=2)
    batch = {k: jnp.concatenate([v, v[:1]]) for k, v in token_batch().items()}
    method = METHODS["prefix"] | METHODS["p-mlp"] | jaxft.Adapter(kind="houlsby", size=4)
    one = jaxft.TrainState.create(tiny_llama(), method, TX)
    model = tiny_llama()
    model.config = model.config.replace(mesh=mesh)
    many = jaxft.TrainState.create(jaxft.models.placement.place(model), method, TX)
    want = gradients(one, batch, jaxft.losses.next_token_loss)
    got = gradients(many, batch, jaxft.losses.next_token_loss)
    assert len(want) == 1 + 7 + 2 * 4
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=1e-5, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
def test_attention_on_an_accelerator(weight):
    """The path of other platforms gives the same, and at weight 0 exactly what it gives without a past."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, h, 6, 8)) for i, h in enumerate((4, 2, 2)))
    pk, pv = (jax.random.normal(jax.random.key(i), (1, 2, 3, 8)) for i in (7, 8))
    past = Past(pk, pv, jnp.full((1, 1, 3), weight), jnp.zeros((1, 1), int), 3)
    cpu, other = (attend(q, k, v, causal_mask(6), past=past, platform=p) for p in ("cpu", "gpu"))
    np.testing.assert_allclose(cpu, other, atol=1e-6)
    if weight == 0:  # compiled as the branch is: step by step XLA may round otherwise
        plain = jax.jit(partial(attend, platform="gpu"))(q, k, v, causal_mask(6))
        assert np.array_equal(other, plain)
        return
    whole = attend(
        q,
        *(jnp.concatenate([jnp.repeat(p, 2, 0), s], 2) for p, s in ((pk, k), (pv, v))),
        jnp.pad(causal_mask(6), ((0, 0), (0, 0), (0, 0), (3, 0)), constant_values=True),
    )
    assert bool(np.abs(cpu - whole).max() < 1e-6) is (weight == 1)


def test_dropout_is_drawn_for_each_row():
    """Of a prefix's numbers, in training alone; every row draws its own."""
    model = jaxft.attach(tiny_llama(), jaxft.PTuningV2(P, dropout=0.5))
    same = np.repeat(ids(1), 3, 0)
    still, drawn, again = (np.asarray(model(same, key=key)) for key in (None, jax.random.key(0), jax.random.key(0)))
    assert np.array_equal(drawn, again) and np.array_equal(still[0], still[1])
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4 < np.abs(drawn[0] - still[0]).max()
    numbers = model.past["default"](jaxft.models.seams.Context(key=jax.random.key(0)), 400)
    assert numbers.shape == (400, P, 64)
    kept = np.asarray(numbers) != 0
    assert abs(kept.mean() - 0.5) < 0.01
    np.testing.assert_allclose(np.where(kept, numbers / 2, 0), np.where(kept, model.past["default"].vectors[None], 0))


def test_the_lstm_drops_between_its_layers():
    model = jaxft.attach(tiny_llama(), jaxft.PTuning(P, encoder="lstm", encoder_hidden_size=6, encoder_dropout=0.5))
    with_key, without = (model(ids(), key=key) for key in (jax.random.key(0), None))
    assert np.abs(with_key - without).max() > 1e-4


def test_first_vectors():
    """Words of the vocabulary, as the model embeds them (Gemma scales), a text's words repeated, or N(0, 1)."""
    for family, scale in (("llama", 1.0), ("gemma3", D**0.5), ("gpt2", 1.0)):
        model = MODELS[family]()
        table = np.asarray(model.backbone.input_embedding().embedding.get_value()) * np.float32(scale)
        drawn = np.asarray(jaxft.attach(model, jaxft.PromptTuning(6)).prompt["default"].vectors.get_value())
        assert all(np.abs(table - v).max(1).min() < 1e-6 for v in drawn), family
        text = jaxft.attach(model, jaxft.PromptTuning(5, init="text", init_ids=(7, 8))).prompt["default"]
        np.testing.assert_allclose(text.vectors.get_value(), table[[7, 8, 7, 8, 7]], atol=1e-6)
    wide = jaxft.attach(tiny_llama(), jaxft.PromptTuning(100, init="random")).prompt["default"].vectors.get_value()
    assert abs(float(wide.std()) - 1) < 0.05


def test_a_text_is_tokenised_where_the_model_came_from(tokenizer, tmp_path):
    made = tiny_llama(vocab_size=len(tokenizer))
    jaxft.save_model(made, tmp_path, tokenizer)
    model, _ = jaxft.load(tmp_path)
    method = jaxft.PromptTuning(4, init="text", init_text="the cat")
    words = model.backbone.embed_tokens.embedding.get_value()[
        jnp.resize(jnp.array(tokenizer("the cat")["input_ids"]), 4)
    ]
    vectors = jaxft.attach(model, method).prompt["default"].vectors.get_value()
    np.testing.assert_array_equal(vectors, words)
    with pytest.raises(jaxft.MethodError, match="init_text needs a tokenizer, and '' gives none"):
        jaxft.attach(made, method)
    folder = jaxft.save_adapter(jaxft.attach(model, method | jaxft.LoRA(r=2)), tmp_path / "adapter")
    again = jaxft.load_adapter(made, folder)  # a base without a tokenizer: the file says what the vectors are
    np.testing.assert_array_equal(again.prompt["default"].vectors.get_value(), vectors)


BAD = [
    (jaxft.PrefixTuning, {"num_virtual_tokens": 0, "init": "zero"}, "num_virtual_tokens=0.*\n.*init='zero'"),
    (jaxft.PrefixTuning, {"prefix_projection": True, "encoder_hidden_size": 0}, "encoder_hidden_size=0"),
    (jaxft.PTuningV2, {"encoder": "lstm", "dropout": 1.0}, "dropout=1.0.*\n.*encoder='lstm'"),
    (jaxft.PTuning, {"encoder": "gru", "encoder_num_layers": True}, "encoder_num_layers=True.*\n.*encoder='gru'"),
    (jaxft.PromptTuning, {"init": "text"}, "needs init_text or init_ids"),
    (jaxft.PromptTuning, {"init": "text", "init_ids": 5}, "init_ids=5: give ids of tokens"),
    (jaxft.PromptTuning, {"init": "text", "init_ids": ("a",)}, r"init_ids=\('a',\): give ids of tokens"),
    (jaxft.PromptTuning, {"init_ids": (1,)}, "needs init_text or init_ids"),
    (jaxft.PromptTuning, {"init": "text", "init_ids": (1,), "tokenizer_name_or_path": "x"}, "is for init_text"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD)
def test_options_that_cannot_be(method, options, message):
    with pytest.raises(jaxft.MethodError, match=message):
        method(**options)


def test_what_does_not_fit_is_refused():
    model = tiny_llama()
    with pytest.raises(jaxft.MethodError, match=r"\[99\] of the text, in a vocabulary of 64"):
        jaxft.attach(model, jaxft.PromptTuning(3, init="text", init_ids=(1, 99)))
    with pytest.raises(jaxft.MethodError, match="two parts of the adapter 'default' claim `past`"):
        jaxft.attach(model, jaxft.PrefixTuning(3) | jaxft.PTuningV2(3))
    with pytest.raises(jaxft.MethodError, match="the model has the Virtual of 'default'"):
        jaxft.merge(jaxft.attach(model, jaxft.PrefixTuning(3)))
    from flax import nnx

    own = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    for method, seam in ((jaxft.PrefixTuning(), "past"), (jaxft.PTuning(), "prompt")):
        with pytest.raises(jaxft.MethodError, match=f"this Linear has no `{seam}` seam"):
            jaxft.attach(own, method)
    assert not jaxft.adapters(model)


def test_shapes_alone():
    """Plans of models without weights: the shapes are those of the real ones."""
    model = tiny_llama()
    for name in ("prefix-projected", "prompt", "p-lstm"):
        abstract = jaxft.attach(jax.eval_shape(lambda: model), METHODS[name])
        real = jaxft.attach(model, METHODS[name])
        assert jaxft.parameter_report(abstract, METHODS[name]) == jaxft.parameter_report(real, METHODS[name])


def test_words_beside_an_adapter_s_own_table():
    """Vectors of the vocabulary are the base's, whatever other adapters bring."""
    method = jaxft.LoRA(r=2, modules_to_save=("embed_tokens",)) | METHODS["prompt"]
    model = jaxft.attach(tiny_llama(), method)
    assert model(ids()).shape == (3, 12, 64)
    assert jaxft.decay_mask({"prompt.default.vectors": 0}) == {"prompt.default.vectors": False}


def test_detached_again():
    model = tiny_llama()
    again = jaxft.detach(jaxft.attach(model, METHODS["both"]), "default")
    assert jax.tree.structure(again) == jax.tree.structure(model)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"p-mlp", "v2", "v2-mlp"}))
def test_a_folder_goes_on_training(name, tmp_path):
    """Encoder and all come back to the bit, under the same method, and the file has nothing else."""
    state = jaxft.TrainState.create(tiny_llama(), METHODS[name], optax.sgd(0.1))
    jaxft.save_adapter(state, tmp_path)
    model = jaxft.load_adapter(tiny_llama(), tmp_path)
    method = jaxft.adapters(model)["default"]
    assert jaxft.partition(model, None)[0] is not None
    resumed = jaxft.TrainState.create(model, METHODS[name], optax.sgd(0.1))
    was, now = jaxft.leaves(state.trainable), jaxft.leaves(resumed.trainable)
    assert was.keys() == now.keys() and all(np.array_equal(was[path], now[path]) for path in was)
    if name in ("prefix", "prompt", "both"):
        assert type(method) is type(METHODS[name])
    else:
        assert method == METHODS[name]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    alone = name in ("both", "prefix-unshifted")  # peft has no word for these
    assert (config["peft_type"] == "JAXFT") is alone


def test_damaged_folders(tmp_path):
    model = tiny_llama()
    file = jaxft.save_adapter(jaxft.attach(model, METHODS["p-mlp"]), tmp_path) / "adapter_model.safetensors"
    good = load_file(file)
    assert sorted(good)[:2] == ["encoder.layers.0.bias", "encoder.layers.0.kernel"] and len(good) == 8

    def refused(match, **changes):
        save_file({k: v for k, v in {**good, **changes}.items() if v is not None}, file, metadata={"format": "pt"})
        with pytest.raises(jaxft.CheckpointError, match=match):
            jaxft.load_adapter(model, tmp_path)

    refused(
        "prompt_embeddings is not what the encoder in the same file makes",
        prompt_embeddings=good["prompt_embeddings"] + 1,
    )
    refused("prompt_embeddings is missing", prompt_embeddings=None)
    refused(
        r"encoder.vectors is \(4, 32\) in the file, \(5, 32\)",
        **{"encoder.vectors": good["encoder.vectors"][:4].copy()},
    )
    refused("encoder.more belongs to no module", **{"encoder.more": good["encoder.vectors"]})
    refused(
        "encoder.layers.2.bias has 32 values that are NaN", **{"encoder.layers.2.bias": np.full(32, np.nan, "float32")}
    )
    jaxft.save_adapter(jaxft.attach(model, jaxft.PrefixTuning(3)), tmp_path)
    with pytest.raises(jaxft.CheckpointError, match=r"prompt_embeddings is \(3, 64\) in the file, \(3, 96\)"):
        jaxft.load_adapter(tiny_llama(num_hidden_layers=3), tmp_path)


def test_a_prompt_that_is_off_pushes_nothing_out_of_a_window():
    three = {"a": 3, "b": 6, "c": 3}
    model = MODELS["mistral"]()
    for seed, (name, places) in enumerate(three.items()):
        model = adapted("mistral", jaxft.PromptTuning(places), name=name, seed=seed, base=model)
    ids_, off = ids(), jaxft.set_adapter(model, {"a": 1, "c": 1})
    np.testing.assert_allclose(off(ids_), jaxft.detach(off, "b")(ids_), atol=1e-6)
    assert np.abs(off(ids_) - model(ids_)).max() > 1e-3
