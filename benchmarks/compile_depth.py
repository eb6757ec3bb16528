"""Time to trace and compile the step at 4 and 32 layers of one width: the layers are scanned, so it should not grow.

python benchmarks/compile_depth.py
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax

import jaxft

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}
ROUNDS = 3


def measure(layers):
    """CPU seconds to trace and to compile a LoRA step, and the bytes of its temporaries."""
    model = jaxft.testing.tiny_llama(**SHAPE, num_hidden_layers=layers, remat="full")
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=8, target_modules="all-linear"), optax.adamw(1e-3))
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    ids = jnp.ones((4, 128), jnp.int32)
    start = time.process_time()
    lowered = step.trace(state, {"input_ids": ids, "labels": ids}).lower()
    traced = time.process_time()
    compiled = lowered.compile()
    return traced - start, time.process_time() - traced, compiled.memory_analysis().temp_size_in_bytes / 2**20


def main():
    rows = {4: [], 32: []}
    measure(2)  # what is only paid once
    for _ in range(ROUNDS):
        for layers, found in rows.items():
            jax.clear_caches()
            found.append(measure(layers))
    print("| layers | trace s (CPU) | compile s (CPU) | temporaries MiB |")
    print("|---|---|---|---|")
    for layers, found in rows.items():
        print(
            f"| {layers} | "
            + " | ".join(f"{statistics.median(column):.2f}" for column in zip(*found, strict=True))
            + " |"
        )
    ratios = [(b[0] + b[1]) / (a[0] + a[1]) for a, b in zip(rows[4], rows[32], strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"\nratio 32 / 4 layers, trace and compile: {spread}")


if __name__ == "__main__":
    main()
