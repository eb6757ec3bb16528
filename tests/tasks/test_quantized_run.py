"""Runs over a quantised base: config to adapter, and everything that is done with one afterwards."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from texts import make_tokenizer

import jaxft
from jaxft.config import load_config
from jaxft.errors import ConfigError
from jaxft.plan import make_plan
from jaxft.quant import NF4, Int8, is_quantized
from jaxft.testing import tiny_llama

CONFIG = """task: sft
model: {path: base, quantize: nf4}
method: {name: lora, r: 2, target_modules: all-linear}
data: {train: rows.jsonl, eval: held.jsonl, format: instruction, max_length: 60}
optimizer: {learning_rate: 1e-2}
train: {steps: 4, batch_size: 4, log_every: 2, eval_every: 2, save_every: 2}
evaluation: {samples: 0}
output: run
"""
DPO = """task: dpo
model: {path: done}
method: {name: lora, r: 2}
data: {train: pairs.jsonl, format: preference, max_length: 40}
train: {steps: 1, batch_size: 2}
output: dpo
"""
PPO = """task: ppo
model: {path: done}
method: {name: lora, r: 2}
data: {train: asked.jsonl, format: prompt, max_length: 24}
train: {steps: 1, batch_size: 4}
ppo: {reward: [{reward: regex, options: {pattern: "[a-m]", share: true}}], max_new_tokens: 4}
output: ppo
"""
CLASSIFY = """task: classify
model: {path: base, quantize: int8}
method: {name: lora, r: 2}
data: {train: kinds.jsonl, format: labelled, max_length: 24}
train: {steps: 1, batch_size: 4}
output: classify
"""
ROWS = [{"instruction": f"the {w}", "input": "", "output": w} for w in ["cat", "mat", "end", "it"] * 5]
IDS = jnp.array([[5, 6, 7, 8]])


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(tiny_llama(vocab_size=300, eos_token_id=1), where / "base", make_tokenizer())
    jsonl(where / "rows.jsonl", ROWS)
    jsonl(where / "held.jsonl", ROWS[:3])
    jsonl(where / "pairs.jsonl", [{"prompt": "the", "chosen": " cat", "rejected": " mat"}] * 4)
    jsonl(where / "asked.jsonl", [{"prompt": "the cat"}] * 4)
    jsonl(where / "kinds.jsonl", [{"text": w, "label": "ab"[i % 2]} for i, w in enumerate(["cat", "mat"] * 4)])
    for name, text in (("c", CONFIG), ("dpo", DPO), ("ppo", PPO), ("classify", CLASSIFY)):
        (where / f"{name}.yaml").write_text(text)
    return where


def kinds(model):
    """The kinds of the kernels of the layers."""
    layers = model.backbone.layers
    return {type(m.kernel.get_value()) for m in (layers.self_attn.q_proj, layers.mlp.down_proj)}


def test_the_run_learns_and_its_adapter_is_a_plain_peft_folder(done, monkeypatch):
    monkeypatch.chdir(done.parent)
    summary = json.loads((done / "summary.json").read_text())
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    assert summary["total_parameters"] == tiny_llama_parameters() + summary["trainable_parameters"]
    config = json.loads((done / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    tensors = load_file(done / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    assert all(".lora_" in name and x.dtype == np.float32 for name, x in tensors.items())
    over = jaxft.load_adapter(jaxft.load(done.parent / "base", quantize="nf4")[0], done / "adapter")
    np.testing.assert_array_equal(over(IDS), jaxft.load(done)[0](IDS))


def tiny_llama_parameters():
    return sum(x.size for x in jaxft.leaves(tiny_llama(vocab_size=300)).values())


def test_it_is_read_with_the_base_quantised_again(done, run, caplog):
    model = jaxft.load(done)[0]
    assert kinds(model) == {NF4}
    assert not caplog.records
    assert kinds(jaxft.load(done, quantize="int8")[0]) == {Int8}
    assert "its adapter was trained over a base of nf4, and now lies over int8" in caplog.text
    code, out, _ = run("evaluate", done)
    figures = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
    after = json.loads((done / "summary.json").read_text())["after"]
    assert code == 0
    assert figures["eval_loss"] == pytest.approx(after["eval_loss"], abs=1e-4)
    code, out, _ = run("generate", done, "--prompt", "the cat", "--max-new-tokens", "3")
    assert code == 0 and out


def test_the_merged_export_is_what_was_trained(done, run, tmp_path, caplog):
    """The adapter goes into the dequantised kernels, and not into those of the checkpoint."""
    assert run("export", done, "--format", "merged", "--output", tmp_path / "merged")[0] == 0
    assert re.search(r"dequantised kernels, not the checkpoint's: rounding to float32 moves them by \d", caplog.text)
    merged, model = jaxft.load(tmp_path / "merged")[0], jaxft.load(done)[0]
    assert not any(map(is_quantized, jaxft.leaves(merged).values()))
    np.testing.assert_allclose(merged(IDS), model(IDS), atol=1e-5)
    wrong = jaxft.merge(jaxft.load_adapter(jaxft.load(done.parent / "base")[0], done / "adapter"))
    assert np.abs(wrong(IDS) - model(IDS)).max() > 1e-3


@pytest.mark.parametrize("task", ["dpo", "ppo"])
@pytest.mark.slow
def test_later_stages_begin_with_the_base_in_its_bits(task, done, run):
    code, _, err = run("train", f"{task}.yaml")
    assert code == 0, err
    model = jaxft.load(done.parent / task)[0]
    assert kinds(model) == {NF4}
    assert len(jaxft.adapters(model)) == 2
    code, _, err = run("train", f"{task}.yaml", "--set", "model.quantize=int8", "--output", f"{task}-int8")
    assert code == 0, err
    assert kinds(jaxft.load(done.parent / f"{task}-int8")[0]) == {Int8}


def test_a_head_stays_whole_and_is_trained(place, run):
    code, _, err = run("train", "classify.yaml")
    assert code == 0, err
    model = jaxft.load(place / "classify")[0]
    assert kinds(model) == {Int8}
    assert isinstance(model.score.kernel.get_value(), jax.Array)


def test_resumed_it_is_the_same_run(done, run):
    shutil.copytree(done, done.parent / "half")
    (done.parent / "half" / "summary.json").unlink()
    shutil.rmtree(done.parent / "half" / "checkpoints" / "4")
    code, out, err = run("train", done / "config.yaml", "--resume", "--output", "half")
    assert code == 0, err
    assert "going on after step 2" in out
    ours, theirs = (load_file(done.parent / x / "adapter" / "adapter_model.safetensors") for x in ("half", "done"))
    assert all(np.array_equal(ours[name], x) for name, x in theirs.items())


def test_random_weights(place, run):
    code, _, err = run("train", "c.yaml", "--set", "model.init=random", "--set", "train.steps=1", "--output", "random")
    assert code == 0, err


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_plan_counts_the_bytes_of_the_leaves(kind, place, monkeypatch):
    monkeypatch.chdir(place)
    plan = make_plan(load_config("c.yaml", [f"model.quantize={kind}"]))
    live = jaxft.load("base", quantize=kind)[0]
    held = sum(x.nbytes for x in jax.tree.leaves(jaxft.attach(live, load_config("c.yaml").make_method())))
    assert plan.parameters_bytes == held
    shape = ["model.path=null", "model.config=base/config.json", f"model.quantize={kind}", "model.dtype=float32"]
    assert make_plan(load_config("c.yaml", shape)).parameters_bytes == held


def test_a_plan_of_a_folder_that_is_quantised_already(place, monkeypatch):
    monkeypatch.chdir(place)
    jaxft.save_model(jaxft.load("base", quantize="nf4")[0], "packed", make_tokenizer())
    ours = make_plan(load_config("c.yaml", ["model.path=packed", "model.quantize=null"]))
    assert ours.parameters_bytes == make_plan(load_config("c.yaml")).parameters_bytes
    for where in (["model.path=packed"], ["model.path=null", "model.config=packed/config.json"]):
        with pytest.raises(jaxft.CheckpointError, match="it is quantised as nf4 already, and int8 is asked for"):
            make_plan(load_config("c.yaml", [*where, "model.quantize=int8"]))


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (CONFIG, ["method={name: full}"], "method.name: full trains every kernel"),
        (CONFIG, ["method=[{name: lora}, {name: full}]"], "method.1.name: full trains"),
        (CONFIG, ["compare={full: {}}", "compare.full.method={name: full}"], "compare.full.method.name: full"),
        (PPO, ["model.quantize=nf4", "ppo.critic={name: full}"], "ppo.critic.name: full trains"),
        (CONFIG, ["model.quantize=fp4"], "model.quantize: 'fp4' is not one of nf4, int8"),
        (CONFIG, ["model.quantize=4"], "model.quantize: "),
    ],
)
def test_what_a_config_cannot_ask(text, overrides, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml", overrides)
    assert said in str(caught.value)
    if "full" in said:
        assert "name: lora" in str(caught.value)


def test_full_over_a_quantised_folder_is_refused(place, run):
    """Which the config does not say of itself."""
    jaxft.save_model(jaxft.load(place / "base", quantize="nf4")[0], place / "packed-2", make_tokenizer())
    sets = ["--set", "model={path: packed-2}", "--set", "method={name: full}"]
    code, _, err = run("validate", "c.yaml", *sets)
    assert code == 2
    assert "quantised kernels" in err
