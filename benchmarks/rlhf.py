"""What runs of PPO have reached on held-out prompts, as a table and a picture: rlhf.py PICTURE.png RUN ...

A run whose rewards are several is measured by the last of them (`eval_reward_NAME`). The gain is given in standard
deviations of the rewards before the run: those of the policy that it began with.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def evaluations(run):
    """Return step, reward, spread and KL of each evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        if "eval_reward" in row:
            names = [name for name in row if name.startswith("eval_reward_") and name != "eval_reward_std"]
            found.append(
                (row["step"], row[names[-1] if names else "eval_reward"], row["eval_reward_std"], row["eval_kl"])
            )
    return found


def main():
    picture, *runs = map(Path, sys.argv[1:])
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    spread = None
    print("| run | reward before | after | gain in standard deviations | KL after, nats an answer |")
    print("|---|---|---|---|---|")
    for run in runs:
        found = evaluations(run)
        steps, rewards, spreads, kl = zip(*found, strict=True)
        spread = spreads[0] if spread is None else spread
        gain = (rewards[-1] - rewards[0]) / (spreads[0] or spread)
        print(f"| {run.name} | {rewards[0]:.2f} | {rewards[-1]:.2f} | {gain:.1f} | {kl[-1]:.1f} |")
        for axes, values in ((left, rewards), (right, kl)):
            axes.plot(steps, values, marker="o", label=run.name)
    left.set(xlabel="step", ylabel="mean reward of an answer", title="Reward, held out")
    right.set(xlabel="step", ylabel="nats an answer", title="KL to the reference, held out")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
