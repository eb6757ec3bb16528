"""Direct preference optimisation from a config to a run: what the policy is compared with, at every step."""

import json

import jax
import numpy as np
import optax
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.config import load_config
from jaxft.models.tensors import Tensors
from jaxft.parallel import make_mesh
from jaxft.tasks.dpo import PreferenceOptimisation
from jaxft.testing import tiny_llama
from jaxft.train.checkpoint import Checkpoints

CONFIG = """task: dpo
model: {path: base}
method: {name: lora, r: 2, target_modules: all-linear, dropout: 0.1}
data: {train: pairs.jsonl, eval: held.jsonl, format: preference, max_length: 40}
optimizer: {learning_rate: 1e-2}
train: {steps: 4, batch_size: 4, accumulate: 2, log_every: 2, eval_every: 2, save_every: 2}
output: run
"""
SFT = """task: sft
model: {path: base}
method: {name: lora, r: 2}
data: {train: rows.jsonl, format: prompt_completion, max_length: 40}
optimizer: {learning_rate: 5e-2}
train: {steps: 2, batch_size: 4}
output: sft
"""
WORDS = ["cat", "mat", "end", "it", "sat", "on"]
PAIRS = [{"prompt": f"the {w}", "chosen": f" {w}", "rejected": f" {WORDS[i - 5]} is"} for i, w in enumerate(WORDS)] * 2
FIGURES = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "log_ratio")


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


FILE = "dpo.yaml"  # what `done` trains


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(tiny_llama(vocab_size=300, eos_token_id=1), where / "base", make_tokenizer())
    jsonl(where / "pairs.jsonl", PAIRS)
    jsonl(where / "held.jsonl", PAIRS[:5])
    jsonl(where / "rows.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])
    (where / "dpo.yaml").write_text(CONFIG)
    (where / "over.yaml").write_text(CONFIG.replace("path: base", "path: sft"))
    (where / "sft.yaml").write_text(SFT)
    return where


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def tensors(folder):
    with Tensors(folder / "adapter", "adapter_model.safetensors") as t:
        return {name: t.read(name) for name in t.shapes}


def figures(out):
    return {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}


def test_a_run_begins_at_log_2_and_tells_the_pairs_apart(done, run):
    said = summary(done)
    assert set(said["before"]) == {f"eval_{name}" for name in FIGURES}
    assert said["before"]["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert all(abs(said["before"][f"eval_{name}"]) < 1e-6 for name in FIGURES[2:])
    assert said["before"]["eval_accuracy"] == 0.5
    after = said["after"]
    assert after["eval_loss"] < 0.69 and after["eval_margin"] > 0.005 and after["eval_accuracy"] > 0.5
    assert after["eval_margin"] == pytest.approx(after["eval_chosen_reward"] - after["eval_rejected_reward"], abs=1e-6)
    logged = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert set(FIGURES) <= set(next(row for row in logged if "loss" in row))
    assert (done / "report/curves.png").is_file()


def test_a_finished_run_is_evaluated_beside_what_it_began_with(done, run):
    """And a config's model beside itself."""
    for what, end in ((done, "after"), ("dpo.yaml", "before")):
        code, out, err = run("evaluate", what)
        assert code == 0, err
        assert figures(out) == pytest.approx(summary(done)[end], abs=2e-6)


def test_after_an_sft_run_the_reference_is_base_and_adapter(done, run, place):
    """It begins at log 2 though the SFT has moved the model; the finished run has that reference too."""
    code, _, err = run("validate", "over.yaml")
    assert code == 2
    assert "model.path: the run sft has not been made yet: jaxft train sft.yaml" in err
    assert run("train", "sft.yaml")[0] == 0
    code, _, err = run("train", "over.yaml", "--output", "over", "--set", "train.steps=2")
    assert code == 0, err
    said = summary(place / "over")
    assert said["before"]["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(said["before"]["eval_log_ratio"]) < 1e-6
    code, out, err = run("evaluate", "over")
    assert code == 0, err
    assert figures(out) == pytest.approx(said["after"], abs=2e-6)
    assert list(jaxft.adapters(jaxft.load(place / "over")[0])) == ["default", "default_2"]
    assert run("export", "over", "--format", "merged", "--output", "out/over")[0] == 0
    ids = np.array([[5, 6, 7, 8]])
    np.testing.assert_allclose(jaxft.load("out/over")[0](ids), jaxft.load("over")[0](ids), atol=1e-5)


@pytest.mark.parametrize("form", ["beneath", "goes_on", "asked"])
def test_the_dropout_of_an_earlier_run_is_off(place, run, form):
    """Of its adapter that lies beneath, and of the one that goes on, unless the section asks for it."""
    if not (place / "noisy").is_dir():
        dropped = SFT.replace("r: 2", "r: 2, dropout: 0.5").replace("output: sft", "output: noisy")
        (place / "noisy.yaml").write_text(dropped)
        assert run("train", "noisy.yaml")[0] == 0
    config = CONFIG.replace("path: base", "path: noisy").replace(", accumulate: 2, log_every: 2", ", log_every: 1")
    lines = [line for line in config.splitlines() if not line.startswith("method") or form == "beneath"]
    (place / "quiet.yaml").write_text("\n".join(lines).replace(", dropout: 0.1", ""))
    asked = ["--set", "dpo.dropout=true"] if form == "asked" else []
    code, _, err = run("train", "quiet.yaml", "--output", form, "--set", "train.steps=1", *asked)
    assert code == 0, err
    logged = [json.loads(line) for line in (place / form / "metrics.jsonl").read_text().splitlines()]
    first = next(row["loss"] for row in logged if "loss" in row)
    assert (abs(first - np.log(2)) < 1e-6) == (form != "asked")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(done, run, place, monkeypatch):
    """The reference is made of what the run began with, not of what the checkpoint holds."""
    save = Checkpoints.save

    def stop(self, state):
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop)
    assert run("train", "dpo.yaml", "--output", "broken")[0] == 130
    monkeypatch.setattr(Checkpoints, "save", save)
    code, out, _ = run("train", "dpo.yaml", "--output", "broken", "--resume")
    assert (code, "going on after step 2" in out) == (0, True)
    whole, broken = tensors(done), tensors(place / "broken")
    assert whole.keys() == broken.keys() and all(np.array_equal(whole[k], broken[k]) for k in whole)
    assert summary(place / "broken")["after"] == summary(done)["after"]


METHODS = {
    "lora": jaxft.LoRA(r=2),
    "full": jaxft.Full(),
    "prefix": jaxft.PrefixTuning(num_virtual_tokens=3),
    "bitfit": jaxft.BitFit(create=True),
    "prompt | adapter": jaxft.PromptTuning(num_virtual_tokens=2) | jaxft.Adapter(reduction_factor=4),
    "pissa": jaxft.LoRA(r=2, init="pissa"),
}
QUICK = ("full", "prefix")  # LoRA is what the runs above train


def pairs(rows=8, width=12, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for name in ("chosen", "rejected"):
        ids = rng.integers(2, 64, (rows, width)).astype(np.int32)
        mask = np.ones_like(ids)
        mask[::2, 9:] = 0
        labels = np.where((mask == 1) & (np.arange(width) >= 4)[None], ids, -100).astype(np.int32)
        made |= {f"{name}_input_ids": ids, f"{name}_labels": labels, f"{name}_attention_mask": mask}
    return made


@pytest.fixture
def task(tmp_path):
    """The task of a config that accumulates over two micro-batches."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    return PreferenceOptimisation(load_config(tmp_path / "c.yaml"))


@pytest.mark.parametrize("name", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_each_method_begins_at_log_2_beside_a_reference_that_stays(task, name):
    """Also one that is not the base at its first step; of the reference nothing moves but the policy's loss falls."""
    state = jaxft.TrainState.create(tiny_llama(), METHODS[name], optax.adamw(1e-2))
    step = task.make_step(state)
    frozen = {id(x) for x in jax.tree.leaves(state.frozen)}
    shared = sum(id(x) in frozen for x in jax.tree.leaves(task.reference))
    assert shared == len(frozen)  # one base in memory
    assert len(jax.tree.leaves(task.reference)) == shared + len(jax.tree.leaves(state.trainable))
    before, losses = {path: np.array(x) for path, x in jaxft.leaves(task.reference).items()}, []
    for _ in range(3):
        state, metrics = step(state, pairs())
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[2] < losses[1] < losses[0]
    after = jaxft.leaves(task.reference)
    assert all(np.array_equal(before[path], x) for path, x in after.items()) and len(after) == len(before)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_do_what_one_does(task, axes):
    """The loss of two steps, at a learning rate that moves the policy, with two micro-batches."""
    from jaxft.models.hub import fresh_model

    found = []
    for mesh in (None, make_mesh(**axes)):
        model = fresh_model(tiny_llama().config.replace(mesh=mesh), 0)
        state = jaxft.TrainState.create(model, METHODS["lora"], optax.sgd(1.0))
        step = task.make_step(state)
        losses = []
        for n in range(2):
            state, metrics = step(state, pairs(rows=16, seed=n))
            losses += [float(metrics[name]) for name in ("loss", "margin", "grad_norm")]
        found.append(losses)
        if mesh is not None:
            said = step.refer(pairs(rows=16))
            assert said["chosen_reference"].shape == (16,)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert abs(found[0][3] - found[0][0]) > 1e-4


def test_what_cannot_be_tuned_by_preferences(run, place):
    """An encoder; an option that goes with another kind; rows of which none is left."""
    jaxft.save_model(jaxft.testing.tiny_bert(vocab_size=300), place / "bert", make_tokenizer())
    code, _, err = run("validate", "dpo.yaml", "--set", "model.path=bert")
    assert (code, "dpo needs a causal language model" in err) == (2, True)
    code, _, err = run("validate", "dpo.yaml", "--set", "dpo={kind: ipo, label_smoothing: 0.1}")
    assert (code, "dpo.label_smoothing: ipo has none" in err) == (2, True)
    code, _, err = run("validate", "dpo.yaml", "--set", "data.max_length=3")
    assert (code, "more than max_length 3" in err) == (2, True)
    jsonl(place / "same.jsonl", [PAIRS[0], {**PAIRS[1], "rejected": PAIRS[1]["chosen"]}])
    code, _, err = run("validate", "dpo.yaml", "--set", "data.train=same.jsonl", "--set", "train.batch_size=2")
    assert (code, "same.jsonl:2: chosen and rejected are the same: ' mat'" in err) == (2, True)
