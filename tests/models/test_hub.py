"""Folders in and out: dtypes, shards, the hub's own cache, and everything that can be wrong with a folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.models.hub import _maker, fresh_model
from jaxft.testing import tiny_gpt2, tiny_llama, tiny_model, token_batch

MODELS = {
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "mistral": lambda: tiny_model("mistral"),
    "qwen2": lambda: tiny_model("qwen2"),
    "qwen3": lambda: tiny_model("qwen3", attention_bias=True),
    "gemma2": lambda: tiny_model("gemma2"),
    "gemma3": lambda: tiny_model("gemma3_text", tie_word_embeddings=False),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
IDS = token_batch()["input_ids"]


@pytest.fixture
def folder(tmp_path):
    return jaxft.save_model(tiny_llama(), tmp_path / "model")


def rewrite(folder, change):
    """Change the tensors of a folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)


def refused(folder, match, **options):
    with pytest.raises(jaxft.CheckpointError, match=match) as caught:
        jaxft.load(folder, **options)
    return str(caught.value)


@every_model
def test_there_and_back_is_bitwise(make, tmp_path):
    model = make()
    for shard_bytes, files in ((10**9, 1), (20_000, 2)):
        target = jaxft.save_model(model, tmp_path, shard_bytes=shard_bytes)
        assert len(list(target.glob("*.safetensors"))) >= files
        again, tokenizer = jaxft.load(target)
        assert tokenizer is None
        ours, theirs = jaxft.leaves(model), jaxft.leaves(again)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[path], theirs[path]) for path in ours)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes(stored, tmp_path):
    jaxft.save_model(tiny_llama(dtype=stored), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == stored
    own, wide = jaxft.load(tmp_path)[0], jaxft.load(tmp_path, dtype="float32")[0]
    assert own.dtype == jnp.dtype(stored) and wide.dtype == jnp.float32
    assert {v.dtype for v in jaxft.leaves(own).values()} == {jnp.dtype(stored)}
    for a, b in zip(jaxft.leaves(own).values(), jaxft.leaves(wide).values(), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b)


@every_model
def test_shapes_for_arrays(make, tmp_path):
    """`abstract=True` needs no weights, and reports what a loaded model reports."""
    jaxft.save_model(make(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model, _ = jaxft.load(tmp_path, abstract=True, dtype="bfloat16")
    assert all(isinstance(v, jax.ShapeDtypeStruct) and v.dtype == jnp.bfloat16 for v in jax.tree.leaves(model))
    method = jaxft.LoRA(r=2, target_modules="all-linear")
    assert str(jaxft.parameter_report(model, method)) == str(jaxft.parameter_report(make(), method))


def test_a_big_shape_needs_no_memory(tmp_path):
    raw = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model, _ = jaxft.load(tmp_path, abstract=True)
    report = jaxft.parameter_report(model, jaxft.LoRA(r=16, target_modules="all-linear"))
    assert report.trainable == 207_093_760
    assert report.total - report.trainable == 70_553_706_496


def test_the_hub_cache(tmp_path, monkeypatch):
    """The hub's own code finds a snapshot in its cache, offline."""
    from huggingface_hub import constants

    repo = tmp_path / "models--someone--tiny"
    jaxft.save_model(tiny_llama(), repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, _ = jaxft.load("someone/tiny")
    np.testing.assert_array_equal(model(IDS), tiny_llama()(IDS))
    assert model.config.source == "someone/tiny"
    refused("someone/else", "someone/else: no such folder here, and the hub gave none")


def test_a_backbone_without_prefix_and_with_buffers(tmp_path):
    """What old GPT-2 checkpoints look like: no `transformer.`, causal masks among the tensors, the tied head again."""
    model = tiny_gpt2()
    jaxft.save_model(model, tmp_path)

    def old(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"]
        for i in (0, 1):
            tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 128, 128), np.float32))

    rewrite(tmp_path, old)
    np.testing.assert_array_equal(jaxft.load(tmp_path)[0](IDS), model(IDS))


def test_stop_tokens_are_a_union(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert jaxft.load(folder)[0].config.stop_ids == (2, 7)


def test_missing_things(folder, tmp_path):
    refused(tmp_path / "nowhere", "no such folder here")
    refused(folder / "config.json", "is a file; give the folder")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = refused(folder, "holds no model.safetensors")
    assert "pytorch_model.bin, a pickle" in text and "`LlamaForCausalLM.from_pretrained(folder).save_pretr" in text
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "Give a folder that transformers or peft has saved")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    refused(folder, "names files that are missing: model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "not an index of safetensors files")
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json")


@pytest.mark.parametrize("size", [0, 4, 100, 20_000, -1])
def test_truncated(folder, size):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:size])
    refused(folder, r"not a whole safetensors file \([\d,]+ bytes")


def test_config_that_cannot_be(folder):
    good = json.loads((folder / "config.json").read_text())
    cases = [
        ({"model_type": "t5"}, "model_type 't5' is not supported; there are llama, mistral, qwen2, "),
        ({"hidden_act": "snake"}, "hidden_act 'snake' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope type 'yarn' is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": None}, "lacks the key 'hidden_size'"),
        ({"hidden_size": "wide"}, "a value of a wrong kind"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
    ]
    for change, match in cases:
        raw = {k: v for k, v in {**good, **change}.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(raw))
        refused(folder, match)
    (folder / "config.json").write_text("{broken")
    refused(folder, "not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "a JSON object is expected")


def test_remat_that_is_none(folder):
    refused(folder, "remat='some': choose one of 'none', 'full'", remat="some")


def test_tensors_that_do_not_fit_are_all_named(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_projection.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]

    rewrite(folder, change)
    text = refused(folder, "its tensors are not those of a llama")
    for line in (
        "model.layers.0.self_attn.q_proj.weight is missing",
        "model.layers.0.self_attn.q_projection.weight is not a tensor of this model",
        "model.layers.2.mlp.up_proj.weight is not a tensor of this model",
        "model.norm.weight is (31,) on disk, (32,) by config.json",
    ):
        assert line in text


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_weights_that_are_not_finite(folder, poison):
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((0, 3), poison))
    text = refused(folder, "damaged weights")
    assert "model.layers.1.mlp.up_proj.weight has 1 values that are NaN or infinite" in text
    assert "layers.0" not in text


def test_weights_that_are_no_floats(folder):
    rewrite(folder, lambda tensors: tensors.__setitem__("model.norm.weight", np.ones(32, np.int32)))
    refused(folder, "model.norm.weight is I32; weights are floats")


def test_an_adapter_is_no_model(folder, tmp_path):
    adapter = jaxft.save_adapter(jaxft.attach(tiny_llama(), jaxft.LoRA(r=2)), tmp_path / "adapter")
    refused(adapter, "is an adapter: load its base model, then jaxft.load_adapter")


def test_a_model_with_adapters_is_not_written(tmp_path):
    with pytest.raises(jaxft.MethodError, match="carries adapters"):
        jaxft.save_model(jaxft.attach(tiny_llama(), jaxft.LoRA(r=2)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_files(folder, monkeypatch):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    class Broken:
        def save_pretrained(self, where):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        jaxft.save_model(tiny_llama(seed=1), folder, Broken())
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_a_head_that_is_not_the_embedding_it_is_tied_to(tmp_path):
    jaxft.save_model(tiny_llama(tie_word_embeddings=True), tmp_path)
    table = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: tensors.__setitem__("lm_head.weight", tensors[table]))
    jaxft.load(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.__setitem__("lm_head.weight", tensors[table] + 1))
    refused(tmp_path, "lm_head.weight differs from the embedding: set tie_word_embeddings to false there")


def test_dtypes_that_do_not_fit(folder):
    for dtype in ("int8", "foo", 3):
        refused(folder, "give float32, bfloat16 or float16", dtype=dtype)
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1e30))
    refused(folder, "model.norm.scale has values too large for float16: load a wider dtype", dtype="float16")


def test_buffers_that_are_no_floats_do_not_matter(tmp_path):
    jaxft.save_model(tiny_gpt2(), tmp_path)
    rewrite(tmp_path, lambda t: t.__setitem__("transformer.h.0.attn.bias", np.ones((1, 1, 128, 128), np.uint8)))
    np.testing.assert_array_equal(jaxft.load(tmp_path)[0](IDS), tiny_gpt2()(IDS))


@pytest.mark.parametrize("index", ["[1]", '"x"', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}', "{"])
def test_a_damaged_index(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json")


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text("{}")
    refused(folder, "its tokenizer cannot be read")


def test_other_files_in_the_folder_stay(folder):
    (folder / "model_backup.safetensors").write_bytes(b"mine")
    jaxft.save_model(tiny_llama(), folder, shard_bytes=20_000)
    assert (folder / "model_backup.safetensors").exists() and not (folder / "model.safetensors").exists()


def test_an_abstract_model_is_neither_trained_nor_written(folder, tmp_path):
    import optax

    model, _ = jaxft.load(folder, abstract=True)
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=2), optax.adam(1.0))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
    with pytest.raises(jaxft.MethodError, match="shapes for arrays"):
        jaxft.make_train_step(jaxft.losses.next_token_loss)(state, jaxft.testing.token_batch())
    with pytest.raises(jaxft.MethodError, match="has shapes for arrays"):
        jaxft.save_model(model, tmp_path / "x")


def test_a_random_model_is_compiled_once_for_its_seeds_and_keeps_its_own_config():
    config = tiny_llama().config
    models = {seed: fresh_model(config, seed) for seed in range(3)}
    assert _maker(config, config.raw, config.source)._cache_size() == 1
    first = {seed: np.asarray(jax.tree.leaves(model)[0]) for seed, model in models.items()}
    assert (first[0] != first[1]).any() and (first[0] == np.asarray(jax.tree.leaves(fresh_model(config, 0))[0])).all()
    other = config.replace(source="elsewhere")
    assert other == config and fresh_model(other).config.source == "elsewhere" != models[0].config.source
    assert models[1] is not fresh_model(config, 1)
