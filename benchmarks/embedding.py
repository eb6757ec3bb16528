"""Sentences/s of embeddings and of contrastive training steps, jaxft beside sentence-transformers, on a CPU.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE JAX_PLATFORMS=cpu \\
        python benchmarks/embedding.py FOLDER PAIRS.csv [--rounds 7] [--only embed,steps]     (with the [parity] extra)

FOLDER is a sentence-transformers folder (MiniLM say), PAIRS.csv rows of two sentences and a score without a header
(STS-B). Both sides run in this process on the same texts, one after the other in every round, float32. Embedding:
`jaxft.embed` beside `SentenceTransformer.encode`, tokenisation included, at a batch of 32. A step: forward, backward,
AdamW; the tokens are made before; dropout as the model's config says, on both sides; the rows of a batch are
of like length, as `TrainBatches` deals them; the peer pads to the longest, jaxft to a width of its ladder.
Printed: medians of wall and CPU time, and the ratio of sentences/s (jaxft over the peer, above 1: jaxft is faster) with
its range over the rounds. On a machine that others use, the CPU time is what can be compared.
"""

import argparse
import csv
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss

import jaxft
from jaxft.data.columns import pad

RATE, TEMPERATURE = 2e-5, 0.05
LORA = {"r": 8, "alpha": 16, "target_modules": ["query", "value"]}


def columns(model, batch, names, key):
    """Return the vectors of each column of a batch, the rows of all of them in one pass."""
    found = []
    for i, name in enumerate(names):
        part = {x: batch[f"{name}_{x}"] for x in ("input_ids", "attention_mask")}
        found.append(model.pooled(**part, key=None if key is None else jax.random.fold_in(key, i)))
    return found


def pairs_loss(model, batch, *, key):
    queries, documents = columns(model, batch, ("anchor", "positive"), key)
    rows = queries.shape[0]
    return rows * jaxft.losses.info_nce(queries, documents, temperature=TEMPERATURE), jnp.float32(rows), {}


def scored_loss(model, batch, *, key):
    first, second = columns(model, batch, ("sentence1", "sentence2"), key)
    rows = first.shape[0]
    return rows * jaxft.losses.cosent(first, second, batch["score"]), jnp.float32(rows), {}


LOSSES = {
    "info_nce": (pairs_loss, ("anchor", "positive"), MultipleNegativesRankingLoss),
    "cosent": (scored_loss, ("sentence1", "sentence2"), CoSENTLoss),
}


class Ours:
    """A step of jaxft on batches that are made."""

    def __init__(self, folder, loss, lora, batches):
        model, tokenizer = jaxft.load(folder)
        fn, names, _ = LOSSES[loss]
        method = jaxft.LoRA(**{**LORA, "target_modules": tuple(LORA["target_modules"])}) if lora else jaxft.Full()
        self.state = jaxft.TrainState.create(model, method, optax.adamw(RATE, weight_decay=0.0))
        self.step = jaxft.make_train_step(fn)
        self.batches = []
        for rows in batches:
            batch = {"score": np.array([row[2] for row in rows], np.float32) / 5} if loss == "cosent" else {}
            for i, name in enumerate(names):
                ids = tokenizer([row[i] for row in rows])["input_ids"]
                made = pad([{"input_ids": x} for x in ids], len(rows))
                batch |= {f"{name}_{key}": x for key, x in made.items()}
            self.batches.append(batch)

    def round(self):
        for batch in self.batches:
            self.state, metrics = self.step(self.state, batch)
        return float(metrics["loss"])


class Theirs:
    """A step of sentence-transformers on the same batches."""

    def __init__(self, folder, loss, lora, batches):
        self.model = SentenceTransformer(folder, device="cpu")
        if lora:
            import peft

            config = peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=LORA["target_modules"])
            self.model[0].model = peft.inject_adapter_in_model(config, self.model[0].model)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        self.model.train()
        self.loss = LOSSES[loss][2](self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        self.batches = [
            (
                [self.model.preprocess([row[i] for row in rows]) for i in range(2)],
                torch.tensor([row[2] / 5 for row in rows]),
            )
            for rows in batches
        ]

    def round(self):
        for features, scores in self.batches:
            self.optimizer.zero_grad()
            loss = self.loss([dict(f) for f in features], scores)
            loss.backward()
            self.optimizer.step()
        return float(loss)


class OurVectors:
    def __init__(self, folder, texts):
        self.model, self.tokenizer = jaxft.load(folder)
        self.texts = texts

    def round(self):
        self.made = jaxft.embed(self.model, self.tokenizer, self.texts, normalize=True)


class TheirVectors:
    def __init__(self, folder, texts):
        self.model, self.texts = SentenceTransformer(folder, device="cpu"), texts

    def round(self):
        self.made = self.model.encode(self.texts, normalize_embeddings=True, batch_size=32)


def alternate(ours, theirs, sentences, rounds, label):
    """Measure both in turn and print a line of a table."""
    for side in (ours, theirs):
        side.round()  # compiles; warms
    walls, cpus = {ours: [], theirs: []}, {ours: [], theirs: []}
    for n in range(rounds):
        for side in (ours, theirs) if n % 2 else (theirs, ours):
            wall, cpu = time.perf_counter(), time.process_time()
            side.round()
            walls[side].append(time.perf_counter() - wall)
            cpus[side].append(time.process_time() - cpu)
    cells = [label]
    for times in (walls, cpus):
        ratios = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
        rates = [sentences / statistics.median(times[side]) for side in (theirs, ours)]
        cells += [f"{rates[0]:.0f}", f"{rates[1]:.0f}"]
        cells += [f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("pairs")
    parser.add_argument("--threads", type=int, default=2, help="of torch; jax has as many as there are cores")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="pairs of a batch")
    parser.add_argument("--only", default="embed,steps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open(options.pairs, encoding="utf-8") as file:
        rows = [(first, second, float(score)) for first, second, score in csv.reader(file)]
    texts = sorted({text for row in rows for text in row[:2]})
    shuffle = np.random.default_rng(0)
    print(f"{len(texts)} texts, load {os.getloadavg()[0]:.1f}")
    print(
        "| | peer sentences/s | jaxft | ratio | peer sentences per CPU s | jaxft | ratio of CPU |\n"
        "|---|---|---|---|---|---|---|"
    )
    if "embed" in options.only:
        some = [texts[i] for i in shuffle.permutation(len(texts))[:1000]]
        sides = OurVectors(options.folder, some), TheirVectors(options.folder, some)
        alternate(*sides, len(some), options.rounds, "embed, 1,000 texts")
        assert np.abs(sides[0].made - sides[1].made).max() < 1e-5
        long = [" ".join(some[i : i + 12]) for i in range(0, 240, 2)]
        sides = OurVectors(options.folder, long), TheirVectors(options.folder, long)
        alternate(*sides, len(long), options.rounds, "embed, 120 texts of 100 to 256 tokens")
        assert np.abs(sides[0].made - sides[1].made).max() < 1e-5
    if "steps" in options.only:
        for loss in LOSSES:
            for lora in (True, False):
                for size in options.sizes:
                    window = [rows[i] for i in shuffle.permutation(len(rows))[: 16 * size]]
                    window.sort(key=lambda row: max(len(row[0]), len(row[1])))
                    starts = shuffle.permutation(len(window) // size)[: options.steps] * size
                    batches = [window[start : start + size] for start in starts]
                    sides = [side(options.folder, loss, lora, batches) for side in (Ours, Theirs)]
                    label = f"step, {loss}, {'LoRA q, v' if lora else 'full'}, {size} pairs"
                    alternate(*sides, 2 * size * options.steps, options.rounds, label)


if __name__ == "__main__":
    main()
