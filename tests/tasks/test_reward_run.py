"""A reward model from a config to a run: what is measured, what it is saved as, and what it is made of."""

import json

import jax
import numpy as np
import optax
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.config import load_config
from jaxft.losses.comparisons import answer_scores, make_reward_loss
from jaxft.models.hub import fresh_model
from jaxft.models.sharing import with_head
from jaxft.tasks.registry import task_of
from jaxft.testing import tiny_bert, tiny_gpt2, tiny_llama

CONFIG = """task: reward
model: {path: base}
method: {name: lora, r: 2, target_modules: all-linear}
data: {train: pairs.jsonl, eval: held.jsonl, format: preference, max_length: 40}
optimizer: {learning_rate: 1e-2}
train: {steps: 6, batch_size: 4, log_every: 2, eval_every: 3, save_every: 3}
evaluation: {samples: 2}
output: run
"""
WORDS = ["cat", "mat", "end", "it", "sat", "on"]
PAIRS = [{"prompt": f"the {w}", "chosen": f" {w}", "rejected": f" {WORDS[i - 5]} is"} for i, w in enumerate(WORDS)] * 2
LISTS = [
    {"prompt": row["prompt"], "answers": [row["chosen"], " on it", " the end"][: 2 + i % 2]}
    for i, row in enumerate(PAIRS)
]
FIGURES = {"loss", "accuracy", "margin", "chosen_score", "rejected_score", "brier", "calibration_error"}


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


FILE = "reward.yaml"  # what `done` trains


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(tiny_llama(vocab_size=300, eos_token_id=1), where / "base", make_tokenizer())
    jsonl(where / "pairs.jsonl", PAIRS)
    jsonl(where / "held.jsonl", [{**PAIRS[0], "chosen": " cat on the mat"}, *PAIRS[1:5]])  # a long one first
    jsonl(where / "lists.jsonl", LISTS)
    (where / "reward.yaml").write_text(CONFIG)
    return where


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def figures(out):
    return {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}


def test_a_run_learns_the_order_and_leaves_what_it_should(done):
    said = summary(done)
    assert set(said["before"]) == set(said["after"]) == {f"eval_{name}" for name in FIGURES}
    assert said["after"]["eval_loss"] < said["before"]["eval_loss"]
    assert said["after"]["eval_accuracy"] == 1 and said["after"]["eval_margin"] > 0.1
    assert 0 <= said["after"]["eval_calibration_error"] <= 0.5 and said["after"]["eval_brier"] < 0.25
    assert all((done / "report" / name).is_file() for name in ("curves.png", "scores.png"))
    samples = [json.loads(line) for line in (done / "samples.jsonl").read_text().splitlines()]
    assert (samples[0]["prompt"], samples[0]["expected"]) == ("the cat", " cat on the mat >  mat is")
    assert [len(row["answer"].split(" > ")) for row in samples] == [2] * 6


def test_evaluate_gives_the_figures_of_the_run(done, run):
    for what, end in ((done, "after"), ("reward.yaml", "before")):
        code, out, err = run("evaluate", what)
        assert code == 0, err
        assert figures(out) == pytest.approx(summary(done)[end], abs=2e-6)


def test_the_figures_are_those_of_the_scores(done, run):
    """Recomputed from what the loaded run says of each held-out row by itself."""
    model, tokenizer = jaxft.load(done)
    assert model.config.labels == ("score",)
    rows = jaxft.data.load_comparisons(done.parent / "held.jsonl", tokenizer, format="preference").examples
    scores = np.array([[float(model(a.input_ids[None])[0, 0]) for a in row.answers] for row in rows])
    after, apart = summary(done)["after"], scores[:, 0] - scores[:, 1]
    assert after["eval_margin"] == pytest.approx(apart.mean(), abs=1e-5)
    assert after["eval_loss"] == pytest.approx(np.log1p(np.exp(-apart)).mean(), abs=1e-5)
    assert after["eval_chosen_score"] == pytest.approx(scores[:, 0].mean(), abs=1e-5)
    samples = [json.loads(line)["answer"] for line in (done / "samples.jsonl").read_text().splitlines()]
    shown = [float(x) for row in samples[-2:] for x in row.split(" > ")]
    assert shown == pytest.approx(scores[[0, 2]].ravel(), abs=6e-4)  # each row has its own


def test_it_is_exported_whole_and_as_an_adapter(done, run, place):
    """The whole one says by which id its padding is known: one that is not the end token."""
    assert run("export", done, "--format", "merged", "--output", "out/merged")[0] == 0
    config = json.loads((place / "out/merged/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["id2label"], config["pad_token_id"], config["eos_token_id"]) == ({"0": "score"}, 0, 1)
    assert json.loads((place / "out/merged/tokenizer_config.json").read_text())["pad_token"] == "<s>"
    merged, tokenizer = jaxft.load("out/merged")
    whole, plain = jaxft.load(done)
    assert (tokenizer.pad_token_id, plain.pad_token_id) == (0, None)
    batch = {name: np.array(x) for name, x in tokenizer(["the cat</s>", "on the mat it</s>"], padding=True).items()}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    np.testing.assert_allclose(merged(**inputs), whole(**inputs), atol=1e-5)
    assert run("export", done, "--format", "peft", "--output", "out/peft")[0] == 0
    bare, _ = jaxft.load("base", labels=("score",))
    np.testing.assert_allclose(jaxft.load_adapter(bare, "out/peft")(**inputs), whole(**inputs), atol=1e-6)


@pytest.mark.parametrize("method", [None, "full"])
def test_a_reward_model_is_no_language_model(done, run, place, method):
    """To go on with by other tasks, or to write answers."""
    base = done
    if method == "full":
        base = place / "in_full"
        sets = ["method={name: full}", "train.steps=1", "data.eval=null"]
        code, _, err = run("train", "reward.yaml", "--output", base.name, *(x for s in sets for x in ("--set", s)))
        assert code == 0, err
    rows = {"sft": "prompt_completion", "dpo": "preference", "ppo": "prompt", "grpo": "prompt"}
    for task, form in rows.items():
        more = ["--set", f"{task}={{reward: length}}"] if form == "prompt" else []
        sets = [f"task={task}", f"model.path={base.name}", f"data.format={form}", "train.batch_size=8"]
        code, _, err = run("validate", "reward.yaml", *(x for s in sets for x in ("--set", s)), *more)
        expected = f"model.path: {base.name} is a reward model, which gives no probability to an answer; {task} begins"
        assert (code, expected in err) == (2, True), err
    code, _, err = run("generate", base, "--prompt", "the cat")
    assert code == 2 and "scores texts and writes none" in err and "TrainState" not in err


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("task", ["sft", "ppo"])
def test_a_classifier_s_folder_is_no_language_model(run, place, task, command):
    """Said before a row is read: the file of rows is not there."""
    base, tokenizer = jaxft.load("base", labels=("good", "bad"))
    jaxft.save_model(base, "classifier", tokenizer)
    form, more = ("prompt", ["--set", "ppo={reward: length}"]) if task == "ppo" else ("prompt_completion", [])
    sets = [f"task={task}", "model.path=classifier", f"data.format={form}", "data.train=none.jsonl"]
    code, _, err = run(command, "reward.yaml", *(x for s in sets for x in ("--set", s)), *more)
    expected = "model.path: classifier is a classifier (its config.json says so), which gives no probability"
    assert (code, expected in err) == (2, True), err


def test_options_that_do_not_go_together_are_said_at_once(run, place):
    text = CONFIG.replace("format: preference", "format: ranking") + "reward:\n  margin: 1.0\nmodle: {}\n"
    (place / "bad.yaml").write_text(text)
    code, _, err = run("validate", "bad.yaml")
    assert code == 2 and "bad.yaml:10: reward.margin: rows of format ranking have none" in err and "modle" in err
    text = CONFIG.replace("task: reward", "task: dpo") + "dpo:\n  kind: ipo\n  label_smoothing: 0.1\nmodle: {}\n"
    (place / "bad.yaml").write_text(text)
    code, _, err = run("validate", "bad.yaml")
    assert code == 2 and "bad.yaml:11: dpo.label_smoothing: ipo has none" in err and "modle" in err


def test_ranked_lists_and_pairs_go_together(run, place):
    """Of several sources each is measured; lists over all of their pairs."""
    both = "data.{}=[{{path: lists.jsonl, format: ranking}}, {{path: pairs.jsonl}}]"
    sets = [both.format("train"), both.format("eval"), "train.steps=2", "train.eval_every=2", "train.log_every=1"]
    code, _, err = run("train", "reward.yaml", "--output", "lists", *(x for s in sets for x in ("--set", s)))
    assert code == 0, err
    after = summary(place / "lists")["after"]
    assert {f"eval_{name}/{source}" for name in FIGURES for source in ("lists", "pairs")} < set(after)
    pairs, lists = len(PAIRS), sum(len(r["answers"]) * (len(r["answers"]) - 1) // 2 for r in LISTS)
    mean = (pairs * after["eval_margin/pairs"] + lists * after["eval_margin/lists"]) / (pairs + lists)
    assert after["eval_margin"] == pytest.approx(mean, abs=1e-6)
    code, out, _ = run("evaluate", "lists")
    assert figures(out) == pytest.approx(after, abs=2e-6)
    code, _, err = run("validate", "reward.yaml", "--set", both.format("train"), "--set", "reward.margin=1.0")
    assert (code, "reward.margin: rows of format ranking have none" in err) == (2, True)


def test_margins_of_rows_and_config(run, place):
    """A row's own is taken instead of the config's; centering adds the squared sums."""
    jsonl(place / "margins.jsonl", [{**row, "margin": 2.0 if i else None} for i, row in enumerate(PAIRS[:3])])
    for name, sets in {"none": [], "config": ["reward.margin=1.0"], "centred": ["reward.centering=10.0"]}.items():
        config = load_config(place / "reward.yaml", ["data.eval=margins.jsonl", f"output={name}", *sets])
        task = task_of(config)
        scores, there = np.array([[0.5, 0.0], [1.0, 2.0], [0.25, -0.75]]), np.ones((3, 2), bool)
        found = task.judge(scores, there, np.array([np.nan, 2.0, 2.0], np.float32))["loss"]
        wanted = [1.0 if name == "config" else 0.0, 2.0, 2.0]
        squares = 10 * scores.sum(1) ** 2 if name == "centred" else 0
        assert found == pytest.approx(
            (np.log1p(np.exp(wanted - scores[:, 0] + scores[:, 1])) + squares).mean(), rel=1e-5
        )
    code, out, _ = run("evaluate", "reward.yaml", "--set", "data.eval=margins.jsonl")
    own = figures(out)["eval_loss"]
    _, out, _ = run("evaluate", "reward.yaml", "--set", "data.eval=margins.jsonl", "--set", "reward.margin=1.0")
    assert code == 0 and own > 1.1  # two of three rows ask for a margin of 2
    assert figures(out)["eval_loss"] > own + 0.05


@pytest.mark.slow
def test_full_fine_tuning_leaves_a_classifier(run, place):
    sets = ["method={name: full}", "train.steps=1", "train.eval_every=1"]
    code, _, err = run("train", "reward.yaml", "--output", "full", *(x for s in sets for x in ("--set", s)))
    assert code == 0, err
    config = json.loads((place / "full/model/config.json").read_text())
    assert (config["id2label"], config["pad_token_id"]) == ({"0": "score"}, 0)
    code, out, _ = run("evaluate", "full")
    assert figures(out) == pytest.approx(summary(place / "full")["after"], abs=2e-6)


def test_an_encoder_scores_too(run, place):
    """`[CLS] prompt answer [SEP]`, tokenised apart."""
    tokenizer = make_tokenizer(eos_token=None, bos_token=None, cls_token="<s>", sep_token="</s>")
    jaxft.save_model(tiny_bert(vocab_size=300), place / "bert", tokenizer)
    config = load_config(place / "reward.yaml", [f"model.path={place}/bert", f"data.train={place}/pairs.jsonl"])
    task = task_of(config.model_copy(update={"data": config.data.model_copy(update={"eval": None})}))
    apart = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    best = task.load_data().train[0].examples[0].answers[0]
    assert best.input_ids.tolist() == [0, *apart("the cat"), *apart(" cat"), 1]
    code, out, err = run("evaluate", "reward.yaml", "--set", "model.path=bert")
    assert code == 0, err
    assert figures(out)["eval_loss"] == pytest.approx(np.log(2), abs=0.1)


@pytest.mark.parametrize("asked", [False, True])
def test_dropout_of_the_base_is_off_unless_asked(place, asked):
    """That of the method is on where its options say so."""
    if not (place / "gpt2").is_dir():
        jaxft.save_model(tiny_gpt2(vocab_size=300, resid_pdrop=0.5, embd_pdrop=0.5), place / "gpt2", make_tokenizer())
    sets = [f"model.path={place}/gpt2", f"reward.dropout={str(asked).lower()}"]
    ids = np.array([[5, 6, 7]])
    for dropout in (0.0, 0.5):
        config = load_config(place / "reward.yaml", [*sets, f"method={{name: lora, r: 2, dropout: {dropout}}}"])
        model = task_of(config).load_state(1, None, None).model
        model.transformer.h.attn.c_attn.delta.default.b.set_value(
            np.ones_like(model.transformer.h.attn.c_attn.delta.default.b[...])
        )
        same = bool((model(ids) == model(ids, key=jax.random.key(0))).all())
        assert same is (not asked and dropout == 0.0)
    assert json.loads(model.config.raw)["resid_pdrop"] == 0.5  # a folder that is written says it still


def test_a_tokenizer_of_another_model(run, place):
    jaxft.save_model(tiny_llama(vocab_size=100), place / "small", make_tokenizer())
    code, _, err = run("validate", "reward.yaml", "--set", "model.path=small")
    assert (code, "but the model knows 100: the tokenizer is not this model's" in err) == (2, True)


def test_rows_longer_than_the_model_has_positions(run, place):
    """They are left out and said; virtual tokens take their share."""
    jaxft.save_model(tiny_gpt2(vocab_size=300, n_positions=32), place / "short", make_tokenizer())
    jsonl(place / "long.jsonl", [*PAIRS, {**PAIRS[0], "chosen": " on" * 40}])
    sets = ["--set", "model.path=short", "--set", "data.train=long.jsonl", "--set", "train.steps=1"]
    code, out, err = run("validate", "reward.yaml", *sets)
    assert code == 0, err
    assert "1 rows left out" in out and "long.jsonl:13: 44 tokens, more than max_length 32" in out
    code, _, err = run(
        "validate", "reward.yaml", *sets, "--set", "method={name: prefix_tuning, num_virtual_tokens: 28}"
    )
    assert (code, "beside its virtual tokens: set data.max_length to 4" in err) == (2, True)
    sets = [
        "model.path=short",
        "method={name: prefix_tuning, num_virtual_tokens: 20}",
        "train.steps=1",
        "data.eval=null",
    ]
    code, _, err = run("train", "reward.yaml", "--output", "narrow", *(x for s in sets for x in ("--set", s)))
    assert code == 0, err


def test_one_forward_pass_scores_both(done, run):
    """The scores of a pair in one batch are those of its answers alone, however wide the padding."""
    model, tokenizer = jaxft.load(done)
    rows = jaxft.data.load_comparisons(done.parent / "held.jsonl", tokenizer, format="preference").examples
    batch = jaxft.data.collate_comparisons(rows, rows=7)
    scores, there = answer_scores(model, batch)
    assert there.sum() == 10 and scores.shape == (7, 2) and not scores[5:].any()
    for i, row in enumerate(rows[:2]):
        for k, answer in enumerate(row.answers):
            np.testing.assert_allclose(scores[i, k], model(answer.input_ids[None])[0, 0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_do_what_one_does(axes):
    """Two steps with two micro-batches, at a learning rate that moves the scores."""
    rng, batch = np.random.default_rng(0), {}
    for name in ("chosen", "rejected"):
        mask = np.ones((16, 12), np.int32)
        mask[::3, 8:] = 0
        ids = rng.integers(2, 64, (16, 12)).astype(np.int32)
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask}
    found = []
    for mesh in (None, jaxft.make_mesh(**axes)):
        model = with_head(fresh_model(tiny_llama().config.replace(mesh=mesh), 0), ("score",))
        state = jaxft.TrainState.create(model, jaxft.LoRA(r=2), optax.sgd(1.0))
        step = jaxft.make_train_step(make_reward_loss(centering=0.1), accumulate=2)
        for _ in range(2):
            state, metrics = step(state, batch)
            found.append([float(metrics[name]) for name in ("loss", "margin", "grad_norm")])
    np.testing.assert_allclose(found[2:], found[:2], rtol=1e-5, atol=1e-5)
    assert abs(found[0][0] - found[1][0]) > 1e-2
