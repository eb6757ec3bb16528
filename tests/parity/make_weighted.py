"""Write the golden files of weighted combinations: two adapters as peft saves them, and what peft makes of them.

.venv-parity/bin/python tests/parity/make_weighted.py
"""

import shutil
from pathlib import Path

import numpy as np
import peers
from make_golden import keep_only
from safetensors.numpy import save_file
from weighted_cases import CASES, WEIGHTS

FOLDER = Path(__file__).parent / "golden" / "weighted"
ADAPTERS = {
    "a": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "bb": {"r": 3, "lora_alpha": 12, "target_modules": ["v_proj", "up_proj"]},
}


def both(base="llama"):
    model = peers.adapted(base, ADAPTERS["a"], "a")
    return peers.adapted(base, ADAPTERS["bb"], "bb", model)


def delta(model, name):
    """{module: what the adapter adds to the weight, as (in, out)}, of one adapter."""
    prefix = "base_model.model."
    found = {
        n.removeprefix(prefix): (m.get_delta_weight(name), getattr(m, "fan_in_fan_out", False))
        for n, m in model.named_modules()
        if hasattr(m, "lora_A") and name in m.lora_A
    }
    return {n: (d if turned else d.T).detach().numpy() for n, (d, turned) in found.items()}


def made(model):
    """What peft makes in each case."""
    out = {}
    for case, options in CASES.items():
        theirs = {"combination_type" if k == "combination" else k: v for k, v in options.items()}
        name = case.replace("-", "_")
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), name, **theirs)
        out[case] = delta(model, name)
        model.delete_adapter(name)
    return out


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    model = both()
    model.save_pretrained(FOLDER)
    for name in ADAPTERS:
        keep_only(FOLDER / name, "adapter_config.json", "adapter_model.safetensors")
    (FOLDER / "README.md").unlink(missing_ok=True)
    found = {f"{case} {n}": np.ascontiguousarray(d) for case, each in made(model).items() for n, d in each.items()}
    layer = {key: d for key, d in found.items() if ".1." in key}  # one of the two layers: a small file
    save_file(layer, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
