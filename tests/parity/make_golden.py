"""Write the golden files: tiny checkpoints and adapters as the peers save them, and what the peers compute.

.venv-parity/bin/python tests/parity/make_golden.py
"""

import json
import shutil
from pathlib import Path

import families
import numpy as np
import peers
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"


def keep_only(folder, *wanted):
    for file in folder.iterdir():
        if file.name not in wanted:
            file.unlink()


def save_adapter(model, folder):
    model.save_pretrained(folder)
    keep_only(folder, "adapter_config.json", "adapter_model.safetensors")


def several(folder):
    """Two adapters in one model: both at once, each alone, none, and a row each."""
    model = peers.adapted("llama", peers.ADAPTERS["llama"]["all"], "a")
    peers.adapted("llama", {"r": 2, "lora_alpha": 6, "target_modules": ["k_proj", "v_proj"]}, "bb", model)
    expected = {}
    for names in (["a"], ["bb"], ["a", "bb"]):
        model.base_model.set_adapter(names)
        expected["+".join(names)] = peers.logits(model)
    expected["rows"] = peers.logits(model, adapter_names=["bb", "__base__", "a"])
    model.save_pretrained(folder)
    for name in ("a", "bb"):
        keep_only(folder / name, "adapter_config.json", "adapter_model.safetensors")
    (folder / "README.md").unlink(missing_ok=True)
    save_file(expected, folder / "expected.safetensors")


def main():
    for name in (*peers.BASES, "several", "families"):  # what stands beside them has scripts of its own
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
    for base in peers.BASES:
        folder = GOLDEN / base
        model = peers.base_model(base)
        model.save_pretrained(folder / "base")
        keep_only(folder / "base", "config.json", "model.safetensors")
        expected, ranks = {"base": peers.logits(model)}, {}
        for name, options in peers.ADAPTERS[base].items():
            adapted = peers.adapted(base, options)
            save_adapter(adapted, folder / name)
            expected[name] = peers.logits(adapted)
            ranks[name] = peers.ranks_and_scales(adapted)
            if name == "all":
                merged = adapted.merge_and_unload()
                expected |= {
                    f"merged {n}": p.detach().numpy()
                    for n, p in merged.named_parameters()
                    if "layers.1" in n or "h.1." in n
                }
        if base == "gpt2":
            expected |= {f"bias step {n}": b for n, b in peers.bias_step(peers.base_model(base)).items()}
        save_file({k: np.ascontiguousarray(v) for k, v in expected.items()}, folder / "expected.safetensors")
        (folder / "ranks.json").write_text(peers.as_json(ranks) + "\n")
    several(GOLDEN / "several")
    for name in families.CASES:
        folder, model = GOLDEN / "families" / name, families.model(name)
        model.save_pretrained(folder)
        keep_only(folder, "config.json", "model.safetensors")
        save_file(families.expected(model), folder / "expected.safetensors")
    packs = {limit: {"lengths": n, "packs": peers.packs(n, limit)} for limit, n in peers.LENGTHS.items()}
    (GOLDEN / "packs.json").write_text(json.dumps(packs) + "\n")


if __name__ == "__main__":
    main()
