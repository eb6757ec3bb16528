"""Classification heads: where they come from, what they read, and that a new one trains whatever the method."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.loading import with_pooling
from jaxft.methods.method import Method
from jaxft.models import CLASSIFIERS, FAMILIES
from jaxft.models.hub import fresh_model, read_config, read_shape
from jaxft.testing import tiny_bert, tiny_gpt2, tiny_llama

ROW = [5, 6, 7, 8, 9]
PADDED = {
    "input_ids": jnp.array([[*ROW, 9, 9], [9, 9, *ROW]]),
    "attention_mask": jnp.array([[1] * 5 + [0] * 2, [0] * 2 + [1] * 5]),
}
MAKERS = {"bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2}
LABELS = ("bad", "so so", "good")


class NormsOnly(Method):
    """A person's own, which knows nothing of heads."""

    def trains(self, path, variable, name):
        return path.endswith(".scale")


METHODS = {
    "lora": jaxft.LoRA(r=2),
    "lora-saved": jaxft.LoRA(r=2, modules_to_save=("classifier",)),
    "lora-biases": jaxft.LoRA(r=2, bias="all"),
    "bitfit": jaxft.BitFit(),
    "prefix": jaxft.PrefixTuning(num_virtual_tokens=2),
    "prompt": jaxft.PromptTuning(num_virtual_tokens=2),
    "own": NormsOnly(),
    "union": jaxft.LoRA(r=2) | jaxft.BitFit(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint without a classification head of each of three families."""
    return {name: jaxft.save_model(make(), tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@jax.jit
def squared(model, batch, *, key):
    """A model loss, of rows that are to give one-hot logits."""
    logits = model(**{k: batch[k] for k in model.inputs if k in batch}, key=key)
    return jnp.square(logits - jax.nn.one_hot(batch["targets"], logits.shape[-1])).sum(), logits.shape[0], {}


def test_every_family_has_a_classifier():
    assert CLASSIFIERS.keys() | {"vit"} == FAMILIES.keys() and len(CLASSIFIERS) >= 10
    assert all(CLASSIFIERS[m].config_class is FAMILIES[m].config_class for m in CLASSIFIERS)


@pytest.mark.parametrize("family", MAKERS)
def test_padded_left_and_right(family, folders):
    """The last real token by the mask, the first likewise; a pad id that is a token's changes nothing."""
    model, _ = jaxft.load(folders[family], labels=LABELS)
    logits = model(**PADDED)
    np.testing.assert_allclose(logits, jnp.tile(model([ROW]), (2, 1)), atol=1e-6)
    assert logits.shape == (2, 3) and jnp.abs(logits).max() > 1e-3
    with pytest.raises(jaxft.BatchError, match="a packed row holds several texts"):
        model.answer({**PADDED, "segment_ids": PADDED["attention_mask"]}, None)


def test_kept_or_new(folders, tmp_path):
    """A head is kept where it is for the same classes, or for as many that have no names."""
    first, _ = jaxft.load(folders["bert"], labels=LABELS)
    folder = jaxft.save_model(first, tmp_path / "first")
    raw = json.loads((folder / "config.json").read_text())
    assert raw["id2label"] == {"0": "bad", "1": "so so", "2": "good"} and raw["label2id"]["good"] == 2
    assert raw["problem_type"] == "single_label_classification"

    def head(labels):
        model, _ = jaxft.load(folder, labels=labels)
        leaf = model.classifier.kernel
        return (
            leaf.get_value(),
            leaf.get_metadata("new", False),
            model.bert.pooler.dense.kernel.get_metadata("new", False),
        )

    for labels, new in ((None, False), (LABELS, False), (("a", "b", "c"), True), (("score",), True)):
        kernel, is_new, pooler_is_new = head(labels)
        assert (is_new, pooler_is_new) == (new, False)
        assert kernel.shape[1] == len(labels or LABELS)
    plain, _ = jaxft.load(folder, labels=())
    assert type(plain).__name__ == "BertModel" and jnp.array_equal(plain([ROW]), jaxft.load(folders["bert"])[0]([ROW]))
    raw["id2label"] = {str(i): f"LABEL_{i}" for i in range(3)}
    (folder / "config.json").write_text(json.dumps(raw))
    assert not head(("a", "b", "c"))[1]
    one = jaxft.save_model(jaxft.load(folder, labels=("score",))[0], tmp_path / "one")
    assert json.loads((one / "config.json").read_text())["problem_type"] == "regression"


def test_a_pooler_that_a_checkpoint_lacks_is_new(folders, tmp_path):
    plain, _ = jaxft.load(folders["bert"])
    plain.pooler = None
    model, _ = jaxft.load(jaxft.save_model(plain, tmp_path), labels=LABELS)
    trained = jaxft.leaves(jaxft.partition(model, jaxft.LoRA(r=2))[0])
    assert {p.split(".saved")[0] for p in trained if ".saved." in p} == {"classifier", "bert.pooler.dense"}
    folder = jaxft.save_adapter(jaxft.attach(model, jaxft.LoRA(r=2)), tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier",
        "score",
        "pooler",
    ]
    again = jaxft.load_adapter(model, folder)
    assert jnp.array_equal(again(**PADDED), model(**PADDED))


QUICK = ("lora", "prefix", "own")
SWEEP = [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


@pytest.mark.parametrize("method", SWEEP)
def test_a_new_head_trains_whatever_the_method(method, folders, tmp_path):
    """Law 7: its copy learns, the base stays, the folder holds it, and merging puts it in."""
    model, _ = jaxft.load(folders["bert"], labels=LABELS)
    before = {path: np.array(v) for path, v in jaxft.leaves(model).items()}
    state = jaxft.TrainState.create(model, METHODS[method], optax.sgd(0.1))
    copies = {f"classifier.saved.default.{leaf}" for leaf in ("kernel", "bias")}
    start = {path: np.array(v) for path, v in jaxft.leaves(state.trainable).items()}
    assert copies <= start.keys() and not {"classifier.kernel", "classifier.bias"} & start.keys()
    state, metrics = jaxft.make_train_step(squared)(state, {**PADDED, "targets": jnp.array([2, 0])})
    assert float(metrics["loss"]) > 0
    trained = jaxft.leaves(state.trainable)
    assert all((trained[path] != start[path]).any() for path in copies)
    assert all(np.array_equal(before[path], v) for path, v in jaxft.leaves(model).items())
    off = jaxft.set_adapter(state.model, None)
    if method not in ("bitfit", "union", "own"):
        assert jnp.array_equal(off(**PADDED), model(**PADDED))
    if method == "own":
        return  # no folder can name it
    folder = jaxft.save_adapter(state, tmp_path / "adapter")
    again = jaxft.load_adapter(model, folder)
    want = state.model(**PADDED)
    assert jnp.array_equal(again(**PADDED), want)
    again = jaxft.TrainState.create(again, METHODS[method], optax.sgd(0.1))
    assert jaxft.leaves(again.trainable).keys() == trained.keys()
    if method in ("prefix", "prompt"):
        assert "base_model.classifier.weight" in load_file(folder / "adapter_model.safetensors")
        return
    merged = jaxft.merge(state.model)
    np.testing.assert_allclose(merged(**PADDED), want, atol=1e-6)
    kept, _ = jaxft.load(jaxft.save_model(merged, tmp_path / "merged"))
    assert jnp.array_equal(kept(**PADDED), merged(**PADDED)) and kept.config.labels == LABELS
    for whole in (merged, kept):
        assert not any(".saved." in p for p in jaxft.leaves(jaxft.partition(whole, jaxft.LoRA(r=2))[0]))


def test_full_trains_a_new_head_in_its_place(folders):
    model, _ = jaxft.load(folders["llama"], labels=LABELS)
    state = jaxft.TrainState.create(model, jaxft.Full(), optax.sgd(0.1))
    trained = jaxft.leaves(state.trainable)
    assert "score.kernel" in trained and not any(".saved." in path for path in trained)
    assert jaxft.adapters(state.model) == {}


def test_an_adapter_of_a_head_that_is_no_longer_new(folders, tmp_path):
    """A folder with a copy of the head loads over a base whose head is kept, and goes on training it."""
    new, _ = jaxft.load(folders["bert"], labels=LABELS)
    adapted = jaxft.attach(new, jaxft.BitFit())
    adapted.classifier.saved["default"].kernel.set_value(jnp.ones((32, 3)))
    folder = jaxft.save_adapter(adapted, tmp_path / "adapter")
    kept, _ = jaxft.load(jaxft.save_model(new, tmp_path / "kept"))
    loaded = jaxft.load_adapter(kept, folder)
    assert jnp.array_equal(loaded(**PADDED), adapted(**PADDED))
    for method in (None, jaxft.BitFit()):
        assert "classifier.saved.default.kernel" in jaxft.leaves(jaxft.partition(loaded, method)[0])
    low = jaxft.load_adapter(kept, jaxft.save_adapter(jaxft.attach(new, jaxft.LoRA(r=2)), tmp_path / "low"))
    assert "classifier.saved.default.kernel" in jaxft.leaves(jaxft.partition(low, jaxft.LoRA(r=2))[0])
    other = jaxft.attach(loaded, jaxft.LoRA(r=2), name="other")
    assert not any(".saved.other." in path for path in jaxft.leaves(other))


def test_heads_of_several_adapters(folders):
    """Their mean is a head; a weighted sum of low-rank products would have none."""
    model, _ = jaxft.load(folders["bert"], labels=LABELS)
    for name, seed in (("a", 0), ("b", 1)):
        model = jaxft.set_adapter(jaxft.attach(model, jaxft.LoRA(r=2), name=name, seed=seed), None)
    model.classifier.saved["a"].kernel.set_value(jnp.ones((32, 3)))
    model.classifier.saved["b"].kernel.set_value(3 * jnp.ones((32, 3)))
    mean = jaxft.average_adapters(model, ["a", "b"], name="c")
    np.testing.assert_array_equal(mean.classifier.saved["c"].kernel.get_value(), 2 * jnp.ones((32, 3)))
    with pytest.raises(jaxft.MethodError, match="'a' has a copy of the head classifier, and heads do not add up"):
        jaxft.add_weighted_adapter(model, {"a": 0.5, "b": 0.5}, name="d")


def test_what_is_refused(folders, tmp_path):
    with pytest.raises(jaxft.CheckpointError, match="'a' is there twice"):
        jaxft.load(folders["bert"], labels=("a", "a"))
    with pytest.raises(jaxft.CheckpointError, match="give the names of the classes"):
        jaxft.load(folders["bert"], labels="good")
    model, _ = jaxft.load(folders["bert"], labels=LABELS)
    folder = jaxft.save_adapter(jaxft.attach(model, jaxft.LoRA(r=2)), tmp_path)
    with pytest.raises(jaxft.CheckpointError, match=r"the adapter of a classifier, .* labels=\.\.\."):
        jaxft.load_adapter(jaxft.load(folders["bert"])[0], folder)
    with pytest.raises(jaxft.CheckpointError, match=r"for the classes \['bad', 'so so', 'good'\], .*\['a', 'b'\]"):
        jaxft.load_adapter(jaxft.load(folders["bert"], labels=("a", "b"))[0], folder)
    (folder / "labels.json").unlink()
    with pytest.raises(jaxft.CheckpointError, match=r"classifier\.weight is \(3, 32\) in the file, \(2, 32\) in this"):
        jaxft.load_adapter(jaxft.load(folders["bert"], labels=("a", "b"))[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["modules_to_save"].append("gate")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(jaxft.SelectionError, match="modules_to_save='gate' matches no module"):
        jaxft.load_adapter(model, folder)


def test_shapes_alone(folders):
    model, _ = jaxft.load(folders["bert"], labels=LABELS, abstract=True)
    report = jaxft.parameter_report(model, jaxft.LoRA(r=2))
    assert report.modules["classifier"] == 99


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_head_over_the_pooled_vector(folders, tmp_path, family):
    """With another pooling the head reads that vector, and a folder of ours remembers it."""
    plain, _ = jaxft.load(folders[family], labels=LABELS)
    model = with_pooling(plain, "mean")
    head = model.classifier if family == "bert" else model.score
    want = jaxft.models.pooling.pool(model.hidden(**PADDED), PADDED["attention_mask"], "mean") @ head.kernel.get_value()
    np.testing.assert_allclose(model(**PADDED), want, atol=1e-6)
    assert np.abs(model(**PADDED) - plain(**PADDED)).max() > 1e-3
    again, _ = jaxft.load(jaxft.save_model(model, tmp_path))
    assert jnp.array_equal(again(**PADDED), model(**PADDED))


def test_the_names_of_an_adapters_classes(folders, tmp_path):
    """In another order the answers would be swapped: refused; a base without names takes any."""
    model, _ = jaxft.load(folders["bert"], labels=("neg", "pos"))
    swapped, _ = jaxft.load(folders["bert"], labels=("pos", "neg"))
    nameless, _ = jaxft.load(folders["bert"], labels=("LABEL_0", "LABEL_1"))
    for n, method in enumerate((jaxft.LoRA(r=2), jaxft.Adapter(reduction_factor=8))):
        folder = jaxft.save_adapter(jaxft.attach(model, method), tmp_path / str(n))
        if n:
            (folder / "labels.json").unlink()  # as the adapters library writes it, which names them in its own file
        with pytest.raises(jaxft.CheckpointError, match=r"classes \['neg', 'pos'\], .*\['pos', 'neg'\]"):
            jaxft.load_adapter(swapped, folder)
        assert jaxft.load_adapter(model, folder)(**PADDED).shape == (2, 2)
        assert jaxft.load_adapter(nameless, folder)(**PADDED).shape == (2, 2)


def test_how_an_adapters_head_is_pooled(folders, tmp_path):
    """Its folder says it; peft would read another vector, so that such a folder is ours alone."""
    plain, _ = jaxft.load(folders["bert"], labels=LABELS)
    model = with_pooling(plain, "mean")
    folder = jaxft.save_adapter(jaxft.attach(model, jaxft.LoRA(r=2)), tmp_path / "mean")
    assert json.loads((folder / "labels.json").read_text())["head_pooling"] == "mean"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "JAXFT"
    assert jnp.array_equal(jaxft.load_adapter(model, folder)(**PADDED), model(**PADDED))
    with pytest.raises(jaxft.CheckpointError, match=r"pooled by 'mean'.*jaxft\.loading\.with_pooling\(model, 'mean'\)"):
        jaxft.load_adapter(plain, folder)
    folder = jaxft.save_adapter(jaxft.attach(plain, jaxft.LoRA(r=2)), tmp_path / "own")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(
        jaxft.CheckpointError, match=r"BertForSequenceClassification itself reads, .*head_pooling=None\)"
    ):
        jaxft.load_adapter(model, folder)


def test_a_folder_that_transformers_would_misread(folders, tmp_path):
    """A head over another vector than the family's is of a model_type of ours, which is loud there."""
    plain, _ = jaxft.load(folders["bert"], labels=LABELS)
    folder = jaxft.save_model(with_pooling(plain, "mean"), tmp_path / "mean")
    raw = json.loads((folder / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("jaxft_bert", ["JaxftBertForSequenceClassification"])
    again, _ = jaxft.load(folder)
    assert again.config.head_pooling == "mean" and again.config.labels == LABELS
    again.config = again.config.replace(head_pooling=None)
    raw = json.loads((jaxft.save_model(again, tmp_path / "own") / "config.json").read_text())
    assert raw["model_type"] == "bert" and "jaxft_head_pooling" not in raw
    # BERT has a pooler before its head, which a pooled vector passes over; the others read the vector itself.
    assert with_pooling(plain, "cls").head_pooling == "cls"
    llama, _ = jaxft.load(folders["llama"], labels=LABELS)
    same = with_pooling(llama, "last")
    assert same.head_pooling is None and jnp.array_equal(same(**PADDED), llama(**PADDED))
    raw = json.loads((jaxft.save_model(same, tmp_path / "last") / "config.json").read_text())
    assert raw["model_type"] == "llama" and "jaxft_head_pooling" not in raw
    assert with_pooling(jaxft.testing.tiny_bert(), "mean").head_pooling is None  # there is no head


def test_a_head_that_is_damaged_is_no_new_one(folders, tmp_path):
    """One that is there is kept whole or refused; one that is not there is new where classes are asked for."""
    folder = jaxft.save_model(jaxft.load(folders["bert"], labels=LABELS)[0], tmp_path)
    whole = load_file(folder / "model.safetensors")
    head = ("classifier.weight", "classifier.bias")

    def write(tensors):
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")

    write({k: v for k, v in whole.items() if k != "classifier.bias"})
    for labels in (None, LABELS):
        with pytest.raises(jaxft.CheckpointError, match=r"classifier\.bias is missing"):
            jaxft.load(folder, labels=labels)
    write({**whole, "classifier.weight": whole["classifier.weight"][:2]})
    with pytest.raises(jaxft.CheckpointError, match=r"classifier\.weight is \(2, 32\) on disk, \(3, 32\) by config"):
        jaxft.load(folder)
    write({**whole, "bert.pooler.dense.bias": np.zeros(3, np.float32)})
    with pytest.raises(jaxft.CheckpointError, match=r"bert\.pooler\.dense\.bias is \(3,\) on disk"):
        jaxft.load(folder, labels=("a", "b"))
    write({k: v for k, v in whole.items() if k not in head})
    with pytest.raises(jaxft.CheckpointError, match=r"classifier\.weight is missing"):
        jaxft.load(folder)
    assert jaxft.load(folder, labels=LABELS)[0].classifier.kernel.get_metadata("new")


def test_a_trained_head_that_is_discarded_is_said(folders, tmp_path, caplog):
    folder = jaxft.save_model(jaxft.load(folders["bert"], labels=("a", "b"))[0], tmp_path)
    for labels in (("a", "b"), (), None):
        jaxft.load(folder, labels=labels)
    assert not caplog.records
    jaxft.load(folder, labels=("b", "a"))
    assert "['a', 'b'] is discarded for a new one for ['b', 'a']" in caplog.text


def test_heads_of_a_kind_that_is_not_read(folders, tmp_path):
    """Labels that may hold together, and several numbers: by name; the body is read where no such head is wanted."""
    folder = jaxft.save_model(jaxft.load(folders["bert"], labels=("a", "b"))[0], tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    for kind, match in (("multi_label_classification", "multi_label"), ("regression", "a regression of 2 outputs")):
        (folder / "config.json").write_text(json.dumps({**raw, "problem_type": kind}))
        for labels in (None, ("a", "b")):
            if labels is None:
                with pytest.raises(jaxft.CheckpointError, match=match):
                    jaxft.load(folder)
            else:
                assert jaxft.load(folder, labels=labels)[0].classifier.kernel.get_metadata("new")
        assert jaxft.load(folder, labels=())[0].config.labels == ()


def test_random_with_a_head(folders, tmp_path):
    """A shape with labels of one's own is a classifier from scratch."""
    config = read_config(folders["bert"], labels=LABELS)
    assert config.labels == LABELS and fresh_model(config)(**PADDED).shape == (2, 3)
    assert read_shape(folders["bert"] / "config.json", labels=["a", "b"]).labels == ("a", "b")
    with pytest.raises(jaxft.CheckpointError, match="'a' is there twice"):
        read_shape(folders["bert"] / "config.json", labels=("a", "a"))
    for labels in (3, "good", (1, 2)):
        with pytest.raises(jaxft.CheckpointError, match="give the names of the classes"):
            jaxft.load(folders["bert"], labels=labels)
    raw = json.loads((folders["bert"] / "config.json").read_text())
    for key, name in (("max_position_embeddings", "n_positions"), ("type_vocab_size", "type_vocab_size")):
        (tmp_path / "config.json").write_text(json.dumps({**raw, key: "64"}))
        with pytest.raises(jaxft.CheckpointError, match=f"{name} is '64'"):
            read_config(tmp_path)


def test_a_new_pooler_is_no_target(folders, tmp_path):
    """It is copied whole, as the head is: no product is hung there too."""
    plain, _ = jaxft.load(folders["bert"])
    plain.pooler = None
    model, _ = jaxft.load(jaxft.save_model(plain, tmp_path), labels=LABELS)
    for targets in (("dense",), "all-linear"):
        paths = jaxft.leaves(jaxft.attach(model, jaxft.LoRA(r=2, target_modules=targets)))
        assert not any(path.startswith("bert.pooler.dense.delta") for path in paths)
        assert "bert.pooler.dense.saved.default.kernel" in paths
        assert "bert.encoder.layer.output.dense.delta.default.a" in paths


def test_a_headless_adapter_below_a_new_head(folders, tmp_path):
    """Going on with it would leave the random head as it is."""
    plain = jaxft.attach(jaxft.load(folders["llama"], labels=())[0], jaxft.BitFit(create=True))
    folder = jaxft.save_adapter(plain, tmp_path)
    model = jaxft.load_adapter(jaxft.load(folders["llama"], labels=LABELS)[0], folder)
    for method in (None, jaxft.LoRA(r=2), jaxft.adapters(model)["default"]):
        match = "describe" if isinstance(method, jaxft.LoRA) else r"(?s)head is new.*attach a new.*score\.kernel"
        with pytest.raises(jaxft.MethodError, match=match):
            jaxft.TrainState.create(model, method, optax.sgd(0.1))
    jaxft.TrainState.create(jaxft.attach(model, jaxft.LoRA(r=2), name="over"), None, optax.sgd(0.1), name="over")


def test_a_head_that_weighs_nothing_is_not_merged(folders):
    model, _ = jaxft.load(folders["bert"], labels=LABELS)
    adapted = jaxft.set_adapter(jaxft.attach(model, jaxft.LoRA(r=2)), None)
    adapted = jaxft.attach(adapted, jaxft.LoRA(r=2), name="b")
    off, on = jaxft.merge(jaxft.set_adapter(adapted, None)), jaxft.merge(jaxft.set_adapter(adapted, "b"))
    assert off.classifier.kernel.get_metadata("new") and not on.classifier.kernel.get_metadata("new")


def test_a_decoders_classifier_without_its_head(folders, tmp_path):
    folder = jaxft.save_model(jaxft.load(folders["llama"], labels=LABELS)[0], tmp_path)
    plain, _ = jaxft.load(folder, labels=())
    assert plain.lm_head is None
    np.testing.assert_array_equal(plain.hidden(jnp.array([ROW])), jaxft.load(folder)[0].hidden(jnp.array([ROW])))


def test_what_a_config_said_of_another_head_is_gone(folders, tmp_path):
    raw = json.loads((folders["bert"] / "config.json").read_text())
    old = {"num_labels": 5, "id2label": {"0": "x"}, "label2id": {"x": 0}, "problem_type": "regression"}
    base = tmp_path / "base"
    shutil.copytree(folders["bert"], base)
    (base / "config.json").write_text(json.dumps({**raw, **old}))
    model, _ = jaxft.load(base, labels=LABELS)
    raw = json.loads((jaxft.save_model(model, tmp_path / "new") / "config.json").read_text())
    assert "num_labels" not in raw and raw["problem_type"] == "single_label_classification"
    raw = json.loads((jaxft.save_model(jaxft.load(base)[0], tmp_path / "plain") / "config.json").read_text())
    assert not old.keys() & raw.keys()
