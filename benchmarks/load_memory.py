"""Memory of loading a checkpoint, onto one device and onto a mesh of eight: what the process holds beside the files.

python benchmarks/load_memory.py [--gigabytes 1] [--quantize]

A checkpoint of random bfloat16 weights is made in a temporary folder; each way of loading is a process of its own. Of
the process the anonymous memory is read (RssAnon: arrays and buffers; pages of the mapped file are not in it). With
`--quantize` it is read as it is and as NF4 and int8; "again" is what `save_model` has written of the NF4 one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
LAYER = 4 * 1024**2 + 3 * 1024 * 4096


def make(folder, gigabytes):
    """Write a checkpoint of about so many bytes, tensor by tensor as transformers names them."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    layers = round((gigabytes * 1e9 / 2 - 2 * 32000 * 1024) / LAYER)
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    one = np.ones(1024, ml_dtypes.bfloat16)
    tensors = {"model.embed_tokens.weight": draw(32000, 1024), "lm_head.weight": draw(32000, 1024)}
    tensors["model.norm.weight"] = one
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors |= {f"{at}.self_attn.{n}_proj.weight": draw(1024, 1024) for n in "qkvo"}
        tensors |= {f"{at}.mlp.{n}_proj.weight": draw(4096, 1024) for n in ("gate", "up")}
        tensors[f"{at}.mlp.down_proj.weight"] = draw(1024, 4096)
        tensors |= {f"{at}.{n}_layernorm.weight": one for n in ("input", "post_attention")}
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))


def anonymous():
    """Bytes of the process's own memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def measure(folder, devices, quantize, save):
    """Load in this process; print the most memory held above the start, and the share of the fullest device."""
    import jax

    import jaxft

    mesh = jaxft.make_mesh(data=1, fsdp=devices) if devices > 1 else None
    jax.numpy.ones(8).block_until_ready()
    most, done, before = [0], threading.Event(), anonymous()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], anonymous() - before)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    model, _ = jaxft.load(folder, mesh=mesh, quantize=quantize)
    jax.block_until_ready(model)
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    held = {}
    for x in jax.tree.leaves(model):
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    total = sum(x.nbytes for x in jax.tree.leaves(model))
    print(json.dumps({"devices": devices, "model": total, "peak": most[0], "after": anonymous() - before,
                      "fullest": max(held.values()), "seconds": seconds}))  # fmt: skip
    if save:
        jaxft.save_model(model, save)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        measure(options.folder, options.devices, options.kind, options.save)
        return
    print("| kernels | devices | model GB | peak above the start GB | at the end GB | fullest device GB (share) | s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder, again = f"{place}/whole", f"{place}/again"
        Path(folder).mkdir()
        make(folder, options.gigabytes)
        ways = [("bfloat16", 1, folder, []), ("bfloat16", 8, folder, [])]
        if options.quantize:
            ways = [
                ways[0],
                ("int8", 1, folder, ["--kind", "int8"]),
                ("nf4", 1, folder, ["--kind", "nf4", "--save", again]),
                ("nf4", 8, folder, ["--kind", "nf4"]),
                ("nf4, again", 1, again, []),
            ]
        for name, devices, source, more in ways:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, __file__, "--folder", source, "--devices", str(devices), *more]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            m = json.loads(done.stdout.splitlines()[-1])
            gb = {key: m[key] / 1e9 for key in ("model", "peak", "after", "fullest")}
            share = f"{gb['fullest']:.3f} ({m['fullest'] / m['model']:.3f})"
            figures = f"{gb['model']:.3f} | {gb['peak']:.3f} | {gb['after']:.3f} | {share} | {m['seconds']:.1f}"
            print(f"| {name} | {devices} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
