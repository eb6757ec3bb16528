"""Few examples a class: cross-entropy alone against SupCon first and the head after it, with the same steps in all.

    python benchmarks/banking77.py MODEL DATA OUT [--shots 8 16 32] [--seeds 0 1 2] [--steps 300] [--batch 64]
                                                  [--rows N]

MODEL is a sentence encoder's folder, DATA holds train.csv and test.csv with the columns text and category.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np


def sample(data, out, shots, seed):
    """Write the same number of rows of each class."""
    with (data / "train.csv").open(encoding="utf-8") as file:
        by_class = defaultdict(list)
        for row in csv.DictReader(file):
            by_class[row["category"]].append(row["text"])
    draw = np.random.default_rng(seed)
    picked = [(text, name) for name in sorted(by_class) for text in draw.choice(by_class[name], shots, replace=False)]
    target = out / f"train-{shots}-{seed}.csv"
    with target.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "category"), *picked])
    return target


def run(model, train, data, out, name, seed, steps, first, batch, rows):
    source = "{{path: {}, columns: {{label: category}}}}"
    config = f"""task: classify
model: {{path: {json.dumps(str(model))}, pooling: mean}}
method: {{name: lora, r: 16, alpha: 32, target_modules: all-linear}}
data: {{format: labelled, max_length: 64, train: {source.format(train)}, eval: {source.format(data / "test.csv")}}}
classify: {{contrastive_steps: {first}, temperature: 0.1}}
optimizer: {{learning_rate: 1e-3, schedule: linear, warmup_steps: {steps // 10}}}
train: {{steps: {steps}, batch_size: {batch}, seed: {seed}, log_every: 25}}
evaluation: {{batch_size: 128, rows: {rows or "null"}}}
output: {out}/{name}
"""
    (out / f"{name}.yaml").write_text(config)
    if not (out / name / "summary.json").is_file():
        subprocess.run([sys.executable, "-m", "jaxft.cli", "train", str(out / f"{name}.yaml")], check=True)
    return json.loads((out / name / "summary.json").read_text())["after"]["eval_accuracy"]


def main():
    parser = argparse.ArgumentParser()
    for name in ("model", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--shots", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, help="test rows, at even distances; all by default")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for shots in given.shots:
        found = defaultdict(list)
        for seed in given.seeds:
            train = sample(given.data, given.out, shots, seed)
            for kind, first in (("cross-entropy", 0), ("supcon", given.steps // 2)):
                name = f"{kind}-{shots}-{seed}"
                how = seed, given.steps, first, given.batch, given.rows
                found[kind].append(run(given.model, train, given.data, given.out, name, *how))
        for kind, values in found.items():
            each = ", ".join(f"{100 * v:.1f}" for v in values)
            print(f"{shots} a class, {kind:14} {100 * statistics.mean(values):.2f} % ({each})", flush=True)


if __name__ == "__main__":
    main()
