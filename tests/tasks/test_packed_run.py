"""Packed runs from the command line: what is said, one program, every format, and going on where a run broke off."""

import json

import numpy as np
import pytest
from texts import CHATML, make_tokenizer

import jaxft
from jaxft import cli
from jaxft.config import load_config
from jaxft.errors import JaxftError
from jaxft.models.tensors import Tensors
from jaxft.tasks.train import Job
from jaxft.train.checkpoint import Checkpoints

CONFIG = """task: sft
model: {path: base}
method: {name: lora, r: 2, dropout: 0.1}
data: {train: rows.jsonl, eval: held.jsonl, format: instruction, max_length: 60, packing: true,
       template: {prompt_input: "{instruction} {input}:", prompt_no_input: "{instruction}:"}}
optimizer: {learning_rate: 1e-2}
evaluation: {samples: 0}
train: {epochs: 3, batch_size: 2, accumulate: 2, log_every: 1, save_every: 2}
output: run
"""
WORDS = ["cat", "mat", "the end", "it", "there it is"] * 6
ROWS = [{"instruction": f"the {w}", "input": "on" * (i % 2), "output": w * (i % 3 + 1)} for i, w in enumerate(WORDS)]
CHAT = [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": w}]} for w in "abcdefgh"]


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("packed")
    model = jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1)
    jaxft.save_model(model, where / "base", make_tokenizer(chat_template=CHATML))
    jaxft.save_model(jaxft.testing.tiny_gpt2(vocab_size=300, n_positions=48), where / "short", make_tokenizer())
    jsonl(where / "rows.jsonl", ROWS)
    jsonl(where / "held.jsonl", ROWS[:3])
    jsonl(where / "chat.jsonl", CHAT)
    jsonl(where / "text.jsonl", [{"text": "the cat sat"}, {"text": "on the mat"}] * 16)
    (where / "c.yaml").write_text(CONFIG)
    return where


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def adapter(folder):
    with Tensors(folder / "adapter", "adapter_model.safetensors") as t:
        return {name: t.read(name) for name in t.shapes}


@pytest.mark.slow
def test_a_packed_run_and_one_that_broke_off(place, monkeypatch, capsys):
    cli.train("c.yaml", output="whole")
    said = capsys.readouterr().out
    job = Job(load_config("c.yaml"), say=lambda _: None)
    assert f"packing: 30 rows make {job.batches.packs} packs of 60 tokens" in said
    assert f"{job.steps} steps of 2 packs on" in said
    logged = [json.loads(line) for line in (place / "whole" / "metrics.jsonl").read_text().splitlines()]
    trained = sum(row["trained_tokens"] for row in logged if "trained_tokens" in row)
    assert trained == 3 * sum(row.trained for row in job.data.train[0].examples)
    summary = json.loads((place / "whole" / "summary.json").read_text())
    assert summary["steps"] == job.steps > 4
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    save = Checkpoints.save

    def stop(self, state):
        save(self, state)
        raise KeyboardInterrupt

    for _ in range(2):
        job = Job(load_config("c.yaml", ["output=broken"]), resume=(place / "broken").exists())
        monkeypatch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            job.train()
        monkeypatch.setattr(Checkpoints, "save", save)
    assert "going on after step 2" in capsys.readouterr().out
    cli.train("c.yaml", output="broken", resume=True)
    assert "going on after step 4" in capsys.readouterr().out
    whole, broken = adapter(place / "whole"), adapter(place / "broken")
    assert whole.keys() == broken.keys() and len(whole) > 0
    assert all(np.array_equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize(
    "source", ["{path: chat.jsonl, format: messages}", "{path: text.jsonl, format: text}", "[rows.jsonl, chat]"]
)
def test_every_format_is_packed(source, capsys):
    source = source.replace("chat]", "{path: chat.jsonl, format: messages, weight: 2}]")
    cli.validate("c.yaml", sets=[f"data.train={source}"])
    said = capsys.readouterr().out
    assert "packing: " in said and " % filled" in said and "c.yaml: good" in said


BAD = [
    (
        "train.batch_size=400",
        "packed into 60 tokens each, 30 rows become 6, fewer than one batch of 400: lower train.batch_size",
    ),
    (
        "model.path=short",
        "data.max_length 60: packs are as wide, but this model has 48 positions: set it to 48 at most",
    ),
]


@pytest.mark.parametrize(("override", "message"), BAD)
def test_what_is_wrong_is_said_before_the_first_step(override, message):
    with pytest.raises(JaxftError) as caught:
        Job(load_config("c.yaml", [override]), say=lambda _: None)
    assert message in str(caught.value)


def test_as_many_positions_as_a_pack_has_are_enough():
    Job(load_config("c.yaml", ["model.path=short", "data.max_length=48", "data.eval=null"]), say=lambda _: None)
