"""Write the golden files of ViT: tiny checkpoints as transformers saves them, and what it computes.

.venv-parity/bin/python tests/parity/make_vit.py
"""

import shutil

import vit_cases
from make_golden import GOLDEN, keep_only
from safetensors.numpy import save_file


def main():
    folder = GOLDEN / "vit"
    shutil.rmtree(folder, ignore_errors=True)
    for name in vit_cases.CASES:
        made = vit_cases.model(name)
        made.save_pretrained(folder / name)
        keep_only(folder / name, "config.json", "model.safetensors")
        save_file(vit_cases.expected(made), folder / name / "expected.safetensors")
    processor, values = vit_cases.processed()
    processor.save_pretrained(folder / "processor")
    pictures = {f"picture{i}": picture for i, picture in enumerate(vit_cases.pictures())}
    save_file({"pixel_values": values, **pictures}, folder / "processor" / "expected.safetensors")


if __name__ == "__main__":
    main()
