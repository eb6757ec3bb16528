"""Tokens per second of the pipeline beside the step's need, of a config: data_pipeline.py CONFIG [key=value ...]"""

import sys
import time
from collections import Counter

import jax
import numpy as np

from jaxft import make_train_step
from jaxft.config import load_config
from jaxft.losses import next_token_loss
from jaxft.tasks.sft import SupervisedTuning
from jaxft.tasks.start import load_state

config = load_config(sys.argv[1], ["train.epochs=null", "train.steps=1000", *sys.argv[2:]])

began = time.perf_counter()
task = SupervisedTuning(config)
data = task.load_data()
rows = sum(map(len, data.train))
print("\n".join(data.notes()))
print(f"read and tokenise {rows / (time.perf_counter() - began):,.0f} rows/s")

began = time.perf_counter()
batches = task.make_batches(data)
if config.data.packing:
    print(f"{batches}; counted in {time.perf_counter() - began:.2f} s")
picked = Counter(batches.order[i][0] if len(data.train) > 1 else 0 for i in range(1000))
print("of the first 1,000 rows:", {data.train[i].name: n for i, n in sorted(picked.items())})
pipeline, began, tokens, room = batches.iterate(), time.perf_counter(), 0, 0
for _ in range(200):
    batch = next(pipeline)
    tokens, room = tokens + int(batch["attention_mask"].sum()), room + batch["input_ids"].size
rate = tokens / (time.perf_counter() - began)
print(f"pipeline {rate:,.0f} tokens/s, {tokens / room:.4f} of the batches filled")

state, step = load_state(config, 100, None), make_train_step(next_token_loss)
times, tokens, seen = [], [], set()
for n in range(60):
    batch = batches[n]
    began = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics["loss"])
    if batch["input_ids"].shape in seen:  # not the steps that compile
        times.append(time.perf_counter() - began)
        tokens.append(int(batch["attention_mask"].sum()))
    seen.add(batch["input_ids"].shape)
need = sum(tokens) / float(np.sum(times))
print(f"step {need:,.0f} tokens/s; the pipeline is {rate / need:,.0f} times as fast; {len(seen)} widths compiled")
