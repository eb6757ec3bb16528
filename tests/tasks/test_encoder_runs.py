"""Classification and contrastive tuning of texts, from the command line to what a finished run is used for."""

import json

import jax
import numpy as np
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.models.tensors import Tensors

CLASSES = {
    "cat": ["the cat", "cat on it", "a cat and", "it cat"],
    "mat": ["the mat", "mat at", "on the mat", "mat end"],
}
LABELLED = [{"text": text, "label": name} for name, texts in CLASSES.items() for text in texts]
SCORED = [
    {"sentence1": a["text"], "sentence2": b["text"], "score": 5 if a["label"] == b["label"] else i % 3}
    for i, (a, b) in enumerate(zip(LABELLED, LABELLED[2:] + LABELLED[:2], strict=True))
]
PAIRS = [{"anchor": row["text"], "positive": f"{row['label']} {i}"} for i, row in enumerate(LABELLED)]
CONFIG = """task: {task}
model: {{path: base}}
method: {{name: lora, r: 2, dropout: 0.1}}
data: {{train: {rows}, eval: {rows}, format: {form}{more}}}
optimizer: {{learning_rate: 1e-2}}
train: {{steps: 4, batch_size: 4, log_every: 2, save_every: 2}}
{section}
output: {name}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder and rows of every format."""
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(jaxft.testing.tiny_bert(vocab_size=300), where / "base", make_tokenizer())
    for name, rows in (("labelled", LABELLED), ("scored", SCORED), ("pairs", PAIRS)):
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


@pytest.fixture
def train(place, run):
    """Return a function that trains a config: exit code, stdout, stderr."""

    def go(name, task, form, rows, section="", more="", *args):
        text = CONFIG.format(name=name, task=task, form=form, rows=f"{rows}.jsonl", section=section, more=more)
        (place / f"{name}.yaml").write_text(text)
        return run("train", f"{name}.yaml", *args)

    return go


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def tensors(folder):
    with Tensors(folder / "adapter", "adapter_model.safetensors") as t:
        return {name: t.read(name) for name in t.shapes}


def test_classes(place, train, run):
    code, out, err = train("classes", "classify", "labelled", "labelled")
    assert code == 0, err
    assert {"eval_loss", "eval_accuracy", "eval_f1"} <= set(summary(place / "classes")["after"])
    assert "eval_f1" in out
    assert "expected 'cat'" in out
    head = tensors(place / "classes")["base_model.model.classifier.weight"]
    assert head.shape == (2, 32)
    model, tokenizer = jaxft.load(place / "classes")
    assert model.config.labels == ("cat", "mat")
    ids = np.array([tokenizer("the cat")["input_ids"]])
    assert model(ids).shape == (1, 2)
    code, out, _ = run("evaluate", "classes")
    after = summary(place / "classes")["after"]
    assert (code, f"eval_accuracy {after['eval_accuracy']:.6f}" in out) == (0, True)
    code, out, err = run("export", "classes", "--format", "merged", "--output", "classes-merged")
    assert code == 0, err
    config = json.loads((place / "classes-merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "mat"}
    merged, _ = jaxft.load(place / "classes-merged")
    np.testing.assert_allclose(merged(ids), model(ids), atol=1e-5)


@pytest.mark.slow
def test_vectors_first_and_then_the_head(place, train):
    code, _, err = train("turn", "classify", "labelled", "labelled", "classify: {contrastive_steps: 2}")
    assert code == 0, err
    rows = [json.loads(line) for line in (place / "turn" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 4]
    code, _, err = train("none", "classify", "labelled", "labelled", "classify: {contrastive_steps: 4}")
    assert (code, "classify.contrastive_steps: 4 of 4 steps" in err) == (2, True)


@pytest.mark.slow
def test_numbers(place, train):
    rows = [{"text": row["sentence1"], "text_pair": row["sentence2"], "label": row["score"] / 5} for row in SCORED]
    (place / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = train("numbers", "classify", "labelled", "numbers", "classify: {problem: regression}")
    assert code == 0, err
    assert {"eval_loss", "eval_pearson", "eval_spearman"} <= set(summary(place / "numbers")["after"])
    assert jaxft.load(place / "numbers")[0].config.labels == ("score",)


@pytest.mark.slow
def test_scored_pairs_and_going_on(place, train, run, monkeypatch):
    more = ", score_range: [0, 5]"
    code, _, err = train("scored", "contrastive", "scored_pairs", "scored", more=more)
    assert code == 0, err
    found = summary(place / "scored")
    assert {"eval_loss", "eval_pearson", "eval_spearman"} <= set(found["after"])
    assert (place / "scored" / "report" / "embedding.png").stat().st_size > 5000
    from jaxft.train.checkpoint import Checkpoints

    save = Checkpoints.save

    def fail(self, state):
        save(self, state)
        if int(state.step) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", fail)
    args = ("scored2", "contrastive", "scored_pairs", "scored", "", more)
    assert train(*args)[0] == 130
    monkeypatch.setattr(Checkpoints, "save", save)
    code, out, err = train(*args, "--resume")
    assert (code, "going on after step 2" in out) == (0, True), err
    assert all(np.array_equal(x, tensors(place / "scored")[name]) for name, x in tensors(place / "scored2").items())


@pytest.mark.slow
def test_pairs_with_a_temperature_that_is_learned(place, train):
    section = "contrastive: {learn_temperature: true, symmetric: true, chunk: 2}"
    code, _, err = train("pairs", "contrastive", "pairs", "pairs", section)
    assert code == 0, err
    assert {"eval_loss", "eval_recall_at_1", "eval_recall_at_5", "eval_mrr"} <= set(summary(place / "pairs")["after"])
    model, _ = jaxft.load(place / "pairs")
    assert model.temperature is not None


@pytest.mark.slow
def test_classes_pulled_together_and_gone_on_from(place, train):
    code, _, err = train("pulled", "contrastive", "labelled", "labelled")
    assert code == 0, err
    assert {"eval_loss", "eval_knn_accuracy", "eval_probe_accuracy"} <= set(summary(place / "pulled")["after"])
    code, _, err = train("over", "classify", "labelled", "labelled", "", "", "--set", "model.path=pulled")
    assert code == 0, err
    model, _ = jaxft.load(place / "over")
    assert list(jaxft.adapters(model)) == ["default", "default_2"]
    assert model.config.labels == ("cat", "mat")


BAD = [
    ("classify", "labelled", {"text": "a", "label": ""}, "label: it is empty"),
    ("classify", "labelled", {"text": " ", "label": "cat"}, "text: it is empty"),
    ("contrastive", "scored_pairs", {"sentence1": "a", "sentence2": "b", "score": 7}, "score: 7 is outside 0 to 1"),
    ("contrastive", "pairs", {"anchor": "a"}, "positive: text is expected, the row has no such column"),
]


@pytest.mark.parametrize(("task", "form", "row", "reason"), BAD)
def test_bad_rows(place, train, task, form, row, reason):
    good = {"labelled": LABELLED, "pairs": PAIRS, "scored_pairs": [{**row, "score": 1} for row in SCORED]}[form]
    (place / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, row]))
    code, _, err = train("bad", task, form, "bad")
    assert (code, f"bad.jsonl:9: {reason}" in err) == (2, True), err
    assert not (place / "bad").exists()


def test_sets_that_cannot_be_learned_from(place, train):
    alone = [{"text": f"the {i}", "label": f"c{i}"} for i in range(8)]
    (place / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    code, _, err = train("alone", "contrastive", "labelled", "alone")
    assert (code, "every class has one row" in err) == (2, True)
    (place / "one.jsonl").write_text("".join(json.dumps({**row, "label": "x"}) + "\n" for row in alone))
    code, _, err = train("one", "classify", "labelled", "one")
    assert (code, "all rows are of the class 'x'" in err) == (2, True)
    (place / "held.jsonl").write_text(json.dumps({"text": "the", "label": "dog"}) + "\n")
    code, _, err = train("held", "classify", "labelled", "labelled", "", "", "--set", "data.eval=held.jsonl")
    assert (code, "held.jsonl:1: label: 'dog' is none of the 2 classes" in err) == (2, True), err


@pytest.mark.slow
def test_a_text_longer_than_the_table_is_cut(place, train):
    rows = [{**LABELLED[0], "text": "x" * 400}, *LABELLED[1:]]
    (place / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = train("long", "classify", "labelled", "long")
    assert code == 0, err
    assert "8 rows of long, 1 cut" in out
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tensors(place / "long")))
