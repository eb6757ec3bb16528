"""What two habits of the model code bring on a CPU: causal attention in blocks, and kernels applied to flat rows.

    JAX_PLATFORMS=cpu python benchmarks/attention.py [--rounds 9]

Five passes forward and backward in one program, as five layers run; the two ways alternate. Printed: medians in ms, and
the ratio of times (the plain way over ours) with its range over the rounds. Above 1, ours is faster.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from jaxft.models.attention import attend, causal_mask
from jaxft.models.layers import dot

LINE = "|---|---|---|---|---|"
ATTENTION = {  # rows, query heads, key heads, tokens, width of a head
    "stories260k, PPO": (64, 8, 4, 72, 8),
    "stories260k, long rows": (16, 8, 4, 224, 8),
    "d256": (8, 8, 4, 128, 32),
    "GPT-2": (4, 12, 12, 256, 64),
    "GPT-2, long rows": (2, 12, 12, 512, 64),
    "d512, long rows": (1, 8, 8, 1024, 64),
}
KERNELS = {  # rows, tokens, in, out
    "stories260k, up": (64, 72, 64, 172),
    "stories260k, down": (64, 72, 172, 64),
    "MiniLM, query": (64, 24, 384, 384),
    "d256, up": (8, 128, 256, 688),
}


def five(f, *inputs):
    """Return the program that runs f and its gradient five times, each on what came of the one before."""

    def body(inputs, _):
        made, back = jax.vjp(f, *inputs)
        return tuple(x - 1e-3 * dx for x, dx in zip(inputs, back(made), strict=True)), None

    return jax.jit(lambda inputs: jax.lax.scan(body, inputs, None, length=5)[0]), inputs


def compare(name, shape, plain, ours, rounds):
    both = {"plain": plain, "ours": ours}
    took = {side: [] for side in both}
    for n in range(rounds + 1):
        for side, (program, inputs) in both.items():
            began = time.perf_counter()
            jax.block_until_ready(program(inputs))
            if n:  # the first compiles
                took[side].append(1e3 * (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(took["plain"], took["ours"], strict=True)]
    middle = {side: f"{statistics.median(times):.1f}" for side, times in took.items()}
    ratio = f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| {name} | {'x'.join(map(str, shape))} | {middle['plain']} | {middle['ours']} | {ratio} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape)
    print("| attention | rows x heads x key heads x tokens x width | whole, ms | blocks, ms | ratio |", LINE, sep="\n")
    for name, (b, h, k, t, e) in ATTENTION.items():
        inputs = draw(0, b, h, t, e), draw(1, b, k, t, e), draw(2, b, k, t, e)
        mask = causal_mask(t, jnp.ones((b, t)))
        sides = [
            five(lambda q, k, v, c=causal, m=mask: attend(q, k, v, m, causal=c, platform="cpu"), *inputs)
            for causal in (False, True)
        ]
        compare(name, (b, h, k, t, e), *sides, rounds)
    print("\n| kernel | rows x tokens x in x out | three axes, ms | flat, ms | ratio |", LINE, sep="\n")
    for name, (b, t, i, o) in KERNELS.items():
        inputs = draw(0, b, t, i), 0.05 * draw(1, i, o)
        compare(name, (b, t, i, o), *(five(f, *inputs) for f in (jnp.matmul, dot)), rounds)


if __name__ == "__main__":
    main()
