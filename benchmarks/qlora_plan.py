"""Memory of a LoRA step over a bfloat16, an NF4 and an int8 base, compiled ahead of time for one TPU chip.

python benchmarks/qlora_plan.py [--topology v5e:1x1] [--tokens 2048] [--kinds none nf4 int8]

The shape is that of Llama 3.2 1B; no weights are needed, and no TPU (extra `[plan]`). A chip's arguments are what the
step is given, its temporaries what the program holds beside them at most.
"""

import argparse
import json
import tempfile
from pathlib import Path

SHAPE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
CONFIG = """task: sft
model: {{config: {folder}/config.json, dtype: bfloat16, quantize: {kind}}}
method: {{name: lora, r: 16, alpha: 32, target_modules: all-linear}}
data: {{train: nowhere.jsonl, format: text, max_length: {tokens}}}
train: {{steps: 10, batch_size: 1}}
output: nowhere
"""
MIB = 2**20


def kernels(model):
    """Bytes of the kernels of the layers: all together, and of one layer's values in bfloat16."""
    from jaxft.quant import is_quantized

    leaves = [x for path, x in jaxft.leaves(model).items() if path.endswith("_proj.kernel")]
    held = sum(x.nbytes if is_quantized(x) else 2 * x.size for x in leaves)
    return held, sum(2 * x.size for x in leaves) // SHAPE["num_hidden_layers"]


def main():
    from jaxft.config import load_config
    from jaxft.plan import abstract_state, make_plan

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", default=["none", "nf4", "int8"])
    options = parser.parse_args()
    print("| base | kernels MiB (of bfloat16) | arguments MiB | temporaries MiB | above bfloat16 MiB | total MiB | s |")
    print("|---|---|---|---|---|---|---|")
    first = None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPE))
        for kind in options.kinds:
            text = CONFIG.format(folder=folder, kind="null" if kind == "none" else kind, tokens=options.tokens)
            Path(folder, "c.yaml").write_text(text)
            config = load_config(Path(folder, "c.yaml"))
            held, layer = kernels(abstract_state(config, None, "tpu").model)
            plan = make_plan(config, options.topology)
            first = first or (held, plan.temporary_bytes)
            arguments = plan.parameters_bytes + plan.optimizer_bytes
            more = (plan.temporary_bytes - first[1]) / MIB
            print(
                f"| {'bfloat16' if kind == 'none' else kind} | {held / MIB:,.1f} ({held / first[0]:.4f}) | "
                f"{arguments / MIB:,.1f} | {plan.temporary_bytes / MIB:,.1f} | {more:+,.1f} | "
                f"{plan.total_bytes / MIB:,.1f} | {plan.compile_seconds:.0f} |",
                flush=True,
            )
    print(f"\n{plan.total_parameters:,} parameters; one layer's kernels in bfloat16 are {layer / MIB:,.1f} MiB")


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")
    import jaxft

    main()
