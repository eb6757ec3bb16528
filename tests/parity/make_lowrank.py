"""Write the golden files of IA3, DoRA, PiSSA, embeddings and token rows: adapters as peft saves them, what it computes.

.venv-parity/bin/python tests/parity/make_lowrank.py
"""

import shutil
from pathlib import Path

import numpy as np
import peers
import variants
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden" / "lowrank"


def main():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for base, name in variants.KEPT:
        folder = GOLDEN / base / name
        variants.adapted(base, name).save_pretrained(folder)
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                file.unlink()
        before = {k: v.numpy() for k, v in peers.base_model(base).state_dict().items()}
        found = {
            key: value
            for key, value in variants.everything(base, name).items()
            if not (key.startswith("merged ") and np.array_equal(value, before[key.removeprefix("merged ")]))
        }
        save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
