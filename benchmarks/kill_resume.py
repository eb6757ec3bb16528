"""SIGKILL at random steps: does a run that is killed again and again end with the bits of one that was left alone?

One test command (LoRA with dropout, two sources mixed one to three, two micro-batches, each source shuffled over
several epochs, a checkpoint every second step) runs once undisturbed, and then in rounds: killed at random steps, taken
up with `--resume`, killed again, until it ends; then the next round begins, until there were enough kills. Half of the
kills wait for a checkpoint that is being written. Printed: each kill, where the run went on, and whether the adapter's
sha256 and the figures of every step are those of the undisturbed run.

    python benchmarks/kill_resume.py [--kills 20] [--seed N] [--folder DIR]

Exit code 1 where a bit differs, or where too few kills were what they should be: half of them must have left a
checkpoint to go on from, and at least one must have fallen inside a save.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS, KILLS_A_ROUND = 60, 5
CONFIG = """task: sft
model: {{path: {root}/configs/quickstart/model}}
method: {{name: lora, r: 4, alpha: 8, target_modules: all-linear, dropout: 0.1}}
data:
  train: [{{path: {folder}/a.jsonl}}, {{path: {folder}/b.jsonl, weight: 3}}]
  format: instruction
  template: {{prompt_input: "{{instruction}}: {{input}} -> ", prompt_no_input: "{{instruction}} -> "}}
optimizer: {{learning_rate: 1e-3, schedule: cosine, warmup_steps: 5, clip_norm: 1.0}}
train: {{steps: {steps}, batch_size: 8, accumulate: 2, seed: 7, log_every: 1, save_every: 2}}
output: {folder}/run
"""


def prepare(folder):
    rows = (ROOT / "configs/quickstart/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(rows[:50]))
    (folder / "b.jsonl").write_text("".join(rows[50:120]))
    (folder / "config.yaml").write_text(CONFIG.format(root=ROOT, folder=folder, steps=STEPS))


def start(folder, output, resume):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "jaxft.cli", "train", folder / "config.yaml", "--output", folder / output]
    with (folder / "said").open("w") as said:
        return subprocess.Popen(
            [*command, *["--resume"] * resume], cwd=folder, env=env, stdout=said, stderr=subprocess.STDOUT
        )


def logged(run):
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n") if line.endswith("}")] if file.is_file() else []
    return [(row["step"], row["loss"], row["grad_norm"], row["trained_tokens"]) for row in rows]


def half_written(run):
    return list((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def result(run):
    """Return what must be equal: the adapter's digest, and the figures of every step."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(), logged(run)


def finish(folder, process, what):
    if process.wait():
        sys.exit(f"{what} ended with exit code {process.returncode}:\n{(folder / 'said').read_text()}")


def kill(folder, output, resume, dice):
    """Kill one start at a random step; return None where it had ended before."""
    run, inside = folder / output, dice.random() < 0.5
    goal = len(logged(run)) + dice.randint(3, 12)
    process = start(folder, output, resume)
    while process.poll() is None and (len(logged(run)) < goal or (inside and not half_written(run))):
        time.sleep(0.0005)
    if not inside:
        time.sleep(dice.random() * 0.1)
    if process.poll() is not None:
        finish(folder, process, "a start")
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    on = re.search(r"going on after step (\d+)", (folder / "said").read_text())
    return {"began": int(on[1]) if on else 0, "killed": len(logged(run)), "inside": bool(half_written(run))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    dice, kills, equal, rounds = random.Random(args.seed), [], True, 0
    finish(folder, start(folder, "whole", False), "the undisturbed run")
    whole = result(folder / "whole")
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    print(f"seed {args.seed}")
    print(f"undisturbed: {STEPS} steps, adapter sha256 {whole[0]}\n")
    print("| round | kill | start went on after step | last step logged | inside a save |\n|---|---|---|---|---|")
    while len(kills) < args.kills:
        rounds, output = rounds + 1, f"round{rounds}"
        for n in range(min(KILLS_A_ROUND, args.kills - len(kills))):
            one = kill(folder, output, n > 0, dice)
            if one is None:
                break
            kills.append(one)
            inside = "yes" if one["inside"] else "no"
            print(f"| {rounds} | {len(kills)} | {one['began']} | {one['killed']} | {inside} |", flush=True)
        else:
            finish(folder, start(folder, output, True), "the last start")
        same = result(folder / output) == whole
        equal &= same
        print(f"| {rounds} | ended | | adapter and figures {'equal' if same else 'DIFFER'} | |", flush=True)
    inside = sum(one["inside"] for one in kills)
    began = [one["began"] for one in kills if one["began"]]
    print(f"\n{len(kills)} kills in {rounds} rounds, {inside} inside a save.")
    print(f"{len(began)} of the killed starts had gone on from a checkpoint, after steps {began}.")
    print(f"Adapter and figures of all rounds {'equal' if equal else 'DIFFER from'} the undisturbed run's.")
    if args.folder is None:
        shutil.rmtree(folder)
    sys.exit(not (equal and inside and 2 * len(began) >= len(kills)))


if __name__ == "__main__":
    main()
