"""Write the golden folders of sentence-transformers, and the vectors that it makes of a few texts.

.venv-parity/bin/python tests/parity/make_sentences.py
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import sentences

GOLDEN = Path(__file__).parent / "golden" / "sentences"
CASES = {
    "bert": {"kind": "bert"},
    "llama": {"kind": "llama", "mode": "lasttoken", "normalize": False, "length": 20},
    "bert-adapter": {"kind": "bert", "mode": "weightedmean", "adapter": True},
    "llama-adapter": {"kind": "llama", "mode": "max", "normalize": False, "adapter": True},
}


def main():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, options in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            sentences.folder_of(root=root, **options)
            shutil.copytree(root / "folder", GOLDEN / name)
            np.save(GOLDEN / name / "expected.npy", sentences.vectors(root / "folder"))
            if options.get("adapter"):
                file = GOLDEN / name / "adapter_config.json"
                config = {**json.loads(file.read_text()), "base_model_name_or_path": f"../{options['kind']}"}
                file.write_text(json.dumps(config, indent=2) + "\n")
    (GOLDEN / "texts.json").write_text(json.dumps(sentences.TEXTS) + "\n")


if __name__ == "__main__":
    main()
