"""Folders of sentence-transformers: what is written is read again, and what is not computed here is refused by name."""

import json
import shutil

import jax
import numpy as np
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.embedding import longest
from jaxft.errors import CheckpointError, MethodError
from jaxft.loading import with_config, with_pooling
from jaxft.models.hub import read_config
from jaxft.models.names import variables
from jaxft.models.pooling import POOLINGS
from jaxft.models.sentence_folder import read_sentence_folder

TEXTS = ["the cat sat", "on the mat", "it is THE end of the cat on the mat"]


@pytest.fixture(scope="module")
def words():
    return make_tokenizer()


@pytest.fixture(scope="module")
def bert():
    return jaxft.testing.tiny_bert(vocab_size=300)


@pytest.fixture
def folder(bert, words, tmp_path):
    said = with_config(bert, normalize=True, max_seq_length=6)
    return jaxft.save_sentence_transformer(said, tmp_path / "st", words, prompts={"query": "q: "})


def change(file, **keys):
    """Rewrite a JSON file with other keys; None takes one out."""
    raw = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def shaken(model):
    for path, variable in variables(model).items():
        if path.endswith((".a", ".b")):
            value = variable.get_value()
            variable.set_value(value + 0.1 * jax.random.normal(jax.random.key(len(path)), value.shape))
    return model


def test_every_mode_is_read_as_it_was_written(bert, words, tmp_path):
    for n, mode in enumerate(POOLINGS):
        said = with_config(bert, pooling=mode, normalize=n % 2 == 0, max_seq_length=5 + n)
        model, tokenizer = jaxft.load(jaxft.save_sentence_transformer(said, tmp_path / mode, words))
        found = (model.config.pooling, model.config.normalize, model.config.max_seq_length)
        assert found == (mode, n % 2 == 0, 5 + n)
    assert n == 5
    np.testing.assert_array_equal(jaxft.embed(model, tokenizer, TEXTS), jaxft.embed(said, words, TEXTS))


def test_the_new_layout(folder):
    """That of version 5.4 and later: other types, one key for the mode, the length with the tokenizer."""
    want = jaxft.embed(*jaxft.load(folder), TEXTS)
    kinds = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling")
    kinds += ("base.modules.normalize.Normalize",)
    modules = json.loads((folder / "modules.json").read_text())
    modules = [{**m, "type": f"sentence_transformers.{kind}"} for m, kind in zip(modules, kinds, strict=True)]
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = {"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    said = {"transformer_task": "feature-extraction", "modality_config": {"text": text}}
    file = folder / "sentence_bert_config.json"
    file.write_text(json.dumps({**said, "module_output_name": "token_embeddings"}))
    change(folder / "tokenizer_config.json", model_max_length=6)
    assert read_config(folder).max_seq_length == 6
    np.testing.assert_array_equal(jaxft.embed(*jaxft.load(folder), TEXTS), want)


def test_the_transformer_in_a_folder_of_its_own(folder):
    """As old versions wrote it; the adapter's folder names the base by the place of its config.json."""
    want = jaxft.embed(*jaxft.load(folder), TEXTS)
    (folder / "0_Transformer").mkdir()
    for file in list(folder.iterdir()):
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(folder / "0_Transformer" / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    model, tokenizer = jaxft.load(folder)
    np.testing.assert_array_equal(jaxft.embed(model, tokenizer, TEXTS), want)
    out = jaxft.save_sentence_transformer(jaxft.attach(model, jaxft.LoRA(r=2)), folder.parent / "adapter", tokenizer)
    named = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((folder / "0_Transformer").resolve())


def test_lower_case(folder):
    model, tokenizer = jaxft.load(folder)
    before = jaxft.embed(model, tokenizer, ["THE CAT", "the cat"])
    assert np.abs(before[0] - before[1]).max() > 1e-3
    change(folder / "sentence_bert_config.json", do_lower_case=True)
    model, tokenizer = jaxft.load(folder)
    after = jaxft.embed(model, tokenizer, ["THE CAT", "the cat"])
    np.testing.assert_array_equal(after, [before[1], before[1]])
    jaxft.save_sentence_transformer(model, folder.parent / "again", tokenizer)
    assert read_sentence_folder(folder.parent / "again").lower_case


@pytest.mark.parametrize("make", [jaxft.testing.tiny_bert, jaxft.testing.tiny_llama, jaxft.testing.tiny_gpt2])
def test_an_adapter_beside_the_name_of_its_base(make, words, tmp_path):
    """Keys are the backbone's own; whole names of modules lose its name too."""
    jaxft.save_model(make(vocab_size=300), tmp_path / "base", words)
    model, tokenizer = jaxft.load(tmp_path / "base")
    model = with_config(model, pooling="mean", normalize=True, max_seq_length=5)
    for method in (jaxft.LoRA(r=2, rank_pattern={r"1\..*": 1}), jaxft.IA3()):
        adapted = shaken(jaxft.attach(model, method))
        folder = jaxft.save_sentence_transformer(adapted, tmp_path / "st", tokenizer)
        prefix = f".{model.prefix}." if model.prefix else ".bert."
        with jaxft.models.tensors.Tensors(folder, "adapter_model.safetensors") as tensors:
            assert tensors.shapes and not any(prefix in key.removeprefix("base_model.model") for key in tensors.shapes)
        assert not (folder / "config.json").exists()
        again, words_again = jaxft.load(folder)
        assert (again.config.pooling, again.config.normalize, again.config.max_seq_length) == ("mean", True, 5)
        np.testing.assert_array_equal(
            jaxft.embed(again, words_again, TEXTS),
            jaxft.embed(adapted, tokenizer, TEXTS),
            err_msg=type(method).__name__,
        )
    jaxft.save_sentence_transformer(model, folder, tokenizer)  # over the adapter, of which nothing may be left
    assert not jaxft.adapters(jaxft.load(folder)[0])


def test_prompts_and_pad_token_are_kept(folder, bert):
    assert read_sentence_folder(folder).prompts == {"query": "q: "}
    _, tokenizer = jaxft.load(folder)
    assert tokenizer.pad_token == "</s>"
    assert longest(jaxft.load(folder)[0]) == 6


ODD = {
    "Dense": ("modules.json", None, "Transformer, Pooling, Dense"),
    "several modes": ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "2 modes at once"),
    "unknown mode": ("1_Pooling/config.json", {"pooling_mode": "median"}, "'median' is not known"),
    "unknown key": ("1_Pooling/config.json", {"gain": 2}, "gain=2 is not known"),
    "prompts left out": ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt=False"),
    "a prompt by default": (
        "config_sentence_transformers.json",
        {"default_prompt_name": "query"},
        "'q: ' before every",
    ),
    "another kind of model": ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
    "a setting": ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim=8"),
    "a task": ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "fill-mask"),
    "model arguments": ("sentence_bert_config.json", {"model_args": {"x": 1}}, "model_args"),
    "length": ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length is 0"),
    "normalised tokens": ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "token_embeddings"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_not_computed_is_refused_by_name(case, folder):
    name, keys, says = ODD[case]
    if keys is None:
        modules = json.loads((folder / name).read_text())
        modules[2]["type"] = "sentence_transformers.models.Dense"
        (folder / name).write_text(json.dumps(modules))
    else:
        change(folder / name, **keys)
    with pytest.raises(CheckpointError, match=says):
        jaxft.load(folder)


def test_all_that_is_wrong_is_said_at_once(folder):
    change(folder / "1_Pooling" / "config.json", gain=2)
    change(folder / "sentence_bert_config.json", model_args={"x": 1})
    with pytest.raises(CheckpointError, match=r"(?s)gain=2.*model_args"):
        jaxft.load(folder)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc"])
def test_a_path_out_of_the_folder(path, folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="leaves the folder"):
        jaxft.load(folder)


def test_files_that_are_missing(folder):
    shutil.rmtree(folder / "1_Pooling")
    with pytest.raises(CheckpointError, match=r"1_Pooling holds no config\.json"):
        jaxft.load(folder)
    (folder / "modules.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a list is expected"):
        jaxft.load(folder)


def test_what_no_folder_can_hold(bert, words, tmp_path):
    def refused(model, says):
        with pytest.raises(MethodError, match=says):
            jaxft.save_sentence_transformer(model, tmp_path / "no", words)

    jaxft.save_model(bert, tmp_path / "base", words)
    loaded, _ = jaxft.load(tmp_path / "base")
    refused(jaxft.testing.tiny_vit(), "reads no texts")
    refused(jaxft.attach(bert, jaxft.LoRA(r=2)), "no folder that the adapter could name")
    refused(jaxft.attach(loaded, jaxft.PromptTuning(num_virtual_tokens=2)), "one adapter, a LoRA or IA3")
    refused(jaxft.attach(jaxft.attach(loaded, jaxft.LoRA(r=2)), jaxft.LoRA(r=2), name="b"), r"default \(LoRA\), b")
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300), tmp_path / "llama", words)
    llama, _ = jaxft.load(tmp_path / "llama")
    refused(jaxft.attach(llama, jaxft.LoRA(r=2, target_modules=r".*\.q_proj")), "regular expression")
    refused(jaxft.attach(llama, jaxft.LoRA(r=2, target_modules=("lm_head",))), "no tensor of the backbone")


def test_a_head_over_the_pooled_vector(bert, words, tmp_path):
    """That library reads the backbone, so that the folder is its family's; ours finds the head as it was."""
    jaxft.save_model(bert, tmp_path / "base", words)
    model = with_pooling(jaxft.load(tmp_path / "base", labels=("a", "b"))[0], "mean")
    folder = jaxft.save_sentence_transformer(model, tmp_path / "st", words)
    raw = json.loads((folder / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("bert", ["BertForSequenceClassification"])
    assert np.array_equal(jaxft.load(folder)[0]([[5, 6]]), model([[5, 6]]))


def test_an_adapter_that_is_refused_leaves_the_folder(words, tmp_path):
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300), tmp_path / "base", words)
    model, _ = jaxft.load(tmp_path / "base")
    folder = jaxft.save_sentence_transformer(jaxft.attach(model, jaxft.LoRA(r=2)), tmp_path / "st", words)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(MethodError, match="no tensor of the backbone"):
        jaxft.save_sentence_transformer(jaxft.attach(model, jaxft.LoRA(r=2, target_modules=("lm_head",))), folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
