"""The command line from a config to a finished run, and everything that is done with one."""

import json

import jax
import numpy as np
import pytest
from texts import CHATML, make_tokenizer

import jaxft
from jaxft.models.tensors import Tensors
from jaxft.train.checkpoint import Checkpoints

CONFIG = """task: sft
model: {path: base}
method: {name: lora, r: 2, target_modules: all-linear, dropout: 0.1}
data: {train: rows.jsonl, eval: held.jsonl, format: instruction, max_length: 60,
       template: {prompt_input: "{instruction} {input}:", prompt_no_input: "{instruction}:"}}
optimizer: {learning_rate: 1e-2, schedule: linear, warmup_steps: 1}
train: {steps: 6, batch_size: 4, seed: 0, log_every: 2, eval_every: 3, save_every: 3}
evaluation: {exact_match: true, max_new_tokens: 4, samples: 2}
output: run
"""
ROWS = [
    {"instruction": f"the {w}", "input": "on" * (i % 2), "output": w}
    for i, w in enumerate(["cat", "mat\u2028", "end", "it"] * 5)
]
SAVED = ("config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "report/curves.png", "summary.json", "adapter")


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, rows and a config."""
    where = tmp_path_factory.mktemp("place")
    model = jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1)
    jaxft.save_model(model, where / "base", make_tokenizer())
    jsonl(where / "rows.jsonl", ROWS)
    jsonl(where / "held.jsonl", ROWS[:3])
    (where / "c.yaml").write_text(CONFIG)
    return where


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder, name="adapter"):
    with Tensors(folder / name, "adapter_model.safetensors") as t:
        return {name: t.read(name) for name in t.shapes}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_run_leaves_what_it_should(done):
    assert all((done / name).exists() for name in SAVED)
    rows = logged(done)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "trained_tokens"} <= set(rows[1])
    np.testing.assert_allclose([r["learning_rate"] for r in rows if "loss" in r], [1e-2, 6e-3, 2e-3], rtol=1e-5)
    summary = json.loads((done / "summary.json").read_text())
    assert summary["before"] == {k: v for k, v in rows[0].items() if k != "step"}
    assert summary["after"]["eval_loss"] == rows[-1]["eval_loss"] < summary["before"]["eval_loss"]
    assert 0 <= summary["after"]["eval_accuracy"] <= 1
    assert summary["trainable_parameters"] == sum(x.size for x in tensors(done).values())
    assert sorted(p.name for p in (done / "checkpoints").iterdir()) == [".lock", "3", "6", "fingerprints.json"]
    samples = [json.loads(line) for line in (done / "samples.jsonl").read_text().split("\n")[:-1]]
    assert len(samples) == 6
    assert samples[0]["prompt"] == "the cat:"
    assert samples[0]["expected"] == "cat"


def test_the_config_that_is_kept_runs_again_to_the_same_bits(done, run):
    code, _, _ = run("train", done / "config.yaml", "--output", "again")
    assert code == 0
    assert same(tensors(done), tensors(done.parent / "again"))


def test_evaluate_gives_the_figures_of_the_run(done, run):
    summary = json.loads((done / "summary.json").read_text())
    for what, end in ((done, "after"), ("c.yaml", "before")):
        code, out, _ = run("evaluate", what)
        assert code == 0
        figures = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
        assert figures["eval_loss"] == pytest.approx(summary[end]["eval_loss"], abs=2e-6)
        assert figures["eval_accuracy"] == pytest.approx(summary[end]["eval_accuracy"], abs=1e-6)


def test_generate_asks_in_the_form_of_the_run(done, run):
    model, tokenizer = jaxft.load(done)
    code, out, _ = run("generate", done, "--prompt", "the cat", "--prompt", "on", "--max-new-tokens", 5)
    assert code == 0
    expected = jaxft.generate(model, tokenizer, ["the cat:", "on:"], max_new_tokens=5)
    assert out == "".join(text + "\n" for text in expected)
    _, raw, _ = run("generate", done, "--prompt", "the cat", "--max-new-tokens", 5, "--raw")
    assert raw.rstrip("\n") == jaxft.generate(model, tokenizer, ["the cat"], max_new_tokens=5)[0].rstrip("\n")
    _, plain, _ = run("generate", "base", "--adapter", done / "adapter", "--prompt", "the cat", "--max-new-tokens", 5)
    assert plain == raw


def test_generate_with_an_adapter_over_a_run(done, run, monkeypatch):
    """None of the two is silently left out."""
    from jaxft.tasks import use

    seen = []
    monkeypatch.setattr(use, "generate_ids", lambda model, ids, **_: seen.append(model) or ids)
    assert run("generate", done, "--adapter", done / "adapter", "--prompt", "the cat")[0] == 0
    assert list(jaxft.adapters(seen[0])) == ["default", "given"]
    assert seen[0].adapter_weights.get_value().tolist() == [1.0, 1.0]


def test_export(done, run, place):
    code, out, _ = run("export", done, "--format", "peft", "--output", "out/peft")
    assert (code, out) == (0, "out/peft\n")
    assert same(tensors(done), tensors(place / "out", "peft"))
    code, _, _ = run("export", done, "--format", "merged", "--output", "out/merged")
    assert code == 0
    merged, tokenizer = jaxft.load("out/merged")
    model, _ = jaxft.load(done)
    ids = np.array([tokenizer("the cat sat")["input_ids"]])
    np.testing.assert_allclose(merged(ids), model(ids), atol=1e-5)
    assert run("export", done, "--format", "serving", "--output", "out/served")[:2] == (0, "out/served\n")
    served = jaxft.load_adapter(jaxft.detach(model, "default"), "out/served")
    np.testing.assert_allclose(served(ids), model(ids), atol=1e-5)
    code, _, err = run("export", done, "--format", "merged", "--output", "out/merged")
    assert (code, "it is there already" in err) == (2, True)


def test_a_finished_run_is_not_written_over(done, run):
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file()}
    code, _, err = run("train", "c.yaml", "--output", "done")
    assert code == 2
    assert "it holds a finished run" in err
    code, out, _ = run("train", "c.yaml", "--output", "done", "--resume")
    assert (code, "nothing is left to do" in out) == (0, True)
    assert before == {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file()}


def test_an_interrupted_run_goes_on_to_the_same_bits(done, run, place, monkeypatch):
    save = Checkpoints.save

    def stop(self, state):
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop)
    code, _, err = run("train", "c.yaml", "--output", "broken")
    assert (code, "--resume" in err) == (130, True)
    monkeypatch.setattr(Checkpoints, "save", save)
    code, _, err = run("train", "c.yaml", "--output", "broken")
    assert (code, "a run that has not finished (go on with --resume)" in err) == (2, True)
    code, _, err = run("train", "c.yaml", "--output", "broken", "--resume", "--set", "train.steps=9")
    assert (code, "train.steps: 6 then, 9 now" in err) == (2, True)
    code, out, _ = run("train", "c.yaml", "--output", "broken", "--resume")
    assert (code, "going on after step 3" in out) == (0, True)
    assert same(tensors(done), tensors(place / "broken"))
    whole, broken = ([r for r in logged(f) if "eval_loss" in r] for f in (done, place / "broken"))
    assert broken == whole


def test_a_disk_that_is_full(run, place, monkeypatch):
    """The write of the second checkpoint fails: exit 2, no traceback, and the first one is good."""
    import orbax.checkpoint as ocp

    save = ocp.Checkpointer.save

    def full(self, folder, **options):
        if folder.name == "6":
            raise OSError(28, "No space left on device")
        return save(self, folder, **options)

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    code, _, err = run("train", "c.yaml", "--output", "full")
    assert code == 2
    assert "the checkpoint of step 6 cannot be written (no space left on the disk)" in err
    assert "The last good one is of step 3" in err
    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    assert run("train", "c.yaml", "--output", "full", "--resume")[0] == 0


@pytest.mark.slow
def test_a_run_over_a_run(done, run, place):
    """Without a method its adapter goes on training; with one it lies frozen beneath; both begin where it ended."""
    first = json.loads((done / "summary.json").read_text())["after"]
    config = CONFIG.replace("path: base", "path: done").replace("steps: 6", "steps: 2")
    method = "method: {name: lora, r: 2, target_modules: all-linear, dropout: 0.1}\n"
    assert method in config
    (place / "on.yaml").write_text(config.replace(method, ""))
    (place / "over.yaml").write_text(config.replace("all-linear", "[v_proj]"))
    for name in ("on", "over"):
        code, _, err = run("train", f"{name}.yaml", "--output", name)
        assert code == 0, err
        before = json.loads((place / name / "summary.json").read_text())["before"]
        assert before["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
        after = json.loads((place / name / "summary.json").read_text())["after"]
        _, out, _ = run("evaluate", name)
        assert float(out.split("eval_loss ")[1].split()[0]) == pytest.approx(after["eval_loss"], abs=2e-6)
    assert tensors(place / "on").keys() == tensors(done).keys()
    assert not same(tensors(place / "on"), tensors(done))
    both, _ = jaxft.load("over")
    assert list(jaxft.adapters(both)) == ["default", "default_2"]
    alone, _ = jaxft.load("done")
    kept = {p: x for p, x in _all(both).items() if ".default." in p}
    assert same(kept, {p: x for p, x in _all(alone).items() if ".default." in p})
    code, _, err = run("export", "over", "--format", "peft", "--output", "out/over")
    assert (code, "--format peft cannot express LoRA over LoRA." in err) == (2, True)
    assert run("export", "over", "--format", "merged", "--output", "out/over")[0] == 0
    code, _, err = run("train", "on.yaml", "--output", "bare", "--set", "model.path=base")
    assert (code, "method is left out" in err) == (2, True)


def _all(model):
    return {
        ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(model)
    }


OTHERS = {
    "full": "{name: full}",
    "bitfit": "{name: bitfit, create: true}",
    "both": "[{name: lora, r: 2}, {name: bitfit, create: true}]",
}


@pytest.mark.parametrize("name", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bitfit", "both"))])
def test_other_methods(run, place, name):
    output = f"with_{name}"
    text = CONFIG.replace("{name: lora, r: 2, target_modules: all-linear, dropout: 0.1}", OTHERS[name])
    text = text.replace("steps: 6", "steps: 2")
    (place / "m.yaml").write_text(text)
    assert run("train", "m.yaml", "--output", output)[0] == 0
    after = json.loads((place / output / "summary.json").read_text())["after"]
    _, out, _ = run("evaluate", output)
    assert float(out.split()[out.split().index("eval_loss") + 1]) == pytest.approx(after["eval_loss"], abs=1e-5)
    assert (place / output / ("model" if name == "full" else "adapter")).is_dir()
    code, _, err = run("export", output, "--format", "peft", "--output", "out/none")
    assert code == 2
    assert "--format merged" in err
    assert run("export", output, "--format", "merged", "--output", f"out/{output}")[0] == 0


def test_a_mixture_is_reported_source_by_source(run, place):
    jsonl(
        place / "chat.jsonl",
        [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": w}]} for w in "abcd"],
    )
    jsonl(place / "text.jsonl", [{"text": "the cat sat"}, {"text": "你好"}] * 2)
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300), place / "chatty", make_tokenizer(chat_template=CHATML))
    sources = "[{path: rows.jsonl}, {path: chat.jsonl, format: messages, weight: 2}, {path: text.jsonl, format: text}]"
    text = CONFIG.replace("rows.jsonl", sources).replace("held.jsonl", sources).replace("path: base", "path: chatty")
    (place / "mix.yaml").write_text(text.replace("steps: 6", "steps: 2"))
    code, out, _ = run("train", "mix.yaml", "--output", "mix")
    assert code == 0
    assert "train: 4 rows of chat" in out
    last = logged(place / "mix")[-1]
    names = ["rows", "chat", "text"]
    assert [k for k in last if k.startswith("eval_loss")] == [*(f"eval_loss/{n}" for n in names), "eval_loss"]
    assert [k for k in last if k.startswith("eval_accuracy")] == [
        "eval_accuracy/chat",
        "eval_accuracy/rows",
        "eval_accuracy",
    ]


BAD = [
    ("train: rows.jsonl", "train: none.jsonl", "none.jsonl: no such file"),
    ("train: rows.jsonl", "train: base", "base: this is a folder"),
    ("format: instruction", "format: messages", "the tokenizer has no chat template"),
    ("eval: held.jsonl", "eval: bad.jsonl", "bad.jsonl:2: output: text is expected"),
    ("batch_size: 4", "batch_size: 400", "20 rows are fewer than one batch of 400"),
    ("path: base", "path: nowhere/at/all", "nowhere/at/all"),
    ("path: base", "path: untold", "untold: it holds no tokenizer"),
    ("path: base", "path: small", "the token"),
    ("max_length: 60", "max_length: 3", "no row is left to use"),
    ("path: base", "path: short", "data.max_length 60: the longest row has "),
    ("path: base", "path: few", "evaluation.max_new_tokens 30: the longest prompt has "),
    ("all-linear", "[q_prj]", "q_prj"),
    ("output: run", "output: base", "the folder holds other files"),
    ("output: run", "output: c.yaml", "this is a file; give another"),
    ("sft", "stf", "task: 'stf' is not one of sft"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_what_is_wrong_ends_before_the_first_step(run, place, old, new, message):
    jsonl(place / "bad.jsonl", [ROWS[0], {"instruction": "a"}])
    if not (place / "small").exists():
        jaxft.save_model(jaxft.testing.tiny_llama(), place / "untold")
        jaxft.save_model(jaxft.testing.tiny_llama(), place / "small", make_tokenizer())
        jaxft.save_model(jaxft.testing.tiny_gpt2(vocab_size=300, n_positions=16), place / "short", make_tokenizer())
        jaxft.save_model(jaxft.testing.tiny_gpt2(vocab_size=300, n_positions=32), place / "few", make_tokenizer())
    assert CONFIG.count(old) == 1
    new_tokens = 30 if new == "path: few" else 4
    text = CONFIG.replace(old, new).replace("max_new_tokens: 4", f"max_new_tokens: {new_tokens}")
    (place / "bad.yaml").write_text(text)
    before = sorted(p.name for p in place.iterdir())
    code, _, err = run("train", "bad.yaml")
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert sorted(p.name for p in place.iterdir()) == before


def test_virtual_tokens_take_positions(run, place):
    jaxft.save_model(jaxft.testing.tiny_gpt2(vocab_size=300, n_positions=32), place / "tight", make_tokenizer())
    method = "method={name: prefix_tuning, num_virtual_tokens: 20}"
    for command in ("validate", "train"):
        sets = ("--set", "model.path=tight", "--set", method, "--set", "output=tight-run")
        code, _, err = run(command, "c.yaml", *sets)
        assert (code, "this model has 12 positions beside its virtual tokens: set it to" in err) == (2, True), err
    assert not (place / "tight-run").exists()


def test_validate_writes_nothing(run, place):
    before = sorted(p.name for p in place.iterdir())
    code, out, _ = run("validate", "c.yaml")
    assert code == 0
    assert "c.yaml: good; 6 steps" in out
    assert "train: 20 rows of rows" in out
    assert sorted(p.name for p in place.iterdir()) == before
    code, out, _ = run("validate", "c.yaml", "--set", "train.steps=null", "--set", "train.epochs=1.5")
    assert "good; 8 steps" in out


NO_RUNS = [("evaluate", "base"), ("export", "base", "--format", "peft", "--output", "x"), ("evaluate", "none")]


@pytest.mark.parametrize("args", NO_RUNS)
def test_what_is_no_run(run, args):
    code, _, err = run(*args)
    assert code == 2
    assert err.startswith("error: ")


@pytest.mark.slow
def test_a_model_from_a_random_start(run, place):
    text = CONFIG.replace("path: base", "path: base, init: random").replace("steps: 6", "steps: 2")
    (place / "fresh.yaml").write_text(text)
    found = []
    for seed in (1, 2):
        assert run("train", "fresh.yaml", "--output", f"fresh{seed}", "--set", f"train.seed={seed}")[0] == 0
        found.append(json.loads((place / f"fresh{seed}" / "summary.json").read_text())["before"]["eval_loss"])
    assert abs(found[0] - found[1]) > 1e-3
