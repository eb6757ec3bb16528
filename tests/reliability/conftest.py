"""A folder to run in, the unbroken run there, and runs in processes of their own, which can be killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.config import load_config
from jaxft.tasks.train import Job

CONFIG = """task: sft
model: {path: base}
method: {name: lora, r: 2, target_modules: [q_proj, v_proj], dropout: 0.1}
data: {train: [{path: a.jsonl}, {path: b.jsonl, weight: 2}], eval: b.jsonl, format: instruction, max_length: 60,
       template: {prompt_input: "{instruction} {input}:", prompt_no_input: "{instruction}:"}}
optimizer: {learning_rate: 1e-2, schedule: linear, warmup_steps: 1}
train: {steps: 16, batch_size: 4, accumulate: 2, seed: 0, log_every: 1, eval_every: 8, save_every: 1}
evaluation: {samples: 0}
output: run
"""
STRICT = {  # as in the conftest above, so that the programs are the same and are compiled once
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}


def write_rows(file, n, word):
    rows = [{"instruction": f"the {word}", "input": "on" * (i % 2), "output": f"{word} {i}"} for i in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def logged(folder):
    """Return the figures of each step so far; what a run sees and does leaves its mark in them."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n") if file.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [(r["step"], r["loss"], r["grad_norm"], r["trained_tokens"]) for r in rows if "loss" in r]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def half_written(folder):
    return list((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a base model, two sources of few rows (the run sees each row many times) and a config."""
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1), where / "base", make_tokenizer())
    write_rows(where / "a.jsonl", 10, "cat")
    write_rows(where / "b.jsonl", 6, "mat")
    (where / "c.yaml").write_text(CONFIG)
    return where


@pytest.fixture
def job(place, monkeypatch):
    """Return a function that makes a run there, in this process: `job(output, resume, "key=value", ...)`."""
    monkeypatch.chdir(place)

    def make(output, resume=False, *sets, **options):
        config = load_config("c.yaml", [*sets, f"output={output}"])
        return Job(config, resume=resume, **{"say": lambda _: None, **options})

    return make


@pytest.fixture(scope="session")
def whole(place):
    """The unbroken run."""
    before = os.getcwd()
    os.chdir(place)
    try:
        Job(load_config("c.yaml", ["output=whole"]), say=lambda _: None).train()
    finally:
        os.chdir(before)
    return place / "whole"


@pytest.fixture
def run(run):
    """Return a function that runs a command there, in this process: exit code, and all that was said."""

    def command(*args):
        code, out, err = run(*args)
        return code, out + err

    return command


class Child:
    """A command in a process of its own."""

    def __init__(self, where, *args):
        self.said = where / f"said-{time.monotonic_ns()}"
        env = {**os.environ, **STRICT, "PYTHONPATH": str(Path(jaxft.__file__).parents[1])}
        env["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        command = [sys.executable, "-m", "jaxft.cli", *map(str, args)]
        with self.said.open("w") as file:
            self.process = subprocess.Popen(command, cwd=where, env=env, stdout=file, stderr=subprocess.STDOUT)

    def wait_until(self, what):
        """Wait until something holds, while the process lives."""
        while not what():
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.001)

    def end(self):
        code = self.process.wait(120)
        return code, self.said.read_text()


@pytest.fixture
def child(place):
    """Return a function that starts a command there in a process of its own; what is left of them is killed."""
    started = []

    def start(*args):
        started.append(Child(place, *args))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
