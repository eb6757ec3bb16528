"""Write the golden files of the encoders: tiny BERT and RoBERTa classifiers, peft's adapters, and what they compute.

.venv-parity/bin/python tests/parity/make_encoders.py

make_adapters.py then adds the bottlenecks of the adapters library.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import peers_encoders
import torch
from safetensors.numpy import save_file

OUT = Path(__file__).parent / "golden/encoders"


def save_adapter(model, folder):
    """peft's folder without its README, and without the place where the base lay here."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def backbone(classifier):
    """The plain model in a classifier, in evaluation."""
    return getattr(classifier, classifier.base_model_prefix).eval()


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for kind in peers_encoders.KINDS:
        base = peers_encoders.model(kind)
        base.save_pretrained(OUT / kind / "base")
        with torch.no_grad():
            hidden = backbone(base)(**peers_encoders.inputs(kind)).last_hidden_state.numpy()
        found = {"hidden": hidden, "logits": peers_encoders.computed(base, kind)}
        save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, OUT / kind / "expected.safetensors")
        for cases, head in ((peers_encoders.CLASSIFIED, True), (peers_encoders.PLAIN, False)):
            for case, make in cases.items() if kind == "bert" or head else ():
                fresh = peers_encoders.model(kind)
                model = peers_encoders.adapted(fresh if head else backbone(fresh), make)
                save_adapter(model, OUT / f"{kind}-{case}")
                expected = {"out": np.ascontiguousarray(peers_encoders.computed(model, kind))}
                save_file(expected, OUT / f"{kind}-{case}" / "expected.safetensors")


if __name__ == "__main__":
    main()
