"""Write the golden files of NF4: tiny checkpoints as bitsandbytes and transformers save them, and what they compute.

.venv-parity/bin/python tests/parity/make_quantized.py
"""

import shutil
import tempfile

import quantized_cases
from make_golden import GOLDEN, keep_only
from safetensors.numpy import save_file


def main():
    folder = GOLDEN / "quantized"
    shutil.rmtree(folder, ignore_errors=True)
    for name in quantized_cases.CASES:
        with tempfile.TemporaryDirectory() as plain:
            made = quantized_cases.quantized(name, plain)
            made.save_pretrained(folder / name)
        keep_only(folder / name, "config.json", "model.safetensors")
        save_file(quantized_cases.expected(made), folder / name / "expected.safetensors")


if __name__ == "__main__":
    main()
