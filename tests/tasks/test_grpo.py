"""GRPO from a config to a finished run: it learns what is rewarded, and nothing where nothing is; it goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.config import load_config
from jaxft.data import numbered
from jaxft.errors import ConfigError
from jaxft.generation.rollout import Rollout
from jaxft.models.tensors import Tensors
from jaxft.plan import make_plan
from jaxft.tasks.registry import task_of
from jaxft.tasks.rollouts import Drawing
from jaxft.tasks.train import Job
from jaxft.train.checkpoint import Checkpoints
from jaxft.train.grpo import Drawn, GrpoOptions

CONFIG = """task: grpo
model: {path: base}
method: {name: full}
data: {train: rows.jsonl, eval: rows.jsonl, format: prompt, max_length: 16}
optimizer: {learning_rate: 2e-2}
train: {steps: 20, batch_size: 32, log_every: 1, eval_every: 10, save_every: 10}
evaluation: {samples: 2}
grpo:
  reward:
    - {reward: regex, options: {pattern: "[a-m]", share: true}}
    - {reward: exact_answer, weight: 0.5}
  group_size: 8
  max_new_tokens: 6
  minibatches: 2
  kl_coefficient: 0.001
output: run
"""
PROMPTS = ["the cat", "and there it is", "the end", "on the mat"]
REWARDS = """
def same(prompts, completions):
    return [0.3] * len(completions)

def bad(prompts, completions, answer):
    return [1 / (int(number) - 2) for number in answer]
"""
LORA = "method={name: lora, r: 2, target_modules: all-linear}"
SHORT = ("train.steps=2", "train.eval_every=null", "train.save_every=null")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, rows, a file of functions and a config."""
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1), where / "base", make_tokenizer())
    rows = [{"prompt": prompt, "answer": str(n)} for n, prompt in enumerate(PROMPTS * 2, 1)]
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "mine.py").write_text(REWARDS)
    (where / "c.yaml").write_text(CONFIG)
    return where


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(folder):
    return [row for row in logged(folder) if "loss" in row]


def tensors(folder, file):
    with Tensors(folder, file) as t:
        return {name: t.read(name) for name in t.shapes}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_it_learns_what_is_rewarded(done):
    """Twenty steps: letters of the first half, in training and on held-out prompts."""
    summary, rows = json.loads((done / "summary.json").read_text()), trained(done)
    before, after = (summary[end]["eval_reward"] for end in ("before", "after"))
    assert before < 0.3 and after > 0.6
    assert rows[0]["reward"] < 0.3 and rows[-1]["reward"] > 0.6
    assert rows[0]["entropy"] == pytest.approx(np.log(300), abs=0.1) and rows[-1]["entropy"] < 4


def test_it_leaves_what_it_should(done):
    rows = trained(done)
    names = {"reward", "reward_std", "reward_regex", "reward_exact_answer", "accuracy", "kl", "entropy"}
    names |= {"clip_fraction", "response_length", "ended", "equal_groups", "loss", "grad_norm", "tokens_per_second"}
    assert len(rows) == 20 and all(names <= set(row) for row in rows)
    assert all(np.isfinite(row[name]) for row in rows for name in names)
    for row in rows:
        assert row["reward"] == pytest.approx(row["reward_regex"] + 0.5 * row["reward_exact_answer"], abs=1e-5)
    evaluations = [row for row in logged(done) if "eval_reward" in row]
    assert [row["step"] for row in evaluations] == [0, 10, 20]
    assert {"eval_accuracy", "eval_reward_regex", "eval_reward_std", "eval_kl", "eval_ended"} <= set(evaluations[0])
    samples = [json.loads(line) for line in (done / "samples.jsonl").read_text().split("\n")[:-1]]
    assert len(samples) == 6 and {"step", "prompt", "answer", "reward"} == set(samples[0])
    assert (done / "report" / "learning.png").is_file() and (done / "report" / "curves.png").is_file()


def test_the_first_kl_is_0(done):
    """Exactly: policy and reference go through one pass, and are the same."""
    rows = trained(done)
    assert rows[0]["kl"] == 0 < rows[-1]["kl"]
    kls = [row["eval_kl"] for row in logged(done) if "eval_kl" in row]
    assert kls[0] == 0 < kls[-1]


def test_evaluate_gives_the_figures_of_the_run(done, run):
    summary = json.loads((done / "summary.json").read_text())["after"]
    code, out, _ = run("evaluate", done)
    figures = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
    assert code == 0 and figures == pytest.approx(summary, abs=1e-5)


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
    whole, broken = (tensors(folder / "model", "model.safetensors") for folder in (done, place / "broken"))
    assert same(whole, broken)
    timed = ("seconds", "per_second", "memory")
    kept = lambda row: {k: v for k, v in row.items() if not any(word in k for word in timed)}
    assert list(map(kept, logged(done))) == list(map(kept, logged(place / "broken")))


def test_equal_rewards_teach_nothing(run, place, monkeypatch):
    """And without a KL there is no reference; the draws are others each step, and the same each evaluation."""
    keys, drawn = [], []
    draw = Drawing.draw

    def drawing(self, model, batch, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return draw(self, model, batch, key)

    def keep(*args):
        drawn.append(args)
        return Drawn(*args)

    monkeypatch.setattr(Drawing, "draw", drawing)
    monkeypatch.setattr(jaxft.tasks.grpo, "Drawn", keep)
    sets = [LORA, "grpo.reward=mine.py:same", "grpo.kl_coefficient=0", *SHORT]
    code, _, err = run("train", "c.yaml", "--output", "same", *(part for one in sets for part in ("--set", one)))
    assert code == 0, err
    assert len(set(keys)) == 3 and keys[0] == keys[3]
    assert [(old is not None, ref) for _, _, old, ref in drawn] == [(True, None)] * 2  # two minibatches need the old
    rows = trained(place / "same")
    assert [(row["equal_groups"], row["grad_norm"], row["loss"]) for row in rows] == [(1, 0, 0)] * 2
    assert not any(name in rows[0] for name in ("kl", "accuracy", "reward_same"))
    found = tensors(place / "same" / "adapter", "adapter_model.safetensors")
    ups = [x for name, x in found.items() if "lora_B" in name]
    assert len(ups) == 14 and not any(x.any() for x in ups)  # as they began


METHODS = [
    LORA,
    "method={name: prefix_tuning, num_virtual_tokens: 3}",
    "method=[{name: adapter, kind: houlsby, reduction_factor: 4}, {name: bitfit, create: true}]",
    "method={name: ia3}",
    "method={name: prompt_tuning, num_virtual_tokens: 3}",
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_and_the_next_over_it(run, place, method):
    """The reference is what the stage begins with: after a run its adapter too, so that the first KL is 0 again."""
    name = f"run{METHODS.index(method)}"
    sets = [part for one in (*SHORT, "data.eval=null", "optimizer.learning_rate=0.1") for part in ("--set", one)]
    code, _, err = run("train", "c.yaml", "--set", method, *sets, "--output", name)
    assert code == 0, err
    first = trained(place / name)
    assert first[0]["kl"] == 0 < first[1]["kl"] and first[0]["grad_norm"] > 0
    code, _, err = run(
        "train", "c.yaml", "--set", "method=null", "--set", f"model.path={name}", *sets, "--output", f"{name}-next"
    )
    assert code == 0, err
    then = trained(place / f"{name}-next")
    assert then[0]["kl"] == 0 < then[1]["kl"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["{data: 4, fsdp: 2}", "{data: 2, fsdp: 2, tensor: 2}"])
def test_on_eight_devices_as_on_one(place, monkeypatch, mesh):
    """The same draws, figures and steps; and no step compiles again."""
    monkeypatch.chdir(place)
    sets = (
        "train.steps=3",
        "train.eval_every=3",
        "train.accumulate=2",
        "optimizer.name=sgd",
        "grpo.kl_coefficient=1.0",
    )
    figures = []
    for n, devices in enumerate(("null", mesh)):
        output = f"{mesh.count(':')}-{n}"
        job = Job(load_config("c.yaml", [*sets, f"mesh={devices}", f"output={output}"]), say=lambda _: None)
        job.train()
        assert [program._cache_size() for program in job.step.update.programs.values()] == [1]
        figures.append([{k: v for k, v in row.items() if k in COMPARED} for row in logged(place / output)])
    assert len(figures[0]) == 5
    for one, eight in zip(*figures, strict=True):
        assert eight == pytest.approx(one, abs=1e-5)


COMPARED = (
    "step",
    "reward",
    "accuracy",
    "kl",
    "loss",
    "grad_norm",
    "entropy",
    "eval_reward",
    "eval_kl",
    "response_length",
)


def test_what_a_reward_is_given(place, monkeypatch):
    """Of two answers the first comes to its end: its end token is no part of its length, nor of its text."""
    monkeypatch.chdir(place)
    task = task_of(load_config("c.yaml"))
    data = task.load_data()
    said = [data.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("cat", "the end: 12345")]
    new = np.zeros((2, 6), np.int32)
    new[0, : len(said[0]) + 1], new[1] = [*said[0], data.tokenizer.eos_token_id], said[1][:6]
    mask = np.arange(6)[None] < np.array([[len(said[0]) + 1], [6]])
    ids = np.concatenate([np.full((2, 3), 9), new], 1)
    rollout = Rollout(jnp.array(ids), jnp.array(mask), jnp.array(mask), jnp.array([True, False]))
    drawing = Drawing(jaxft.load("base")[0], data, task.rollouts, task.reward)
    answers = drawing.answers(rollout, {"row": np.array([2, -1])})
    assert len(said[0]) < 5 and len(said[1]) > 6
    assert answers.lengths.tolist() == [len(said[0]), 6]
    assert answers.completions == ["cat", data.tokenizer.decode(said[1][:6])]
    assert answers.prompts == [PROMPTS[2]] * 2 and answers.columns == {"answer": ["3", "3"]}
    assert [place[-7:] for place in answers.places] == ["jsonl:3"] * 2


def test_every_option_goes_to_the_step(place):
    said = {"kl_coefficient": 0.2, "correct_kl": True, "epochs": 3, "minibatches": 4, "clip": 0.1, "clip_high": 0.3}
    said |= {"ratio": "sequence", "reduction": "dr_grpo", "scale": "batch", "temperature": 0.7, "group_size": 16}
    said |= {"missing_end_penalty": 0.5}
    config = load_config(place / "c.yaml", [f"grpo.{k}={json.dumps(v)}" for k, v in said.items()])
    options = task_of(config).options
    assert options == GrpoOptions(**said, accumulate=1, max_length=6)
    assert all(
        getattr(options, name) != default
        for name, default in vars(GrpoOptions(group_size=8)).items()
        if name != "accumulate"
    )


def test_answers_to_a_prompt_stand_together(place, monkeypatch):
    """And an epoch sees each prompt once, however many answers there are to it."""
    monkeypatch.chdir(place)
    task = task_of(load_config("c.yaml", ["train.steps=null", "train.epochs=2"]))
    batches = task.make_batches(task.load_data())
    assert len(batches) == 4  # twice eight prompts, four at a time
    seen = [batches[n]["row"].reshape(-1, 8) for n in range(4)]
    assert all((rows == rows[:, :1]).all() for rows in seen)
    assert sorted(int(n) for rows in seen[:2] for n in rows[:, 0]) == list(range(8))
    assert len(numbered(task.data.train)[0]) == 8


def test_a_reward_that_fails_is_named_with_its_row(run):
    code, _, err = run("train", "c.yaml", "--set", "grpo.reward=mine.py:bad", "--output", "bad")
    assert code == 2 and "Traceback" not in err
    assert "reward 'bad': rows.jsonl:2 ('and there it is'): it raised ZeroDivisionError" in " ".join(err.split())


@pytest.mark.slow
def test_a_plan_counts_drawing_learning_and_the_reference(place, monkeypatch):
    monkeypatch.chdir(place)
    plans = [make_plan(load_config("c.yaml", [LORA, f"grpo.kl_coefficient={kl}"])) for kl in (0.0, 0.1)]
    state = jaxft.TrainState.create(jaxft.load("base")[0], load_config("c.yaml", [LORA]).make_method(), optax.sgd(0.1))
    trained = sum(x.nbytes for x in jaxft.leaves(state.trainable).values())
    assert plans[1].parameters_bytes - plans[0].parameters_bytes == trained > 0
    assert plans[0].width == 16 + 6 and plans[0].rows == 32 and plans[0].fits


WRONG = [
    ("train.batch_size=20", "train.batch_size: 20 answers are no whole number of groups of 8 (grpo.group_size)"),
    ("grpo.group_size=1", "grpo.group_size: should be greater than or equal to 2"),
    ("grpo.scale=true", "grpo.scale: True is not one of group, batch, none"),
    ("grpo.reduction=mean", "grpo.reduction: 'mean' is not one of grpo, bnpo, dr_grpo, dapo"),
    ("grpo.clip=0", "grpo.clip"),
    ("grpo=null", "grpo: it is missing: answers need a reward"),
    ("data.format=text", "task grpo reads prompt, this is 'text'"),
    ("ppo={reward: length}", "ppo: this section is for task: ppo, and the task is grpo"),
]


@pytest.mark.parametrize(("override", "what"), WRONG)
def test_a_config_that_cannot_be(place, override, what):
    with pytest.raises(ConfigError) as refused:
        load_config(place / "c.yaml", [override])
    assert what in str(refused.value)


@pytest.mark.parametrize("given", ["length", "[length]", "{reward: length}", "[{reward: length}]"])
def test_a_reward_may_be_written_shorter(place, given):
    (term,) = load_config(place / "c.yaml", [f"grpo.reward={given}"]).grpo.reward
    assert (term.reward, term.weight, term.options) == ("length", 1.0, {})


def test_what_is_wrong_with_a_reward_has_its_line(place):
    text = CONFIG[: CONFIG.index("  reward:")] + "  reward:\n    reward: length\n    wait: 2\noutput: run\n"
    (place / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"odd.yaml:11: grpo.reward.0.wait: unknown key; nearest: 'weight'"):
        load_config(place / "odd.yaml")


def test_a_batch_that_cannot_be_dealt_out(run):
    code, _, err = run("train", "c.yaml", "--set", "grpo.minibatches=3", "--output", "odd")
    assert code == 2 and "grpo.minibatches 3" in " ".join(err.split())
