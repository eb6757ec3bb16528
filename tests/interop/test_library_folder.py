"""Folders of the adapters library: what is in them, and everything that can be wrong with one."""

import json
import shutil

import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.interop.adapters import config_of, method_of
from jaxft.models.hub import abstract_model
from jaxft.testing import tiny_gpt2, tiny_llama, tiny_model, token_batch

WEIGHTS = "adapter.safetensors"
UP0 = "model.layers.0.output_adapters.adapters.default.adapter_up.weight"
IDS = token_batch()["input_ids"]


def filled(method, model=None, name="default"):
    """A model whose adapter does something."""
    model = jaxft.attach(tiny_llama() if model is None else model, method, name=name)
    for path, variable in jaxft.models.names.variables(model).items():
        if ".join." in path or path.endswith(".b"):
            variable.set_value(variable.get_value() + 0.1)
    return model


@pytest.fixture(scope="module")
def llama():
    """One base for all: `refused` sees to it that it stays as it is."""
    return tiny_llama()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return jaxft.save_adapter(filled(jaxft.Adapter(size=4)), tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def configure(folder, drop=(), top=None, **options):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | (top or {})
    if isinstance(config["config"], dict):
        config["config"] = {k: v for k, v in (config["config"] | options).items() if k not in drop}
    file.write_text(json.dumps(config))


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder, match, model):
    before = {path: id(v) for path, v in jaxft.leaves(model).items()}
    with pytest.raises(jaxft.CheckpointError, match=match) as caught:
        jaxft.load_adapter(model, folder)
    assert {path: id(v) for path, v in jaxft.leaves(model).items()} == before
    return str(caught.value)


def test_names_and_shapes_are_those_of_the_library(tmp_path):
    method = jaxft.Adapter(kind="houlsby", size=5, scale="learned", layers=(1,))
    folder = jaxft.save_adapter(filled(method, tiny_gpt2(), "mine"), tmp_path, name="mine")
    want = {
        f"transformer.h.1.{site}_adapters.adapters.mine.{leaf}": shape
        for site in ("attention", "output")
        for leaf, shape in {
            **{"adapter_down.0.weight": (5, 32), "adapter_down.0.bias": (5,), "adapter_up.weight": (32, 5)},
            **{"adapter_up.bias": (32,), "scaling": (1,)},
        }.items()
    }
    assert {key: t.shape for key, t in load_file(folder / WEIGHTS).items()} == want
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["name"], config["model_type"], config["hidden_size"]) == ("mine", "gpt2", 32)
    options = config["config"]
    assert (options["scaling"], options["leave_out"], options["mh_adapter"]) == ("learned", [0], True)
    assert int(32 // options["reduction_factor"]) == 5
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.safetensors", "adapter_config.json"]


def test_every_size_comes_back():
    """The library knows only a factor, and rounds down."""
    for width in (32, 40):
        model = abstract_model(tiny_llama().config.replace(hidden_size=width))
        for size in range(1, width + 1):
            config = config_of(jaxft.Adapter(size=size), model, "x")
            assert method_of(config, model, "here").width(width) == size


@pytest.mark.parametrize(
    ("method", "model"),
    [
        (jaxft.Adapter(kind="parallel", parallel_input="normed"), tiny_llama),
        (jaxft.Adapter(kind="houlsby"), lambda: tiny_model("gemma3_text")),
        (jaxft.Adapter(kind="parallel", size=3, layers=(1,), scale="learned") | jaxft.LoRA(r=2), tiny_llama),
    ],
    ids=["option", "family", "union"],
)
def test_what_the_library_does_not_know(method, model, tmp_path):
    adapted = filled(method, model())
    jaxft.save_adapter(jaxft.attach(tiny_llama(), jaxft.Adapter()), tmp_path)
    jaxft.save_adapter(adapted, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "JAXFT"
    assert not (tmp_path / WEIGHTS).exists()
    again = jaxft.load_adapter(model(), tmp_path)
    assert jaxft.adapters(again)["default"] == method
    np.testing.assert_array_equal(again(IDS), adapted(IDS))


def test_one_kind_of_folder_after_the_other(folder):
    before = tiny_llama()(IDS)
    jaxft.save_adapter(filled(jaxft.LoRA(r=2)), folder)
    assert not (folder / WEIGHTS).exists()
    assert np.abs(jaxft.load_adapter(tiny_llama(), folder)(IDS) - before).max() > 1e-3


def test_another_name_here(folder, tmp_path):
    model = jaxft.load_adapter(tiny_llama(), folder, name="french")
    np.testing.assert_array_equal(model(IDS), filled(jaxft.Adapter(size=4))(IDS))
    again = jaxft.save_adapter(model, tmp_path / "b", name="french")
    assert {".french." in key for key in load_file(again / WEIGHTS)} == {True}


def test_goes_on_training(folder):
    state = jaxft.TrainState.create(jaxft.load_adapter(tiny_llama(), folder), jaxft.Adapter(size=4), optax.sgd(0.1))
    assert len(jaxft.leaves(state.trainable)) == 4


def test_a_folder_by_hand_needs_four_keys(folder):
    """Without a version, a gelu is what older ones of the library meant by it."""
    needed = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 8, "non_linearity": "gelu"}
    (folder / "adapter_config.json").write_text(json.dumps({"name": "default", "config": needed}))
    rewrite(folder, lambda t: t.update({k.replace("output_", "attention_"): v for k, v in t.items()}))
    method = jaxft.adapters(jaxft.load_adapter(tiny_llama(), folder))["default"]
    assert method == jaxft.Adapter(kind="houlsby", reduction_factor=8, non_linearity="gelu_new", init="bert")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ln_after": True, "use_gating": True}, "use_gating=True is not supported, only False is"),
        ({"inv_adapter": "nice"}, "inv_adapter='nice' is not supported, only None is"),
        ({"phm_layer": True}, "phm_layer=True"),
        ({"stochastic_depth": 0.1}, "stochastic_depth=0.1"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln='post_add'"),
        ({"original_ln_after": False}, "original_ln_after=False"),
        ({"original_ln_before": False}, "original_ln_before=False: there are those of pfeiffer, houlsby, parallel"),
        ({"output_adapter": False, "mh_adapter": True}, "mh_adapter=True, output_adapter=False"),
        ({"scaling": "channel"}, "scale='channel': give a finite number"),
        ({"non_linearity": "mish"}, "non_linearity='mish'"),
        ({"non_linearity": 3}, "non_linearity=3: the name of an activation is expected"),
        (
            {"reduction_factor": {"0": 8, "default": 16}},
            "reduction_factor={.*}: one number for all layers is supported",
        ),
        ({"reduction_factor": "x"}, "reduction_factor='x': give a number"),
        ({"leave_out": [7]}, r"leave_out names layers \[7\], this model has 2"),
        ({"leave_out": "x"}, "leave_out='x': indices of layers are expected"),
        ({"leave_out": [0, 1]}, "layers=\\(\\): give indices of layers, at least one"),
        ({"dropout": 2}, "dropout=2"),
        ({"something_new": 1}, "something_new=1 is not known"),
        ({"drop": ("non_linearity",)}, "non_linearity is missing"),
        ({"top": {"name": None}}, "name=None: the adapter's name is a text"),
        ({"top": {"config": "pfeiffer"}}, "config 'pfeiffer' is not supported; bottleneck adapters with options are"),
        ({"architecture": "lora", "drop": ("scaling",)}, "config 'lora' is not supported"),
    ],
)
def test_configs_that_cannot_be_read(folder, options, match, llama):
    configure(folder, **options)
    refused(folder, match, llama)


def test_all_that_is_wrong_at_once(folder, llama):
    configure(folder, ln_after=True, use_gating=True, new=1, drop=("mh_adapter",))
    assert len(refused(folder, "not a bottleneck adapter that we compute", llama).splitlines()) == 5


def test_the_name_in_the_tensors_must_be_the_config_s(folder, llama):
    """The library would load nothing, silently."""
    configure(folder, top={"name": "other"})
    refused(folder, "the config's name is 'other', the tensors of adapter.safetensors are of default", llama)


def test_an_adapter_of_another_base(folder):
    text = refused(folder, "does not fit its adapter_config.json and this base model", tiny_llama(hidden_size=40))
    assert "adapter_down.0.weight is (4, 32) in the file, (5, 40) in this model" in text
    text = refused(folder, "does not fit", tiny_llama(num_hidden_layers=1))
    assert "model.layers.1.output_adapters.adapters.default.adapter_up.bias belongs to no module" in text
    text = refused(folder, "does not fit", tiny_gpt2())
    assert "transformer.h.0.output_adapters.adapters.default.adapter_down.0.weight is missing" in text


def test_extra_missing_misnamed_and_damaged_tensors(folder, llama):
    def change(tensors):
        tensors[UP0.replace("model.layers", "layers")] = tensors.pop(UP0)
        tensors[UP0.replace("up.weight", "up.scale")] = np.ones(3, np.float32)

    whole = load_file(folder / WEIGHTS)
    rewrite(folder, change)
    text = refused(folder, "does not fit", llama)
    assert f"{UP0} is missing" in text and text.count("belongs to no module that the config names") == 2
    save_file(whole, folder / WEIGHTS)
    rewrite(folder, lambda t: t[UP0].__setitem__((0, 0), np.nan))
    assert f"{UP0} has 1 values that are NaN or infinite" in refused(folder, "damaged weights", llama)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-4])
    refused(folder, "not a whole safetensors file", llama)


def test_a_pickle_is_not_read(folder, llama):
    (folder / WEIGHTS).rename(folder / "pytorch_adapter.bin")
    text = refused(folder, "holds no adapter.safetensors", llama)
    assert "pytorch_adapter.bin, a pickle" in text and "use_safetensors=True" in text
