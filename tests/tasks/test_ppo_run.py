"""PPO from a config to a finished run: it learns what is rewarded, holds one base, compiles once and goes on."""

import gc
import json
from itertools import pairwise

import jax
import numpy as np
import optax
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.config import load_config
from jaxft.data.prompts import collate_prompts
from jaxft.errors import BatchError, ConfigError, DataError, RewardError
from jaxft.methods.partition import leaves
from jaxft.models.sharing import with_head
from jaxft.models.tensors import Tensors
from jaxft.plan import make_plan
from jaxft.tasks.rollouts import Drawing
from jaxft.tasks.train import Job
from jaxft.train.checkpoint import Checkpoints

CONFIG = """task: ppo
model: {path: base}
method: {name: full}
data: {train: rows.jsonl, eval: held.jsonl, format: prompt, max_length: 16}
optimizer: {learning_rate: 1e-2, schedule: linear, warmup_steps: 1}
train: {steps: 20, batch_size: 32, log_every: 1, eval_every: 10, save_every: 10}
evaluation: {samples: 2}
ppo:
  reward: [{reward: regex, options: {pattern: "[a-m]", share: true}}]
  max_new_tokens: 6
  missing_end_penalty: 0.1
  kl_coefficient: 0.001
  kl_target: 1.0
  kl_horizon: 1000
  epochs: 2
  minibatches: 2
output: run
"""
REWARD = """task: reward
model: {path: base}
method: {name: lora, r: 2}
data: {train: rows.jsonl, format: preference}
output: reward
"""
PROMPTS = ["the cat", "and there it is", "the end", "on the mat"]
LORA = "method={name: lora, r: 2, target_modules: all-linear}"
SHORT = ("train.steps=2", "train.eval_every=null", "train.save_every=null", "optimizer.warmup_steps=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, a reward model's run over it, rows and a config."""
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1), where / "base", make_tokenizer())
    for file, times in (("rows.jsonl", 8), ("held.jsonl", 2)):
        rows = [{"prompt": prompt} for prompt in PROMPTS * times]
        (where / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "c.yaml").write_text(CONFIG)
    scorer = with_head(jaxft.load(where / "base")[0], ("score",))
    jaxft.save_adapter(jaxft.TrainState.create(scorer, jaxft.LoRA(r=2), optax.sgd(1.0)), where / "reward" / "adapter")
    (where / "reward" / "config.yaml").write_text(REWARD)
    (where / "reward" / "summary.json").write_text("{}")
    return where


@pytest.fixture
def job(place, monkeypatch):
    """Return a function that makes a run there."""
    monkeypatch.chdir(place)
    return lambda *sets: Job(load_config("c.yaml", [*sets, "output=job"]), say=lambda _: None)


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(folder):
    return [row for row in logged(folder) if "loss" in row]


def tensors(folder, file="model.safetensors"):
    with Tensors(folder, file) as t:
        return {name: t.read(name) for name in t.shapes}


def untimed(rows):
    return [{k: v for k, v in row.items() if not any(word in k for word in ("second", "memory"))} for row in rows]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def given(*sets):
    return [part for one in sets for part in ("--set", one)]


def test_it_learns_what_is_rewarded(done):
    """Twenty steps: letters of the first half, in training and on held-out prompts."""
    summary, rows = json.loads((done / "summary.json").read_text()), trained(done)
    before, after = (summary[end]["eval_reward"] for end in ("before", "after"))
    assert before < 0.3
    assert after > 0.6
    assert rows[0]["reward"] < 0.3
    assert rows[-1]["reward"] > 0.6
    assert rows[0]["entropy"] == pytest.approx(np.log(300), abs=0.1)
    assert rows[-1]["entropy"] < 5
    assert rows[-1]["value_explained_variance"] > rows[0]["value_explained_variance"]


def test_it_leaves_what_it_should(done):
    rows = trained(done)
    names = {"loss", "policy_loss", "value_loss", "reward", "reward_std", "kl", "kl_coefficient", "objective"}
    names |= {"approx_kl", "entropy", "clip_fraction", "value_explained_variance", "response_length", "ended"}
    names |= {"updates", "stopped", "skipped", "grad_norm", "critic_grad_norm", "tokens_per_second", "learning_rate"}
    assert len(rows) == 20
    assert all(names <= set(row) and np.isfinite([row[name] for name in names]).all() for row in rows)
    for row in rows:
        expected = row["reward"] - 0.1 * (1 - row["ended"]) - row["kl_coefficient"] * row["kl"]
        assert row["objective"] == pytest.approx(expected, abs=1e-5)
        assert row["updates"] == 4
    rates = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(rates, [0, *(1e-2 * (19 - n) / 19 for n in range(19))], rtol=1e-5)
    evaluations = [row for row in logged(done) if "eval_reward" in row]
    assert [row["step"] for row in evaluations] == [0, 10, 20]
    assert {"eval_reward_std", "eval_kl", "eval_response_length", "eval_ended"} <= set(evaluations[0])
    samples = [json.loads(line) for line in (done / "samples.jsonl").read_text().split("\n")[:-1]]
    assert len(samples) == 6
    assert set(samples[0]) == {"step", "prompt", "answer", "reward"}
    assert (done / "report" / "learning.png").is_file()


def test_the_coefficient_goes_where_the_kl_is(done):
    """Up where it is above its target of 1, by 0.2 x 32 answers over the horizon at most."""
    rows = trained(done)
    assert rows[0]["kl_coefficient"] == pytest.approx(0.001)
    seen = 0
    for row, after in pairwise(rows):
        factor = after["kl_coefficient"] / row["kl_coefficient"]
        assert factor == pytest.approx(1 + 0.032 * np.clip(row["kl"] - 1, -0.2, 0.2), rel=1e-4)
        seen += row["kl"] > 1
    assert seen > 3


def test_the_first_kl_is_0(done):
    """Exactly: policy and reference go through one pass, and are the same."""
    rows = trained(done)
    assert rows[0]["kl"] == rows[1]["kl"] == 0 < rows[-1]["kl"]  # the first step of the warm-up is of rate 0
    kls = [row["eval_kl"] for row in logged(done) if "eval_kl" in row]
    assert kls[0] == 0 < kls[-1]


def test_evaluate_gives_the_figures_of_the_run(done, run):
    summary = json.loads((done / "summary.json").read_text())
    for what, end in ((done, "after"), ("c.yaml", "before")):
        code, out, err = run("evaluate", what)
        assert code == 0, err
        figures = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
        assert figures == pytest.approx(summary[end], abs=1e-5)


def test_what_is_done_with_a_run(done, run):
    code, out, err = run("generate", done, "--prompt", "the cat", "--max-new-tokens", 4, "--temperature", 1)
    assert code == 0, err
    assert out.strip()
    assert run("export", done, "--format", "merged", "--output", "merged")[0] == 0
    assert same(tensors(done.parent / "merged"), tensors(done / "model"))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(done, run, place, monkeypatch):
    save = Checkpoints.save

    def stop(self, state):
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop)
    assert run("train", "c.yaml", "--output", "broken")[0] == 130
    monkeypatch.setattr(Checkpoints, "save", save)
    code, out, err = run("train", "c.yaml", "--output", "broken", "--resume")
    assert (code, "going on after step 10" in out) == (0, True), err
    assert same(tensors(done / "model"), tensors(place / "broken" / "model"))
    timed = ("seconds", "per_second", "memory")
    kept = lambda row: {k: v for k, v in row.items() if not any(word in k for word in timed)}
    assert list(map(kept, logged(done))) == list(map(kept, logged(place / "broken")))


def alive():
    """The bytes of each buffer that some array has, but for arrays that other tests have left on several devices."""
    gc.collect()
    plain = [x for x in jax.live_arrays() if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    arrays = [x for x in plain if len(x.devices()) == 1]
    return {x.unsafe_buffer_pointer(): x.nbytes for x in arrays}


def test_an_evaluation_counts_each_prompt_once(job):
    """Those that fill a batch up count nothing."""
    made = job("train.steps=1", "train.eval_every=null", "train.save_every=null", "optimizer.warmup_steps=0")
    figures, said = made.task.evaluate(made.state.model, made.data, 32)
    assert [row["prompt"] for row in said] == PROMPTS * 2
    assert figures["reward"] == pytest.approx(np.mean([row["reward"] for row in said]))
    assert figures["reward_std"] == pytest.approx(np.std([row["reward"] for row in said]))
    assert made.task.evaluate(made.state.model, made.data, 32)[1] == said


def test_four_roles_hold_one_base_and_compile_once(job, caplog, monkeypatch):
    """Policy, reference, critic and reward model over one base, by the bytes of all arrays that are alive."""
    before = alive()
    made = job(LORA, "ppo.reward=reward", *SHORT, "train.steps=4")
    files = made.fingerprints["files"]
    assert {"reward/adapter: adapter_model.safetensors", "base: model.safetensors"} <= set(files)
    keys, draw = [], Drawing.draw
    monkeypatch.setattr(Drawing, "draw", lambda self, *given: keys.append(given[-1]) or draw(self, *given))
    state, batches = made.state, made.batches.iterate(0)
    state, _ = made.step(state, next(batches))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for _ in range(2):
            state, metrics = made.step(state, next(batches))
    assert not [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()]
    assert float(metrics["skipped"]) == 0
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == 3  # each step draws anew
    held = sum(x.nbytes for x in leaves(state.frozen).values())
    small = sum(x.nbytes for x in jax.tree.leaves((state.trainable, state.opt_state, state.critic)))
    del metrics
    new = sum(size for at, size in alive().items() if at not in before)
    assert held < new < held + 2 * small < 2 * held, (held, small, new)


METHODS = [
    LORA,
    "method={name: prefix_tuning, num_virtual_tokens: 3}",
    "method=[{name: adapter, kind: houlsby, reduction_factor: 4}, {name: bitfit, create: true}]",
    "method={name: ia3}",
    "method={name: prompt_tuning, num_virtual_tokens: 3}",
]


CASES = [pytest.param(m, more, marks=pytest.mark.slow) for m in METHODS[1:] for more in ("method=null", LORA)]
CASES = [(LORA, "method=null"), pytest.param(LORA, LORA, marks=pytest.mark.slow), *CASES]


@pytest.mark.parametrize(("method", "more"), CASES)
def test_a_run_of_each_method_and_the_next_over_it(run, place, method, more):
    """The reference is what the stage begins with: after a run its adapter too, so that the first KL is 0 again."""
    name = f"run{METHODS.index(method)}{len(more)}"
    critic = "null" if "bitfit" not in method else "{name: lora, r: 2}"  # a second copy of a bias does not stack
    sets = given(*SHORT, "data.eval=null", "optimizer.learning_rate=0.1", f"ppo.critic={critic}")
    code, _, err = run("train", "c.yaml", *given(method), *sets, "--output", name)
    assert code == 0, err
    first = trained(place / name)
    assert first[0]["kl"] == 0 != first[1]["kl"]
    assert first[0]["grad_norm"] > 0
    code, _, err = run("train", "c.yaml", *given(more, f"model.path={name}"), *sets, "--output", f"{name}-next")
    assert code == 0, err
    then = trained(place / f"{name}-next")
    assert then[0]["kl"] == 0 != then[1]["kl"]
    assert then[0]["entropy"] != first[0]["entropy"]


@pytest.mark.slow
def test_a_mesh_gives_the_figures_of_one_device(run, place):
    for name, mesh in (("alone", ()), ("split", ("mesh={data: 2, fsdp: 4}", "model.path=wide"))):
        config = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "eos_token_id": 1}
        jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=304, **config), place / "wide", make_tokenizer())
        sets = given(*SHORT, "data.eval=held.jsonl", "train.eval_every=1", "model.path=wide", LORA, *mesh)
        code, _, err = run("train", "c.yaml", *sets, "--output", name)
        assert code == 0, err
    alone, split = logged(place / "alone"), logged(place / "split")
    assert len(alone) == len(split) == 5
    for one, other in zip(alone, split, strict=True):
        for key in one.keys() - {
            "seconds",
            "peak_memory_bytes",
            "step_seconds",
            "tokens_per_second",
            "rows_per_second",
        }:
            assert other[key] == pytest.approx(one[key], rel=5e-3, abs=1e-4), key


def test_prompts_that_leave_no_room_are_named(place, monkeypatch):
    monkeypatch.chdir(place)
    model = jaxft.testing.tiny_gpt2(vocab_size=300, eos_token_id=1, n_positions=10)
    jaxft.save_model(model, "short", make_tokenizer())
    with pytest.raises(BatchError, match=r"the model has 10 positions, 6 of them for the answer") as refused:
        Job(load_config("c.yaml", ["model.path=short", LORA, "ppo.max_new_tokens=6"]), say=lambda _: None)
    said = str(refused.value)
    assert said.count(".jsonl:") == 10
    assert "rows.jsonl:2: the prompt has 5 tokens" in said


def test_a_tokenizer_without_an_end_is_refused(place, monkeypatch):
    monkeypatch.chdir(place)
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300), "endless", make_tokenizer(eos_token=None))
    with pytest.raises(DataError, match="the tokenizer has no end token"):
        Job(load_config("c.yaml", ["model.path=endless"]), say=lambda _: None)


WRONG = [
    ("ppo.minibatches=3", "train.batch_size 32: it does not divide into ppo.minibatches 3"),
    ("ppo.critic={name: lora, ranks: 3}", "ppo.critic.ranks: lora has no such option"),
    ("ppo.critic={r: 3}", "ppo.critic.name: name is missing"),
    ("ppo.kl_kind=k4", "ppo.kl_kind: 'k4' is not one of k1, k2, k3"),
    ("ppo=null", "ppo: it is missing: answers need a reward"),
    ("ppo.clip=1", "ppo.clip"),
]


@pytest.mark.parametrize(("override", "what"), WRONG)
def test_a_config_that_cannot_be(job, override, what):
    with pytest.raises(ConfigError) as refused:
        job(override)
    assert what in str(refused.value)


def test_a_plan_counts_the_base_once(place, monkeypatch):
    monkeypatch.chdir(place)
    plan = make_plan(load_config("c.yaml", [LORA]))
    made = Job(load_config("c.yaml", [LORA, "output=planned"]), say=lambda _: None)
    state = made.state
    roles = (state.trainable, state.frozen, state.reference, state.critic.trainable, state.critic.frozen)
    assert plan.parameters_bytes == sum(x.nbytes for x in jax.tree.leaves(roles))
    assert plan.optimizer_bytes == sum(x.nbytes for x in jax.tree.leaves((state.opt_state, state.critic.opt_state)))
    assert plan.total_bytes > plan.parameters_bytes + plan.optimizer_bytes
    assert (plan.rows, plan.width) == (32, 22)


FITTING = """
def fitting(prompts, completions, level):
    return [0.0 if one is None else float(one) for one in level]
"""


def test_a_column_that_one_source_lacks_is_none_there(job, place):
    """Also in a batch of that source alone: the function is called with it, as was checked."""
    (place / "levels.jsonl").write_text(json.dumps({"prompt": "the end", "level": 2}) + "\n")
    (place / "fitting.py").write_text(FITTING)
    made = job("data.train=[rows.jsonl, levels.jsonl]", "ppo.reward=fitting.py:fitting", *SHORT)
    drawing, rows = made.step.drawing, made.data.train
    for part, worth in zip(rows, (0, 2), strict=True):
        batch = collate_prompts(part.examples[:1], width=8)
        answers = drawing.answers(drawing.draw(made.state.model, batch, jax.random.key(0)), batch)
        assert drawing.scored(answers)[0].tolist() == [worth]


def save_scorer(folder, model):
    jaxft.save_model(with_head(model, ("score",)), folder, make_tokenizer())


def test_a_reward_model_that_knows_fewer_tokens_is_refused(job, place):
    """The tokenizer is the same, but the policy's table is padded: its last tokens are in no row of the other's."""
    save_scorer(place / "few", jaxft.testing.tiny_llama(vocab_size=290))
    with pytest.raises(RewardError, match=r"'few': it knows 290 tokens, and the policy draws from 300"):
        job("ppo.reward=few")


def test_a_reward_model_of_few_positions_is_refused_before_training(job, place):
    save_scorer(place / "brief", jaxft.testing.tiny_gpt2(vocab_size=300, n_positions=10))
    with pytest.raises(BatchError, match=r"the reward model 'brief' has 10 positions, 6 of them") as refused:
        job("ppo.reward=brief")
    assert "rows.jsonl:2: the prompt has 5 tokens" in str(refused.value)


def test_a_row_of_a_file_that_is_named_twice_is_told_once(job, place):
    save_scorer(place / "brief", jaxft.testing.tiny_gpt2(vocab_size=300, n_positions=10))
    (place / "bad.jsonl").write_text('{"prompt": ""}\n')
    for sets, error, row in (
        (["ppo.reward=brief", "data.eval=rows.jsonl"], BatchError, "rows.jsonl:2:"),
        (["data.train=bad.jsonl", "data.eval=bad.jsonl"], DataError, "bad.jsonl:1:"),
        (["ppo.reward=exact_answer", "data.train=held.jsonl"], RewardError, "held.jsonl:2:"),
    ):
        with pytest.raises(error) as refused:
            job(*sets)
        assert str(refused.value).count(row) == 1
