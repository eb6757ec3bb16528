"""Write the golden files of prefixes and prompts; after make_golden.py, whose base models they stand on.

.venv-parity/bin/python tests/parity/make_virtual.py
"""

import shutil

import numpy as np
import peers
import peers_virtual
import virtual
from make_golden import GOLDEN, save_adapter
from safetensors.numpy import save_file


def main():
    for base in ("llama", "gpt2"):
        for case in virtual.CASES:
            folder = GOLDEN / "virtual" / f"{base}-{case}"
            shutil.rmtree(folder, ignore_errors=True)
            model, found = peers_virtual.computed(peers.base_model(base), case)
            save_adapter(model, folder)
            save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
