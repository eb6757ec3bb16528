"""Time of one LoRA step, jaxft beside peft: the same model, batch and machine, alternating, float32.

    python benchmarks/step_time.py [--threads 1]            (in an environment with the [parity] extra)

Each side is a process of its own, on as many cores as it has threads; a round asks one after the other for a few steps.
Printed: medians, and two ratios with their spread over the rounds: tokens/s of jaxft over peft's, which is the inverse
of wall time, and CPU time of peft over jaxft's. Above 1, jaxft is faster. On a machine that others use, read the CPU
time at one thread: of two, one waits for the other in a loop, and that counts as CPU time too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

LORA = {"r": 8, "alpha": 16}
LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
GPT2 = {"model_type": "gpt2", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SHAPES = {  # config, rows, tokens, steps a round
    "stories260k 16x224": (
        {**LLAMA, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 512}, 16, 224, 3),
    "stories260k 4x32": (
        {**LLAMA, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 512}, 4, 32, 30),
    "llama d256 L4 V8192 8x128": (
        {**LLAMA, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4, "vocab_size": 8192}, 8, 128, 5),
    "gpt2 d256 L4 V8192 8x128": (
        {**GPT2, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": 8192}, 8, 128, 5),
}  # fmt: skip


def tokens(shape):
    config, rows, length, _ = SHAPES[shape]
    return np.random.default_rng(0).integers(3, config["vocab_size"], (rows, length))


def torch_side(shape, folder):
    """Make the weights, and a step of peft on them."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**SHAPES[shape][0])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    options = peft.LoraConfig(
        task_type="CAUSAL_LM", r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear",
        fan_in_fan_out=config.model_type == "gpt2",
    )  # fmt: skip
    model = peft.get_peft_model(model, options).train()
    tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    ids = torch.tensor(tokens(shape))

    def step():
        tx.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        tx.step()
        return float(loss.detach())

    return step


def jax_side(shape, folder):
    import jax
    import optax

    import jaxft

    model, _ = jaxft.load(folder)
    method = jaxft.LoRA(**LORA, target_modules="all-linear")
    state = [jaxft.TrainState.create(model, method, optax.adamw(2e-3, weight_decay=0.0))]
    run = jaxft.make_train_step(jaxft.losses.next_token_loss)
    ids = jax.numpy.asarray(tokens(shape), "int32")

    def step():
        state[0], metrics = run(state[0], {"input_ids": ids, "labels": ids})
        return float(metrics["loss"])

    return step


def serve(side, shape, folder, threads):
    """A child: a line with a number comes in, so many steps are taken, a line with times goes out."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])  # XLA has a thread for each core
    step = {"peft": torch_side, "jaxft": jax_side}[side](shape, folder)
    first = step()
    step()
    print(json.dumps({"loss": first}), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step()
        n = int(line)
        print(json.dumps([(time.perf_counter() - wall) / n, (time.process_time() - cpu) / n]), flush=True)


def compare(shape, rounds, threads):
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        sides = {}
        for side in ("peft", "jaxft"):  # the first makes the weights that the second loads
            command = [sys.executable, __file__, "--serve", side, "--shape", shape, "--folder", folder]
            command += ["--threads", str(threads)]
            sides[side] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
            )
            sides[side].first = json.loads(sides[side].stdout.readline())["loss"]
        times = {side: [] for side in sides}
        for _ in range(rounds):
            for side, child in sides.items():
                child.stdin.write(f"{SHAPES[shape][3]}\n")
                child.stdin.flush()
                times[side].append(json.loads(child.stdout.readline()))
        for child in sides.values():
            child.stdin.close()
            child.wait()
    losses = [child.first for child in sides.values()]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], f"not the same model: first losses {losses}"
    wall, cpu = ([[t[which] for t in times[side]] for side in ("peft", "jaxft")] for which in (0, 1))
    rates = [SHAPES[shape][1] * SHAPES[shape][2] / statistics.median(t) for t in wall]
    row = [shape, *(f"{1e3 * statistics.median(t):.1f}" for t in wall), *(f"{rate:.0f}" for rate in rates)]
    row += [spread(*wall), *(f"{1e3 * statistics.median(t):.1f}" for t in cpu), spread(*cpu)]
    print("| " + " | ".join(row) + " |", flush=True)


def spread(a, b):
    """Median and range of a / b over the rounds."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="and cores, of each side")
    parser.add_argument("--shape", help="one of: " + "; ".join(SHAPES))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.shape, options.folder, options.threads)
        return
    heads = ["shape", "peft wall ms", "jaxft wall ms", "peft tokens/s", "jaxft tokens/s", "ratio of tokens/s"]
    heads += ["peft CPU ms", "jaxft CPU ms", "ratio of CPU"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for shape in [options.shape] if options.shape else SHAPES:
        compare(shape, options.rounds, options.threads)


if __name__ == "__main__":
    main()
