"""`jaxft compare`: methods side by side, a sweep, what is done again and what is not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.compare import as_markdown, contestants, draw_methods, draw_sweep, measure, runs
from jaxft.config import load_config
from jaxft.tasks.train import Job
from jaxft.train.checkpoint import Checkpoints

CONFIG = """task: sft
model: {path: base}
method: {name: lora, r: 2, alpha: 4}
data: {train: rows.jsonl, eval: held.jsonl, format: instruction, max_length: 60,
       template: {prompt_input: "{instruction} {input}:", prompt_no_input: "{instruction}:"}}
optimizer: {learning_rate: 1e-2}
train: {steps: 4, batch_size: 4, log_every: 1, eval_every: 2, save_every: 2}
evaluation: {samples: 0}
compare:
  full: {learning_rate: 1e-3}
  bitfit: {method: {name: bitfit, create: true}}
  both: {method: [{name: lora, r: 3}, {name: bitfit, create: true}], learning_rate: 3e-2}
output: side
"""


STRICT = {  # as in the conftest, so that the programs are the same and are compiled once
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, rows and a config."""
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1), where / "base", make_tokenizer())
    rows = [{"instruction": f"the {w}", "input": "", "output": w} for w in ["cat", "mat", "end", "it"] * 5]
    for name, some in (("rows.jsonl", rows), ("held.jsonl", rows[:3])):
        (where / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    (where / "c.yaml").write_text(CONFIG)
    return where


@pytest.fixture
def here(monkeypatch):
    """Train in this process, which is quicker; the runs that were trained are in the list."""
    trained = []

    def train(run):
        trained.append(run.path.name)
        with open(f"{run.path}.log", "a") as log:
            try:
                config = load_config(f"{run.path}.yaml")
                Job(config, resume=run.started, say=lambda line: print(line, file=log)).train()
            except KeyboardInterrupt:
                return 130
            except jaxft.JaxftError as error:
                print(f"error: {error}", file=log)
                return 2
        return 0

    monkeypatch.setattr(runs, "_train", train)
    return trained


def report(place, output="side", stem="compare"):
    return json.loads((place / output / f"{stem}.json").read_text())


def copied(place, run, here, output):
    """The comparison once more, in another folder."""
    run("compare", "c.yaml", "--methods", "full,lora,both")
    shutil.copytree(place / "side", place / output)
    here.clear()


def test_side_by_side(place, run, here):
    code, out, _ = run("compare", "c.yaml", "--methods", "full,lora,both")
    assert code == 0
    assert here == ["full", "lora", "both"]
    found = report(place)
    by_name = {one["name"]: one for one in found["runs"]}
    assert [one["learning_rate"] for one in found["runs"]] == [1e-3, 1e-2, 3e-2]
    model, _ = jaxft.load(place / "base")
    count = lambda method: jaxft.parameter_report(model, method).trainable
    assert by_name["full"]["trainable_parameters"] == count(jaxft.Full())
    assert by_name["full"]["trainable_percent"] == 100
    assert by_name["lora"]["trainable_parameters"] == count(jaxft.LoRA(r=2))
    assert by_name["both"]["trainable_parameters"] == count(jaxft.LoRA(r=3) | jaxft.BitFit(create=True))
    for name, one in by_name.items():
        summary = json.loads((place / "side" / name / "summary.json").read_text())
        assert one["after"]["loss"] == summary["after"]["eval_loss"] == one["losses"][-1][1]
        assert [step for step, _ in one["losses"]] == [0, 2, 4]
        assert one["losses"][0][1] == pytest.approx(one["before"], abs=1e-6)
        assert one["peak_memory_bytes"] == summary["peak_memory_bytes"] > 1 << 26
        assert one["disk_bytes"] > 4 * one["trainable_parameters"]
        assert one["seconds_to_target"] == one["steps_to_target"] * one["step_seconds"] > 0
    assert found["target_loss"] == max(min(loss for _, loss in one["losses"]) for one in found["runs"])
    assert by_name["lora"]["disk_bytes"] < by_name["full"]["disk_bytes"]
    assert f"| full | {count(jaxft.Full()):,} | 100 | 0.001 |" in " ".join(out.split())
    assert out.count("**") == 2
    assert (place / "side" / "compare.md").read_text() in out
    assert (place / "side" / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_runs_are_ordinary_and_not_done_again(place, run, here):
    """Each is what `jaxft train` of its written config makes; a longer list adds to what is there."""
    run("compare", "c.yaml", "--methods", "full,lora,both")
    here.clear()
    before = {p: p.stat().st_mtime_ns for p in (place / "side" / "lora").rglob("*") if p.is_file()}
    code, out, _ = run("compare", "c.yaml", "--methods", "lora,bitfit")
    assert (code, here) == (0, ["bitfit"])
    assert "1 of 2, lora: has been trained" in out
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert [one["name"] for one in report(place)["runs"]] == ["lora", "bitfit"]
    code, _, err = run("train", "side/lora.yaml", "--output", "alone")
    assert code == 0, err
    files = [place / where / "adapter" / "adapter_model.safetensors" for where in ("side/lora", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_config(place / "side" / "lora.yaml").compare == {}


def test_all_that_compare_lists(place, run, here):
    assert run("compare", "c.yaml", "--target-loss", "0.001")[0] == 0
    found = report(place)
    assert [one["name"] for one in found["runs"]] == ["full", "bitfit", "both"]
    assert {one["seconds_to_target"] for one in found["runs"]} == {None}
    assert "s to 0.001 |" in (place / "side" / "compare.md").read_text()


def test_a_failure_is_in_its_row(place, run, here):
    config = CONFIG.replace("bitfit: {method: {name: bitfit, create: true}}", "bitfit: {}")
    (place / "fails.yaml").write_text(config)
    copied(place, run, here, "failing")
    shutil.rmtree(place / "failing" / "bitfit", ignore_errors=True)
    code, out, _ = run("compare", "fails.yaml", "--methods", "bitfit,lora", "--output", "failing")
    assert (code, here) == (1, ["bitfit"])
    found = report(place, "failing")
    assert "BitFit(create=True)" in found["runs"][0]["error"] and found["runs"][1]["after"]["loss"] > 0
    assert "| bitfit | failed |" in " ".join(out.split())
    code, out, _ = run("compare", "fails.yaml", "--methods", "bitfit", "--output", "failing")
    assert (code, "tell why" in out, (place / "failing" / "compare.png").exists()) == (1, True, True)


@pytest.mark.slow
def test_a_sweep(place, run, here):
    code, out, _ = run("compare", "c.yaml", "--sweep", "method.r=1,2", "--output", "ranks")
    assert code == 0
    assert here == ["lora-method.r-1", "lora-method.r-2"]
    found = report(place, "ranks", "sweep-method.r")
    assert (found["key"], [one["value"] for one in found["runs"]]) == ("method.r", [1, 2])
    sizes = [one["trainable_parameters"] for one in found["runs"]]
    assert sizes == [sizes[0], 2 * sizes[0]]
    assert (place / "ranks" / "sweep-method.r.png").read_bytes().startswith(b"\x89PNG")
    assert "| method | method.r | trained |" in out
    axes = draw_sweep(found).axes
    assert axes[0].get_xlabel() == "method.r" and list(axes[0].lines[0].get_xdata()) == [1, 2]


def test_a_sweep_of_every_method(place, monkeypatch):
    monkeypatch.chdir(place)
    made = contestants("c.yaml", "full,both", "optimizer.learning_rate=1e-4,1e-3", ["train.seed=3"])
    assert [(one.method, one.value) for one in made] == [(m, v) for m in ("full", "both") for v in (1e-4, 1e-3)]
    assert [one.config.optimizer.learning_rate for one in made] == [1e-4, 1e-3] * 2
    assert {one.config.train.seed for one in made} == {3}
    assert [part["name"] for part in made[2].config.method] == ["lora", "bitfit"]


def test_the_pictures_show_every_run(place, run, here):
    run("compare", "c.yaml", "--methods", "full,lora,both")
    figure = draw_methods(report(place))
    left, middle, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["full", "lora", "both"]
    assert left.get_ylabel() == "held-out loss (nats per token)"
    rows = draw_methods({**report(place), "unit": "mean over rows"}).axes[0]
    assert rows.get_ylabel() == "held-out loss (mean over rows)"
    assert len(middle.lines) == 4 and len(right.lines) == 3
    assert {text.get_text() for text in right.texts} == {"full", "lora", "both"}


MISTAKES = [
    (["--methods", "lora,adpter"], "unknown method 'adpter'; nearest: 'adapter'|unknown method 'adpter'; there are"),
    (["--methods", "lora,lora"], "'lora' stands twice"),
    (["--sweep", "method.rank=1,2"], "--sweep method.rank: method.rank: lora has no such option; "),
    (["--sweep", "method.r=1,0"], "--sweep method.r: method.r: r=0: a rank is a whole number of at least 1"),
    (["--sweep", "method.r=1,1"], "1 stands twice"),
    (["--sweep", "method.r"], "give key.sub=value,value,..."),
    (["--sweep", "data.max_length=32,64"], "runs are compared on the same rows"),
    (["--sweep", "output=a,b"], "each in a folder of its own"),
    (["--sweep", "method.target_modules=(a),[a]"], "two runs would share|is not"),
    (["--sweep", "optimizer.speed=1,2"], "--sweep optimizer.speed: optimizer.speed: unknown key"),
    (["--methods", "full", "--sweep", "method.r=1,2"], "full has no such option"),
    (["--methods", "lora", "--set", "data.eval=null"], "methods are compared on held-out rows: set data.eval"),
    (["--set", "compare={}"], "nothing to compare: give --methods"),
    (["--set", "compare={fast: {}}"], "compare.fast: method is missing, and 'fast' is no method's name"),
    (["--set", "compare={fast: {method: {name: lora, rr: 2}}}"], "compare.fast.method.rr: lora has no such option"),
    (["--set", "compare={fast: {method: 3}}"], "a mapping of name and options is expected, this is 3"),
    (["--set", "compare={full: {rate: 1}}"], "compare.full.rate: unknown key; there are: 'learning_rate', 'method'"),
    (["--set", "compare={a/b: {method: {name: lora}}}"], "compare.a/b"),
]


@pytest.mark.parametrize(("args", "match"), MISTAKES)
def test_mistakes(place, run, here, args, match):
    code, _, err = run("compare", "c.yaml", "--output", "wrong", *args)
    assert code == 2 and here == []
    assert err.startswith("error: ") and any(part in err for part in match.split("|")), err
    assert not (place / "wrong").exists()


def test_another_config_is_refused(place, run, here):
    copied(place, run, here, "kept")
    code, _, err = run("compare", "c.yaml", "--methods", "full,lora", "--output", "kept", "--set", "train.steps=5")
    assert (code, here) == (2, [])
    assert "train.steps: 4 then, 5 now" in err
    code, _, err = run("compare", "c.yaml", "--methods", "full", "--output", "kept/lora")
    assert (code, "it holds a run; give the comparison an `output` of its own" in err) == (2, True)


def test_other_rows_are_refused(place, run, here):
    """A finished run is not trained again, so the rows may have changed since."""
    copied(place, run, here, "moved")
    prints = place / "moved" / "both" / "checkpoints" / "fingerprints.json"
    text = json.loads(prints.read_text())
    text["rows"]["data.eval: held"]["sha256"] = "0"
    prints.write_text(json.dumps(text))
    code, _, err = run("compare", "c.yaml", "--methods", "lora,both", "--output", "moved")
    assert (code, "moved/both: it did not see the same rows as lora" in err) == (2, True)


def test_a_loss_that_is_not_finite(place, run, here, monkeypatch):
    """Is shown as none, and neither breaks the table nor wins."""
    copied(place, run, here, "nan")
    summary = place / "nan" / "full" / "summary.json"
    text = json.loads(summary.read_text())
    summary.write_text(json.dumps({**text, "after": {"eval_loss": None}}))
    rows = (place / "nan" / "full" / "metrics.jsonl").read_text().splitlines()
    gone = [json.dumps({**json.loads(row), "eval_loss": None}) if "eval_loss" in row else row for row in rows]
    (place / "nan" / "full" / "metrics.jsonl").write_text("\n".join(gone) + "\n")
    monkeypatch.chdir(place)
    found = measure(contestants("c.yaml", "full,lora", None, ["output=nan"]), {})
    table = as_markdown(found)
    assert found["runs"][0]["seconds_to_target"] is None and found["runs"][1]["seconds_to_target"] > 0
    assert table.splitlines()[2].count(" - |") == 3 and "**" in table.splitlines()[3]
    assert len(draw_methods(found).axes[2].lines) == 1


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(place, run, here, monkeypatch):
    """What has been trained is left, what has begun goes on from its checkpoint, to the same bits."""
    copied(place, run, here, "cut")
    shutil.rmtree(place / "cut" / "lora")
    save = Checkpoints.save

    def stop(self, state):
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        code, _, err = run("compare", "c.yaml", "--methods", "full,lora", "--output", "cut")
    assert (code, here, "the same command goes on" in err) == (75, ["lora"], True)
    code, out, _ = run("compare", "c.yaml", "--methods", "full,lora", "--output", "cut")
    assert (code, here, "2 of 2, lora: goes on" in out) == (0, ["lora", "lora"], True)
    assert "going on after step 2" in (place / "cut" / "lora.log").read_text()
    files = [place / where / "lora" / "adapter" / "adapter_model.safetensors" for where in ("side", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_processes_of_their_own_and_a_stop(place):
    """Asked to stop, the comparison lets the run save its steps; the same command goes on, and a kill is told."""
    command = [sys.executable, "-m", "jaxft.cli", "compare", "c.yaml", "--methods", "lora", "--output", "real"]
    command += ["--set", "train.steps=2000", "--set", "train.save_every=1000", "--set", "train.eval_every=2000"]
    child = subprocess.Popen(
        command, cwd=place, env={**os.environ, **STRICT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = place / "real" / "lora" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.is_file() and "grad_norm" in metrics.read_text()) and time.monotonic() < end:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert (child.returncode, "the same command goes on" in err) == (75, True)
    saved = [int(p.name) for p in (place / "real" / "lora" / "checkpoints").iterdir() if p.name.isdecimal()]
    assert len(saved) == 1 and 0 < saved[0] < 2000
    assert "is saved" in (place / "real" / "lora.log").read_text()
    assert runs._reason(-signal.SIGKILL, "") == "ended by SIGKILL, often too little memory"
    assert runs._reason(2, "x\nerror: no\n  - a\n") == "no - a"
    assert runs._reason(1, "Traceback\nKeyError: 3\n") == "KeyError: 3"
