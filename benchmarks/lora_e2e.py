"""LoRA on E2E NLG: lora_e2e.py MODEL TRAIN.csv DEV.csv SEED OUTPUT; held-out loss before and after."""

import csv
import sys

import jax
import numpy as np
import optax

import jaxft

folder, train_file, held_out_file, seed, output = sys.argv[1:]
model, tokenizer = jaxft.load(folder)


def examples(file, limit=256):
    for row in csv.DictReader(open(file, encoding="utf-8")):
        prompt = tokenizer(row["mr"] + "\n")["input_ids"]  # apart: tokenised jointly, the border would move
        answer = tokenizer(row["ref"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        yield (prompt + answer)[:limit], ([-100] * len(prompt) + answer)[:limit]


def batch(rows, multiple=64):
    width = -(-max(len(ids) for ids, _ in rows) // multiple) * multiple
    pad = lambda row, fill: np.array(row + [fill] * (width - len(row)), np.int32)
    arrays = [(pad(ids, 0), pad(labels, -100), pad([1] * len(ids), 0)) for ids, labels in rows]
    return dict(zip(("input_ids", "labels", "attention_mask"), map(np.stack, zip(*arrays, strict=True)), strict=True))


train, held_out = list(examples(train_file)), list(examples(held_out_file))[::18]
sums = jax.jit(lambda model, rows: jaxft.losses.next_token_loss(model, rows)[:2])
per_token = lambda model: np.divide(*sum(np.array(sums(model, batch([r], 256))) for r in held_out))
print(f"before {per_token(model):.3f}")
method = jaxft.LoRA(r=8, alpha=16, target_modules="all-linear")
state = jaxft.TrainState.create(model, method, optax.adamw(2e-3, weight_decay=0.0), seed=int(seed))
step = jaxft.make_train_step(jaxft.losses.next_token_loss)
for rows in np.random.default_rng(int(seed)).permutation(len(train))[: 300 * 16].reshape(300, 16):
    state, metrics = step(state, batch([train[i] for i in rows]))
print(f"after {per_token(state.model):.3f}")
jaxft.save_adapter(state, output)
