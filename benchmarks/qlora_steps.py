"""Time of a LoRA step over a base as it is, in int8 and in NF4: the same shape and batch, alternating in one process.

    JAX_PLATFORMS=cpu python benchmarks/qlora_steps.py [--rounds 9] [--dtype float32]

Printed: medians of wall and CPU time in ms, and ratios over the base as it is with their range over the rounds. Above
1, the quantised base is slower. On a machine that others use, read the CPU time.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import optax

import jaxft
from jaxft.testing import tiny_llama

SHAPES = {  # width, feed-forward, layers, heads, key heads, vocabulary; rows, tokens
    "stories260k": (64, 172, 5, 8, 4, 512, 16, 224),
    "d256 L4 V8192": (256, 688, 4, 8, 4, 8192, 8, 128),
    "d768 L4 V8192": (768, 2048, 4, 12, 12, 8192, 4, 128),
}
KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
STEPS = 3  # a round


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    print(
        "| shape | rows x tokens | base | wall, ms | CPU, ms | ratio of wall | ratio of CPU |",
        "|---" * 7 + "|",
        sep="\n",
    )
    for name, (*sizes, rows, tokens) in SHAPES.items():
        raw = {**dict(zip(KEYS, sizes, strict=True)), "max_position_embeddings": 256}
        base = tiny_llama(dtype=given.dtype, **raw)
        ids = np.random.default_rng(0).integers(1, raw["vocab_size"], (rows, tokens)).astype(np.int32)
        batch, step = {"input_ids": ids, "labels": ids}, jaxft.make_train_step(jaxft.losses.next_token_loss)
        models = {
            "as it is": base,
            "int8": jaxft.quant.quantize(base, "int8"),
            "nf4": jaxft.quant.quantize(base, "nf4"),
        }
        method = jaxft.LoRA(r=8, alpha=16, target_modules="all-linear")
        states = {kind: jaxft.TrainState.create(model, method, optax.adamw(1e-3)) for kind, model in models.items()}
        took = {kind: [] for kind in states}
        for n in range(given.rounds + 1):
            for kind in states:
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(STEPS):
                    states[kind], metrics = step(states[kind], batch)
                jax.block_until_ready((states[kind].trainable, metrics))
                if n:  # the first compiles
                    took[kind].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
        for kind, times in took.items():
            middle = [f"{statistics.median(t[i] for t in times) / STEPS:.0f}" for i in (0, 1)]
            ratios = [[a[i] / b[i] for a, b in zip(times, took["as it is"], strict=True)] for i in (0, 1)]
            said = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios]
            print("|", " | ".join([name, f"{rows} x {tokens}", kind, *middle, *said]), "|", flush=True)


if __name__ == "__main__":
    main()
