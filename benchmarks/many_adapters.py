"""What a batch of 8 rows over 8 LoRA adapters costs, beside the same batch over one: forward, float32.

    python benchmarks/many_adapters.py [--rounds 15]

Alternating in one process, each round a few passes of each; printed are medians, and the ratio of the two with its
range over the rounds. "one" is a model that carries a single adapter; "8, all on one" carries 8 and gives every row the
first, by weights [8, 8] too.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxft
from jaxft.testing import tiny_llama

SHAPES = {
    "d256 L4 V8192": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192},
    "d512 L4 V8192": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 8192},
}
TARGETS = {"q, v": ("q_proj", "v_proj"), "attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "all": "all-linear"}
N = 8


def models(shape, targets):
    """A base with 8 adapters that do something, and the same with the first alone."""
    base = tiny_llama(**SHAPES[shape], num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512)
    method = jaxft.LoRA(r=8, alpha=16, target_modules=targets)
    model = base
    for i in range(N):
        model = jaxft.attach(model, method, name=f"a{i}", seed=i)
    for i, (path, v) in enumerate(jaxft.models.names.variables(model).items()):
        if path.endswith(".b"):
            v.set_value(0.02 * jax.random.normal(jax.random.key(i), v.get_value().shape))
    one = model
    for i in range(1, N):
        one = jaxft.detach(one, f"a{i}")
    return {
        "one": one,
        "eight": jaxft.set_adapter(model, jnp.eye(N)),
        "8, all on one": jaxft.set_adapter(model, jnp.eye(N)[:1].repeat(N, 0)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--passes", type=int, default=3, help="in a round, of each")
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {N} rows x {options.tokens} tokens, r 8")
    print("| model | targets | one ms | eight ms | ratio | 8, all on one: ratio |\n|---|---|---|---|---|---|")
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 8192, (N, options.tokens)))
    for shape in SHAPES:
        for targets, names in TARGETS.items():
            sides = models(shape, names)
            times = {side: [] for side in sides}
            for _ in range(options.rounds + 1):
                for side, model in sides.items():
                    began = time.perf_counter()
                    for _ in range(options.passes):
                        model(ids).block_until_ready()
                    times[side].append(1e3 * (time.perf_counter() - began) / options.passes)
            times = {side: found[1:] for side, found in times.items()}  # the first compiles
            one, eight = (statistics.median(times[side]) for side in ("one", "eight"))
            ratios = [spread(times[side], times["one"]) for side in ("eight", "8, all on one")]
            print(f"| {shape} | {targets} | {one:.1f} | {eight:.1f} | {ratios[0]} | {ratios[1]} |", flush=True)


def spread(a, b):
    """Median and range of a / b over the rounds."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
