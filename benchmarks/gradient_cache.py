"""Memory of a contrastive step with 4,096 in-batch negatives, by chunk, and what computing the chunks twice costs.

python benchmarks/gradient_cache.py [--rows 4096] [--tokens 64] [--timed 256]

An encoder of MiniLM's shape (6 layers, width 384), LoRA on every linear layer, InfoNCE in both directions. Memory is
the compiler's figure for what a step holds beside its arguments; nothing of that size is run. Seconds and gradients are
of steps with fewer rows, the two ways taking turns; --timed 0 leaves them out.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxft
from jaxft.losses import make_contrastive_loss
from jaxft.models.bert import BertConfig
from jaxft.models.hub import fresh_model
from jaxft.testing.laws import gradients

SHAPE = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}


def batch(rows, tokens):
    rng = np.random.default_rng(0)
    made = {}
    for column in ("anchor", "positive"):
        made[f"{column}_input_ids"] = rng.integers(5, 30000, (rows, tokens)).astype(np.int32)
        made[f"{column}_attention_mask"] = (np.arange(tokens) < rng.integers(4, tokens, (rows, 1))).astype(np.int32)
    return made


def step_of(chunk):
    return jaxft.make_train_step(make_contrastive_loss("info_nce", symmetric=True, chunk=chunk))


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("rows", 4096), ("tokens", 64), ("timed", 256), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    method = jaxft.LoRA(r=8, target_modules="all-linear")
    make = lambda remat="none": fresh_model(BertConfig.from_raw(SHAPE, remat=remat, dtype=jnp.dtype("float32")), 0)
    fresh = lambda model: jaxft.TrainState.create(model, method, optax.adamw(1e-4))

    print(f"{args.rows} pairs of {args.tokens} tokens: GiB beside the arguments")
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch(args.rows, args.tokens).items()}
    ways = [("whole", "none", None), ("whole, remat", "full", None)]
    ways += [(f"chunk {n}", "none", n) for n in (512, 128, 32)]
    for name, remat, chunk in ways:
        compiled = step_of(chunk).trace(fresh(make(remat)), shapes).lower().compile()
        print(f"{name:14} {compiled.memory_analysis().temp_size_in_bytes / 2**30:8.2f}", flush=True)

    if not args.timed:
        return
    rows = {k: jnp.asarray(v) for k, v in batch(args.timed, args.tokens).items()}
    states, seconds, chunk = {}, {}, max(1, args.timed // 8)
    for name, size in (("whole", None), ("chunks", chunk)):
        step = step_of(size)
        states[name] = (step, step(fresh(make()), rows)[0])
    for _ in range(args.repeat):
        for name, (step, state) in states.items():
            start = time.perf_counter()
            state, metrics = step(state, rows)
            jax.block_until_ready(metrics)
            states[name] = (step, state)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    each = {name: statistics.median(s) for name, s in seconds.items()}
    print(f"{args.timed} pairs: whole {each['whole']:.2f} s a step, in chunks of {chunk} {each['chunks']:.2f} s, ratio "
          f"{each['chunks'] / each['whole']:.2f}")  # fmt: skip

    state = states["whole"][1]
    whole, parts = (gradients(state, rows, make_contrastive_loss("info_nce", symmetric=True, chunk=c))
                    for c in (None, chunk))  # fmt: skip
    worst = max(float(jnp.abs(parts[k] - g).max() / jnp.maximum(jnp.abs(g).max(), 1e-12)) for k, g in whole.items())
    print(f"gradients: the largest difference is {worst:.1e} of its leaf's largest number")


if __name__ == "__main__":
    main()
