"""STS-B with LoRA: ours against sentence-transformers with the same loss, batch, steps and learning rate.

    python benchmarks/stsb.py MODEL DATA OUT [--seeds 0 1 2] [--epochs 2] [--sides ours theirs]

MODEL is a sentence-transformers folder (MiniLM), DATA holds stsb-en-{train,dev,test}.csv without headers. Both train
the same pairs in orders of their own, AdamW with linear decay after a tenth of warm-up, dropout on, CoSENT.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

RATE, BATCH, R, ALPHA, TEMPERATURE = 5e-4, 32, 16, 32, 0.05


def rows(data, split):
    with (data / f"stsb-en-{split}.csv").open(encoding="utf-8") as file:
        return [(a, b, float(score)) for a, b, score in csv.reader(file)]


def ours(model, data, out, seed, epochs):
    for split in ("train", "test"):
        with (out / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("sentence1", "sentence2", "score"), *rows(data, split)])
    steps = epochs * len(rows(data, "train")) // BATCH
    config = f"""task: contrastive
model: {{path: {json.dumps(str(model))}}}
method: {{name: lora, r: {R}, alpha: {ALPHA}, target_modules: [query, value]}}
data: {{train: {out}/train.csv, eval: {out}/test.csv, format: scored_pairs, score_range: [0, 5], max_length: 128}}
contrastive: {{loss: cosent, temperature: {TEMPERATURE}}}
optimizer: {{learning_rate: {RATE}, schedule: linear, warmup_steps: {steps // 10}}}
train: {{steps: {steps}, batch_size: {BATCH}, seed: {seed}, log_every: 30}}
evaluation: {{batch_size: 64}}
output: {out}/run-{seed}
"""
    (out / "c.yaml").write_text(config)
    if not (out / f"run-{seed}" / "summary.json").is_file():
        subprocess.run([sys.executable, "-m", "jaxft.cli", "train", str(out / "c.yaml")], check=True)
    summary = json.loads((out / f"run-{seed}" / "summary.json").read_text())
    return {"before": summary["before"], "after": summary["after"], "seconds": summary["seconds"]}


def theirs(model, data, seed, epochs):
    import torch
    from peft import LoraConfig
    from scipy.stats import pearsonr, spearmanr
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CoSENTLoss
    from transformers.integrations import peft as integration

    integration.check_peft_version = lambda **_: None  # transformers asks for a newer peft than there is; this one does
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() and os.environ["JAX_PLATFORMS"] != "cpu" else "cpu"
    st = SentenceTransformer(str(model), device=device)
    st.max_seq_length = 128

    def figures():
        st.eval()
        test = rows(data, "test")
        left, right = (st.encode([row[i] for row in test], batch_size=64, normalize_embeddings=True) for i in (0, 1))
        cosines, scores = (left * right).sum(1), [row[2] for row in test]
        return {"eval_spearman": spearmanr(cosines, scores)[0], "eval_pearson": pearsonr(cosines, scores)[0]}

    before = figures()
    st.add_adapter(LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["query", "value"]))
    loss, train = CoSENTLoss(st, scale=1 / TEMPERATURE), rows(data, "train")
    steps = epochs * len(train) // BATCH
    trained = [p for p in st.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    warmup = steps // 10
    factor = lambda n: (n + 1) / (warmup + 1) if n < warmup else (steps - n) / (steps - warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(len(train)) for e in range(epochs + 1)])
    st.train()
    began = time.perf_counter()
    for n in range(steps):
        picked = [train[i] for i in order[n * BATCH : (n + 1) * BATCH]]
        features = [st.tokenize([row[i] for row in picked]) for i in (0, 1)]
        features = [{n: x.to(device) for n, x in each.items() if hasattr(x, "to")} for each in features]
        optimizer.zero_grad()
        loss(features, torch.tensor([row[2] / 5 for row in picked], device=device)).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    return {"before": before, "after": figures(), "seconds": seconds}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    sides = {"ours": lambda seed: ours(given.model, given.data, given.out, seed, given.epochs)}
    sides["theirs"] = lambda seed: theirs(given.model, given.data, seed, given.epochs)
    parser.add_argument("--sides", nargs="+", default=list(sides), choices=list(sides))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for seed in given.seeds:
        for name in given.sides:
            figures = sides[name](seed)
            before, after = (100 * figures[when]["eval_spearman"] for when in ("before", "after"))
            seconds = round(figures["seconds"])
            print(f"seed {seed} {name:6} Spearman {before:.2f} -> {after:.2f} in {seconds} s", flush=True)


if __name__ == "__main__":
    main()
