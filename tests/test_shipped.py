"""Every config that is shipped loads, says what it is, and the quickstart's parts are what they should be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import jaxft
from jaxft import cli
from jaxft.config import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
QUICK = ROOT / "configs" / "quickstart"
HEADER = ("# Method ", "# Hardware ", "# Time ", "# Expected ", "# Command ")


def test_these_are_all():
    done = subprocess.run(["git", "ls-files", "configs"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git here")
    assert [str(c.relative_to(ROOT)) for c in CONFIGS] == [f for f in done.stdout.split() if f.endswith(".yaml")]
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_each_loads_and_says_what_it_is(file):
    config = load_config(file)
    assert config.make_method() is not None
    text = file.read_text()
    assert all(word in text for word in HEADER)
    assert f"jaxft train {file.relative_to(ROOT)}" in text


def test_the_methods_each_have_one():
    assert {part["name"] for file in CONFIGS for part in load_config(file).method} == set(jaxft.methods.METHODS)


def test_the_quickstart_is_small():
    size = sum(f.stat().st_size for f in QUICK.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    assert size <= 6_000_000


def test_its_rows_come_out_the_same_and_none_is_held_out_and_trained():
    sys.path.insert(0, str(QUICK))
    try:
        import make_data
    finally:
        sys.path.remove(str(QUICK))
    read = lambda name: [json.loads(line) for line in (QUICK / name).read_text().splitlines()]
    train, held_out = read("train.jsonl"), read("eval.jsonl")
    assert (train, held_out) == make_data.rows()
    assert (len(train), len(held_out)) == (8000, 240)
    asked = lambda rows: {(row["instruction"], row["input"]) for row in rows}
    assert not asked(train) & asked(held_out)


@pytest.mark.slow
def test_its_first_steps(tmp_path, monkeypatch, capsys):
    """The embedded model loads, is asked, and learns: two steps, eight held-out rows."""
    monkeypatch.chdir(ROOT)
    sets = ["train.steps=2", "optimizer.warmup_steps=0", "train.batch_size=8", "evaluation.rows=8"]
    cli.train("configs/quickstart/lora.yaml", sets=sets, output=str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "trainable params: " in out
    assert f"adapter in {tmp_path}/run/adapter" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["eval_accuracy"] <= 0.25
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
