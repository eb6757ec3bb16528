"""A run goes on with what it was begun with; each thing that is another one is named."""

import json
import shutil

import pytest
from conftest import write_rows
from texts import make_tokenizer

import jaxft
from jaxft.errors import RunError
from jaxft.tasks.fingerprints import BLOCK, _files, file_digest
from jaxft.train.checkpoint import Checkpoints

SETS = ("train.steps=4", "data.eval=b.jsonl", "train.eval_every=null")


@pytest.fixture(scope="module", autouse=True)
def begun(place):
    """A run that was interrupted after its first step."""
    import os

    from jaxft.config import load_config
    from jaxft.tasks.train import Job

    save, before = Checkpoints.save, os.getcwd()

    def stop(self, state):
        save(self, state)
        raise KeyboardInterrupt

    os.chdir(place)
    Checkpoints.save = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            Job(load_config("c.yaml", [*SETS, "output=begun"]), say=lambda _: None).train()
    finally:
        Checkpoints.save = save
        os.chdir(before)


@pytest.fixture
def put_back(place):
    """What a test does to rows and model is undone after it."""
    names = ("a.jsonl", "b.jsonl", "base")
    for name in names:
        (shutil.copytree if (place / name).is_dir() else shutil.copy)(place / name, place / f"{name}.kept")
    yield
    for name in names:
        shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()
        (place / f"{name}.kept").rename(place / name)


def change_a_row(place):
    text = (place / "a.jsonl").read_text()
    assert "cat 7" in text
    (place / "a.jsonl").write_text(text.replace("cat 7", "cat 9"))


def change_a_prompt(place):
    """As many tokens, the same answer: only the prompt's ids are others."""
    text = (place / "a.jsonl").read_text()
    (place / "a.jsonl").write_text(text.replace("the cat", "the sat", 1))


def append_a_row(place):
    write_rows(place / "b.jsonl", 7, "mat")


def turn_rows_round(place):
    lines = (place / "a.jsonl").read_text().splitlines(keepends=True)
    (place / "a.jsonl").write_text("".join(reversed(lines)))


def another_tokenizer(place):
    make_tokenizer(begin=False).save_pretrained(place / "base")


def another_depth(place):
    shutil.rmtree(place / "base")
    model = jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1, num_hidden_layers=3)
    jaxft.save_model(model, place / "base", make_tokenizer())


def other_weights(place):
    shutil.rmtree(place / "base")
    model = jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1, seed=1)
    jaxft.save_model(model, place / "base", make_tokenizer())


ROWS = "rows as before, but other ones, or in another order, or cut or tokenised otherwise"
CASES = [
    (change_a_row, [f"data.train: a has 10 {ROWS}"]),
    (change_a_prompt, [f"data.train: a has 10 {ROWS}"]),
    (append_a_row, ["data.train: b has 7 rows, and had 6", "data.eval: b has 7 rows, and had 6"]),
    (turn_rows_round, [f"data.train: a has 10 {ROWS}"]),
    (
        another_tokenizer,
        [f"{name} {ROWS}" for name in ("data.train: a has 10", "data.train: b has 6", "data.eval: b has 6")]
        + ["base: tokenizer.json holds something else than it did"],
    ),
    (other_weights, ["base: model.safetensors holds something else than it did"]),
]


@pytest.mark.parametrize(("change", "said"), CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_what_has_changed_is_named(place, job, put_back, change, said):
    change(place)
    with pytest.raises(RunError, match="begun: what the run was begun with has changed") as told:
        job("begun", True, *SETS)
    assert str(told.value).splitlines()[1:] == [f"  - {line}" for line in said]


def test_another_depth_names_every_leaf(place, job, put_back):
    another_depth(place)
    with pytest.raises(RunError) as told:
        job("begun", True, *SETS)
    stacked = [p for p, x in jaxft.leaves(jaxft.testing.tiny_llama()).items() if ".layers." in p]
    assert len(stacked) == 9
    deltas = [f"model.layers.self_attn.{p}.delta.default.{x}" for p in ("q_proj", "v_proj") for x in "ab"]
    for path in (*stacked, *deltas):
        assert f"  - {path} is float32 (3, " in str(told.value)
    assert "model.layers.self_attn.q_proj.kernel is float32 (3, 32, 32), and was float32 (2, 32, 32)" in str(told.value)
    assert "embed_tokens" not in str(told.value)


@pytest.mark.parametrize(
    ("set", "said"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: 0.01 then, 1"),
        ("train.seed=1", "train.seed: 0 then, 1 now"),
        ("data.max_length=9", "data.max_length: 60 then, 9 now"),
        ('data.template.prompt_no_input="{instruction}?"', "data.template.prompt_no_input: '{instruction}:' then"),
        ("method.r=3", "r: 2 then, 3 now"),
    ],
)
def test_another_config_is_named(run, set, said):
    sets = [word for one in (*SETS, set) for word in ("--set", one)]
    code, out = run("train", "c.yaml", "--output", "begun", "--resume", *sets)
    assert code == 2
    assert "begun: the run was begun with another config" in out
    assert said in out


def test_nothing_has_changed(place, job):
    job("begun", True, *SETS)


def test_the_folders_of_modules_count(tmp_path):
    """Of a folder as of sentence-transformers 2: how it pools is what the run was begun with."""
    base = jaxft.save_sentence_transformer(jaxft.testing.tiny_bert(vocab_size=300), tmp_path / "st", make_tokenizer())
    modules = json.loads((base / "modules.json").read_text())
    (base / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (base / name).rename(base / "0_Transformer" / name)
    modules[0]["path"] = "0_Transformer"
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "runs").mkdir()
    (base / "runs" / "notes.json").write_text("{}")
    names = {name.removeprefix(f"{base}: ") for name, _ in _files(str(base))}
    assert {"modules.json", "0_Transformer/model.safetensors", "1_Pooling/config.json"} <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {"0_Transformer", "1_Pooling"}


def test_before_the_first_checkpoint(place, job, run, put_back):
    """It begins at step 0 and says so, if rows and model are as they were."""
    shutil.copytree(place / "begun", place / "early")
    for step in (place / "early" / "checkpoints").glob("[0-9]*"):
        shutil.rmtree(step)
    sets = [word for one in SETS for word in ("--set", one)]
    change_a_row(place)
    code, out = run("train", "c.yaml", "--output", "early", "--resume", *sets)
    assert (code, "data.train: a has 10 rows as before, but other ones" in out) == (2, True)
    shutil.copy(place / "a.jsonl.kept", place / "a.jsonl")
    code, out = run("train", "c.yaml", "--output", "early", "--resume", *sets)
    assert (code, "no checkpoint has been written yet: the run begins at step 0" in out) == (0, True)


def test_fingerprints_that_are_gone(place, job):
    """With checkpoints there is no telling what they are of; without any there is nothing to tell."""
    shutil.copytree(place / "begun", place / "gone")
    (place / "gone" / "checkpoints" / "fingerprints.json").unlink()
    with pytest.raises(RunError, match=r"fingerprints.json: it tells what the run was begun with, and cannot be read"):
        job("gone", True, *SETS)
    shutil.rmtree(place / "gone" / "checkpoints")
    job("gone", True, *SETS)


def test_all_damaged_is_no_fresh_start(place, run):
    shutil.copytree(place / "begun", place / "bad")
    (place / "bad" / "checkpoints" / "1" / "record" / "metadata").write_text("{}")
    sets = [word for one in SETS for word in ("--set", one)]
    code, out = run("train", "c.yaml", "--output", "bad", "--resume", *sets)
    assert code == 2
    assert "every checkpoint is damaged, so the run cannot go on" in out
    assert not (place / "bad" / "summary.json").exists()


def test_the_digest_of_a_large_file(tmp_path):
    """Each of its ends and a few places between are looked at; of a small one every byte."""
    file = tmp_path / "file"
    for size, places in ((1000, range(0, 1000, 97)), (40 * BLOCK, [0, 40 * BLOCK // 15 * 7, 40 * BLOCK - 1])):
        data = bytearray(size)
        file.write_bytes(data)
        seen = {file_digest(file)}
        for at in places:
            data[at] = 1
            file.write_bytes(data)
            data[at] = 0
            seen.add(file_digest(file))
        assert len(seen) == 1 + len(places)


def test_the_file_can_be_read(place):
    kept = json.loads((place / "begun" / "checkpoints" / "fingerprints.json").read_text())
    assert set(kept) == {"rows", "files", "leaves"}
    assert kept["rows"]["data.train: a"]["rows"] == 10
    assert {"base: config.json", "base: model.safetensors", "base: tokenizer.json"} <= set(kept["files"])
