"""Adapter folders: what is in them, and everything that can be wrong with one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.methods import METHODS
from jaxft.methods.method import hang
from jaxft.models.seams import Delta
from jaxft.testing import tiny_gpt2, tiny_llama, token_batch

WEIGHTS = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def trained(method, model=None):
    state = jaxft.TrainState.create(model or tiny_llama(), method, optax.sgd(1.0))
    return jaxft.make_train_step(jaxft.losses.next_token_loss)(state, token_batch())[0]


@pytest.fixture
def folder(tmp_path):
    return jaxft.save_adapter(trained(jaxft.LoRA(r=2, alpha=4)), tmp_path / "adapter")


def configure(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / WEIGHTS)


def refused(folder, match, model=None, error=jaxft.CheckpointError):
    model = model or tiny_llama()
    before = {path: id(v) for path, v in jaxft.leaves(model).items()}
    with pytest.raises(error, match=match) as caught:
        jaxft.load_adapter(model, folder)
    assert {path: id(v) for path, v in jaxft.leaves(model).items()} == before
    return str(caught.value)


def test_names_and_shapes_are_those_of_peft(folder):
    shapes = {name: t.shape for name, t in load_file(folder / WEIGHTS).items()}
    prefix = "base_model.model.model.layers"
    want = {}
    for i in (0, 1):
        for module, out in (("q_proj", 32), ("v_proj", 16)):
            want[f"{prefix}.{i}.self_attn.{module}.lora_A.weight"] = (2, 32)
            want[f"{prefix}.{i}.self_attn.{module}.lora_B.weight"] = (out, 2)
    assert shapes == want
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 2, 4)
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["fan_in_fan_out"] is False


def test_gpt2_says_that_its_kernels_stand_the_other_way(tmp_path):
    jaxft.save_adapter(trained(jaxft.LoRA(r=2, bias="all"), tiny_gpt2()), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    names = set(load_file(tmp_path / WEIGHTS))
    assert "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias" in names
    assert "base_model.model.transformer.h.1.ln_1.bias" in names


def test_all_linear_is_written_as_names(tmp_path):
    jaxft.save_adapter(jaxft.attach(tiny_llama(), jaxft.LoRA(r=2, target_modules="all-linear")), tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize("method", [jaxft.BitFit(), jaxft.LoRA(r=2) | jaxft.BitFit()], ids=["bitfit", "union"])
def test_what_peft_does_not_know(method, tmp_path):
    state = trained(method, tiny_gpt2())
    jaxft.save_adapter(state, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "JAXFT" and config["jaxft_method"][-1] == {"name": "bitfit", "create": False}
    ids = token_batch()["input_ids"]
    model = tiny_gpt2()
    np.testing.assert_array_equal(jaxft.load_adapter(model, tmp_path)(ids), state.model(ids))
    np.testing.assert_array_equal(model(ids), tiny_gpt2()(ids))


def test_the_first_is_active_and_the_second_waits(folder):
    model = jaxft.load_adapter(jaxft.load_adapter(tiny_llama(), folder, name="a"), folder, name="b")
    assert model.adapter_weights.get_value().tolist() == [1, 0]
    off = jaxft.load_adapter(jaxft.set_adapter(jaxft.detach(model, "b"), None), folder, name="c")
    assert off.adapter_weights.get_value().tolist() == [0, 1]
    with pytest.raises(jaxft.MethodError, match="already has an adapter 'a'"):
        jaxft.load_adapter(model, folder, name="a")


@pytest.mark.slow
def test_loading_a_second_changes_nothing_about_the_first(tmp_path):
    """Heads included, in either order."""
    ids, outs = token_batch()["input_ids"], {}
    for name, seed in (("a", 0), ("b", 1)):
        method = jaxft.LoRA(r=2, modules_to_save=("lm_head",))
        state = jaxft.TrainState.create(tiny_llama(), method, optax.sgd(1.0), seed=seed)
        state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, token_batch(seed=seed))
        jaxft.save_adapter(state, tmp_path / name)
        outs[name] = state.model(ids)
    for order in ("ab", "ba"):
        model = tiny_llama()
        for name in order:
            model = jaxft.load_adapter(model, tmp_path / name, name=name)
        for name in order:
            np.testing.assert_array_equal(jaxft.set_adapter(model, name)(ids), outs[name])


def test_a_model_from_a_state_or_a_model(folder, tmp_path):
    again = jaxft.save_adapter(jaxft.load_adapter(tiny_llama(), folder, name="x"), tmp_path / "x", name="x")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_what_is_no_adapter(tmp_path):
    for model, match in (
        (tiny_llama(), "no adapter 'default' to save; the model carries none"),
        (jaxft.attach(tiny_llama(), jaxft.LoRA(r=2), name="x"), r"carries \['x'\]"),
        (trained(jaxft.Full()), "write it with jaxft.save_model"),
    ):
        with pytest.raises(jaxft.MethodError, match=match):
            jaxft.save_adapter(model, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_missing_and_damaged_files(folder, tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    whole = (folder / WEIGHTS).read_bytes()
    for size in (0, 50, len(whole) - 4):
        (folder / WEIGHTS).write_bytes(whole[:size])
        refused(folder, "not a whole safetensors file")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    text = refused(folder, "holds no adapter_model.safetensors")
    assert "adapter_model.bin, a pickle" in text and "PeftModel" in text
    (folder / "adapter_config.json").write_text("{")
    refused(folder, "not valid JSON")
    (folder / "adapter_config.json").unlink()
    refused(folder, "holds no adapter_config.json")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"peft_type": "IA3"}, "feedforward_modules is missing"),
        ({"peft_type": None}, "peft_type None is not supported"),
        ({"r": None}, "r is missing"),
        ({"use_dora": True}, "q_proj.lora_magnitude_vector is missing"),
        ({"trainable_token_indices": [1]}, "embed_tokens.token_adapter.trainable_tokens_delta is missing"),
        ({"lora_bias": True, "use_qalora": True}, "lora_bias=True, use_qalora=True"),
        ({"something_new": 3}, "something_new=3"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16' changed the base model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"jaxft_method": [{"name": "magic"}]}, "no method of jaxft is made by"),
        ({"jaxft_method": []}, "jaxft_method is a list of methods"),
        ({"jaxft_method": "lora"}, "jaxft_method is a list of methods"),
        ({"rank_pattern": {"(": 3}}, "is not a regular expression"),
        ({"target_modules": 5}, "target_modules"),
        ({"trainable_token_indices": 5}, "adapter_config.json: .*\n.*trainable_tokens=5: give ids of tokens"),
        ({"jaxft_method": [{"name": "lora", "r": 0}]}, "adapter_config.json: .*\n.*r=0: a rank is a whole number"),
        ({"jaxft_method": [{"name": "full"}]}, "adapter_config.json: Full trains the whole model"),
        (
            {"jaxft_method": [{"name": "ia3", "feedforward_modules": "("}]},
            r"adapter_config.json: feedforward_modules='\(' is not a regular expression",
        ),
    ],
)
def test_configs_that_cannot_be_read(folder, changes, match):
    configure(folder, **changes)
    refused(folder, match)


def test_an_ia3_config_with_a_number_for_names(tmp_path):
    folder = jaxft.save_adapter(jaxft.attach(tiny_llama(), jaxft.IA3()), tmp_path)
    configure(folder, feedforward_modules=3)
    refused(folder, r"adapter_config.json: .*\n.*feedforward_modules=\(3,\): give names")


def test_a_mistake_that_is_not_the_folder_s(folder):
    with pytest.raises(jaxft.MethodError, match="^adapter name 'my-name'"):
        jaxft.load_adapter(tiny_llama(), folder, name="my-name")
    with pytest.raises(jaxft.MethodError, match="^a model is expected, this is a TrainState: give state.model"):
        jaxft.load_adapter(trained(jaxft.LoRA(r=2)), folder)


def test_shapes_for_arrays(folder, tmp_path):
    abstract = jax.eval_shape(lambda: jaxft.attach(tiny_llama(), jaxft.LoRA(r=2)))
    for write in (jaxft.save_adapter, jaxft.save_serving):
        with pytest.raises(jaxft.MethodError, match="has shapes for arrays .*load it whole to save its adapters"):
            write(abstract, tmp_path / "out")
    with pytest.raises(jaxft.MethodError, match="has shapes for arrays .*load it whole to load an adapter"):
        jaxft.load_adapter(abstract, folder, name="b")
    assert not (tmp_path / "out").exists()


class Shift(nnx.Module):
    """What a person's own method hangs."""

    layers_held = None

    def __init__(self):
        self.by = Delta(jnp.zeros(32), axes=(None,))


@dataclasses.dataclass(frozen=True)
class Shifts(jaxft.Method):
    def fill(self, model, name, key):
        hang(model.lm_head, "delta", name, Shift())


def test_a_method_of_ones_own(tmp_path, monkeypatch):
    model = jaxft.attach(tiny_llama(), Shifts())
    with pytest.raises(jaxft.MethodError, match="Shifts has no entry in jaxft.methods.METHODS"):
        jaxft.save_adapter(model, tmp_path / "out")
    monkeypatch.setitem(METHODS, "shifts", Shifts)
    with pytest.raises(jaxft.MethodError, match="lm_head has a Shift in its slot `delta`, .* jaxft.interop.entries"):
        jaxft.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_names_what_is_not_there(folder):
    configure(folder, target_modules=["query"])
    refused(folder, "target_modules='query' matches no linear layer", error=jaxft.SelectionError)
    configure(folder, target_modules=["q_proj"], r=0)
    refused(folder, "r=0: a rank is a whole number of at least 1")


def test_an_adapter_of_another_base(folder):
    wider = tiny_llama(hidden_size=40, head_dim=8)
    text = refused(folder, "does not fit its adapter_config.json and this base model", wider)
    first = text.splitlines()[1]
    assert "lora_A.weight is (2, 32) in the file, (2, 40) in this model" in first
    text = refused(folder, "does not fit", tiny_llama(num_hidden_layers=1))
    assert "model.layers.1.self_attn.q_proj.lora_A.weight belongs to no module that the config names" in text
    text = refused(folder, "does not fit", tiny_llama(num_hidden_layers=3))
    assert "model.layers.2.self_attn.q_proj.lora_A.weight is missing" in text


def test_extra_missing_and_misnamed_tensors(folder):
    def change(tensors):
        tensors[Q0.replace("base_model.model.", "")] = tensors.pop(Q0)
        tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = np.ones((2, 32), np.float32)

    rewrite(folder, change)
    text = refused(folder, "does not fit")
    assert f"{Q0} is missing" in text
    assert text.count("belongs to no module that the config names") == 2


def test_config_and_tensors_disagree_on_the_rank(folder):
    configure(folder, r=4)
    refused(folder, r"lora_A.weight is \(2, 32\) in the file, \(4, 32\) in this model")


@pytest.mark.parametrize("poison", [np.nan, -np.inf])
def test_weights_that_are_not_finite(folder, poison):
    rewrite(folder, lambda tensors: tensors[Q0].__setitem__((0, 0), poison))
    text = refused(folder, "damaged weights")
    assert f"{Q0} has 1 values that are NaN or infinite" in text


def test_the_repeated_head_must_be_the_base(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    folder = jaxft.save_adapter(trained(jaxft.LoRA(r=2, target_modules=("lm_head",)), base), tmp_path)
    repeated = "base_model.model.lm_head.base_layer.weight"
    rewrite(folder, lambda t: t.__setitem__(repeated, np.array(base.tied_kernel()).T))
    jaxft.load_adapter(base, folder)
    rewrite(folder, lambda t: t.__setitem__(repeated, t[repeated] + 1))
    refused(folder, "lm_head.base_layer.weight differs from the base model's tensor", base)


def test_stored_in_float32_over_a_narrow_base(tmp_path):
    state = trained(jaxft.LoRA(r=2), tiny_llama(dtype=jnp.bfloat16))
    jaxft.save_adapter(state, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {np.dtype(np.float32)}


def test_biases_over_a_narrow_base_come_back_in_float32(tmp_path):
    """In bfloat16 a small update would vanish."""
    state = trained(jaxft.BitFit(), tiny_gpt2(dtype=jnp.bfloat16))
    jaxft.save_adapter(state, tmp_path)
    again = jaxft.load_adapter(tiny_gpt2(dtype=jnp.bfloat16), tmp_path)
    for path, value in jaxft.leaves(state.trainable).items():
        np.testing.assert_array_equal(jaxft.leaves(again)[path], value)
        assert jaxft.leaves(again)[path].dtype == jnp.float32


def test_a_file_is_no_folder_to_write_to(folder):
    with pytest.raises(jaxft.CheckpointError, match="is a file; give a folder to write to"):
        jaxft.save_adapter(jaxft.attach(tiny_llama(), jaxft.LoRA(r=2)), folder / WEIGHTS)
