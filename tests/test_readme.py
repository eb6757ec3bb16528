"""The README's code runs as it stands, and its table of families is the table of families."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from texts import make_tokenizer

import jaxft
from jaxft import cli
from jaxft.models import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
YAML, SIMILAR, GRPO = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and a real tokenizer, under the name that the README uses."""
    where = tmp_path_factory.mktemp("readme")
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300), where / "my-model", make_tokenizer())
    rows = [{"instruction": f"Name number {i}.", "input": "", "output": f"It is {i}."} for i in range(40)]
    for name, some in (("rows.jsonl", rows), ("held-out.jsonl", rows[:4])):
        (where / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    (where / "text.jsonl").write_text('{"text": "reverse: stone -> enots"}\n' * 8)
    (where / "configs").symlink_to(ROOT / "configs")
    (where / "my.yaml").write_text(YAML)
    jaxft.save_model(jaxft.testing.tiny_bert(vocab_size=300), where / "my-encoder", make_tokenizer())
    pairs = "sentence1,sentence2,score\n" + "".join(f"the cat,the mat {i},{i % 6}\n" for i in range(40))
    for name in ("train.csv", "test.csv"):
        (where / name).write_text(pairs)
    (where / "similar.yaml").write_text(SIMILAR)
    (where / "grpo.yaml").write_text(GRPO)
    questions = [{"prompt": f"{i} + {i} =", "answer": 2 * i} for i in range(16)]
    (where / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300), where / "my-stories-model", make_tokenizer())
    stories = "".join(f"The cat sat on mat {i}. It was happy. Then it slept.\n" for i in range(340))
    (where / "stories.txt").write_text(stories)
    return where


@pytest.mark.slow
def test_the_code_runs(folder, monkeypatch, capsys):
    assert len(BLOCKS) == 8
    monkeypatch.chdir(folder)
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "trainable params: 1,792 || all params:" in printed
    assert "['transformer.h.attn.c_attn.bias', 'transformer.h.attn.c_attn.kernel']" in printed
    merged, tokenizer = jaxft.load("out/merged")
    assert merged(jnp.array([tokenizer("the cat")["input_ids"]])).shape[-1] == 300
    assert "It is 0.</s>" in printed
    assert "(2, 32)" in printed


@pytest.mark.slow
def test_the_command_lines_run(folder, monkeypatch, capsys):
    """Each in the order of the README, in one folder; the quickstart's own config for three steps."""
    monkeypatch.chdir(folder)
    lines = re.findall(r"^(?:jaxft |python (?=configs/rlhf))([^\\\n]+(?:\\\n[^\\\n]+)*)", README, re.MULTILINE)
    assert len(lines) == 25
    assert {line.split()[0] for line in lines if not line.startswith("configs/")} == {
        "train",
        "validate",
        "evaluate",
        "generate",
        "embed",
        "export",
        "plan",
        "compare",
    }
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        if words[0].endswith("make_data.py"):
            rows_of_the_recipe(monkeypatch, words)
            continue
        short = ["--set", "train.steps=3", "--set", "optimizer.warmup_steps=0"] if "configs/" in line else []
        if "plan configs" in line:  # the compiler takes minutes over the real shape
            short = ["--set", "model.config=my-model/config.json", "--set", "data.max_length=64"]
        if "compare" in line:
            short = ["--set", "train={steps: 1, batch_size: 2}", "--set", "optimizer.warmup_steps=0"]
        if "rlhf" in line:
            short += ["--set", "train.batch_size=8", "--set", "data.max_length=64"]
        if "ppo" in line:
            short += ["--set", "ppo.max_new_tokens=8"]
        if "base.yaml" in line:  # its rows are made by the line before it
            short += ["--set", "data.train=text.jsonl", "--set", "train.batch_size=4"]
        monkeypatch.setattr(sys, "argv", ["jaxft", *words, *short])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code, f"jaxft {line}: {capsys.readouterr().err}"
    assert "held-out" not in capsys.readouterr().err
    assert (folder / "out/first-adapter/adapter_config.json").is_file()
    assert (folder / "runs/mine/summary.json").is_file()
    the_table_of_the_run_folder_names_what_is_there(folder)


def rows_of_the_recipe(monkeypatch, words):
    """Run the script that makes them; a model of random numbers writes nothing cheerful, so its pairs are given."""
    if "--run" in words:
        assert Path(words[-1], "summary.json").is_file()
        rows = [{"prompt": f"The cat {i}.", "chosen": "It was happy.", "rejected": "It was sad."} for i in range(16)]
        for name in ("pairs.jsonl", "pairs-eval.jsonl"):
            Path("runs/rlhf-data", name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")


def the_table_of_the_run_folder_names_what_is_there(folder):
    table = README.split("| in a run's folder | |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([\w./]+)`(?: or `([\w./]+)`)? \|", table, re.MULTILINE)
    named = {name for row in rows for name in row if "." in name or name.endswith("/")}
    run = folder / "runs/first"
    there = {f"{p.relative_to(run)}/" if p.is_dir() else str(p.relative_to(run)) for p in run.iterdir()}
    assert there - {"report/"} == named - {"report/curves.png", "model/"}
    assert (run / "report/curves.png").is_file()


def test_the_table_of_formats():
    rows = re.findall(r"^\| `(\w+)` \| [a-z]", README.split("| `data.format` |")[1].split("\n\n")[0], re.MULTILINE)
    assert rows == list(jaxft.data.FORMATS)


def test_the_table_of_families():
    rows = re.findall(r"^\| `([\w-]+)` \| \w", README[README.index("## Models") :], re.MULTILINE)
    assert rows == ["model_type", *FAMILIES]


def test_the_table_of_methods():
    rows = re.findall(r"^\| `(\w+)\(.*?\)` \|", README, re.MULTILINE)
    assert set(rows) == {cls.__name__ for cls in jaxft.methods.METHODS.values()}


def test_the_commands():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    commands = set(re.findall(r"(?:`|^)make ([a-z ]+?)(?:`|  |$)", text, re.MULTILINE))
    assert {"quickstart", "test"} <= commands
    for command in commands:
        assert set(command.split()) <= set(targets), command
