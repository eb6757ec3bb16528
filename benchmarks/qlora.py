"""What four or eight bits of the base cost: LoRA over it as it is, over int8 and over NF4; held-out loss and step time.

    JAX_PLATFORMS=cpu python benchmarks/qlora.py CONFIG OUT [--seeds 0 1 2] [--steps 300] [--sets KEY=VALUE ...]

CONFIG is one of supervised tuning by LoRA, such as configs/compare/e2e.yaml; its model, rows and schedule are kept. The
three bases follow each other within a seed. Printed: held-out loss before and after, the difference to the base as it
is, and the ratio of step times (over the base as it is), with means and ranges over the seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

BASES = {"as it is": "null", "int8": "int8", "nf4": "nf4"}


def run(config, out, kind, seed, steps, sets):
    """Return the summary of a run, and the median seconds of a step."""
    folder = out / f"{kind.replace(' ', '-')}-{seed}"
    if not (folder / "summary.json").is_file():
        every = [f"model.quantize={BASES[kind]}", f"train.seed={seed}", f"train.steps={steps}", *sets]
        command = ["train", str(config), "--output", str(folder), *(x for s in every for x in ("--set", s))]
        subprocess.run([sys.executable, "-m", "jaxft.cli", *command], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(line["step_seconds"] for line in lines if "step_seconds" in line)
    return json.loads((folder / "summary.json").read_text()), seconds


def spread(values, form):
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sets", nargs="+", default=[])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = {kind: [] for kind in BASES}
    for seed in given.seeds:
        for kind in BASES:
            summary, seconds = run(given.config, given.out, kind, seed, given.steps, given.sets)
            losses = [summary[when]["eval_loss"] for when in ("before", "after")]
            found[kind].append((*losses, seconds))
            print(f"seed {seed} {kind:9} {losses[0]:.4f} -> {losses[1]:.4f}, {1e3 * seconds:.0f} ms a step", flush=True)
    print(
        "| base | before | after | less that over the base as it is | ratio of step times |", "|---" * 5 + "|", sep="\n"
    )
    for kind, runs in found.items():
        before, after, _ = zip(*runs, strict=True)
        both = list(zip(runs, found["as it is"], strict=True))
        more, ratio = [a[1] - b[1] for a, b in both], [a[2] / b[2] for a, b in both]
        print(
            f"| {kind} | {before[0]:.4f} | {spread(after, '.4f')} | {spread(more, '+.4f')} | {spread(ratio, '.2f')} |"
        )


if __name__ == "__main__":
    main()
