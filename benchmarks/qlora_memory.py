"""Memory of a LoRA step over bfloat16, int8 and NF4 kernels, compiled ahead of time for one TPU chip; no weights.

    python benchmarks/qlora_memory.py [--shape 1b] [--kinds none nf4 int8] [--length 512] [--topology v5e:1x1]

Llama-shaped, one row a step, LoRA of rank 8 on every linear layer, AdamW, `remat="full"`.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax

import jaxft
from jaxft.models.hub import abstract_model
from jaxft.models.llama import LlamaConfig
from jaxft.parallel.rules import rows_sharding
from jaxft.parallel.topology import topology_devices

MIB = 2**20
LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES = {
    "1b": {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}


def compiled(model, length):
    """The step's memory analysis, and the seconds that compiling it took."""
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=8, target_modules="all-linear"), optax.adamw(1e-4))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=rows_sharding(model.config.mesh))
    began = time.perf_counter()
    step = jaxft.make_train_step(jaxft.losses.next_token_loss).trace(state, {"input_ids": ids, "labels": ids})
    return step.lower().compile().memory_analysis(), time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--kinds", nargs="+", choices=("none", "nf4", "int8"), default=["none", "nf4", "int8"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--topology", default="v5e:1x1")
    args = parser.parse_args()
    mesh = jaxft.make_mesh(devices=topology_devices(args.topology))
    jax.config.update("jax_enable_compilation_cache", False)  # what is for devices that are not there is not read again
    raw = {**LLAMA, **SHAPES[args.shape]}
    plain = abstract_model(LlamaConfig.from_raw(raw, dtype=jnp.dtype("bfloat16"), remat="full", mesh=mesh))
    kernels = [v.get_value() for _, v in jaxft.quant.model.stacked_kernels(plain)]
    layer = sum(2 * k.size for k in kernels) // raw["num_hidden_layers"]
    print(f"{args.shape}, {args.length} tokens, {args.topology}; a layer's kernels in bfloat16: {layer / MIB:.0f} MiB")
    print("| kernels | bits each | MiB of them | MiB of arguments | MiB of temporaries | s to compile |\n|-|-|-|-|-|-|")
    for kind in args.kinds:
        model = plain if kind == "none" else jaxft.quant.quantize(plain, kind)
        report = jaxft.quant.bits_report(model)
        held = report.quantized_bytes or layer * raw["num_hidden_layers"]
        memory, seconds = compiled(model, args.length)
        sizes = [held, memory.argument_size_in_bytes, memory.temp_size_in_bytes]
        shown = " | ".join(f"{size / MIB:,.0f}" for size in sizes)
        print(f"| {kind} | {report.quantized_bits or 16:.3f} | {shown} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
