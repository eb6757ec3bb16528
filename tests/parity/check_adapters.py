"""The other direction of test_golden_adapters.py: folders that jaxft writes, loaded by the adapters library.

The library (1.3.0, with transformers 4.57) cannot stand beside transformers 5, so this takes two environments and is
no test of the suite. From the root of the repository:

    JAX_PLATFORMS=cpu PYTHONPATH=. .venv-parity/bin/python tests/parity/check_adapters.py make FOLDER
    PYTHON_WITH_ADAPTERS tests/parity/check_adapters.py check FOLDER

The second prints, for each folder, the largest difference of the logits at real tokens, and fails above 1e-5, or where
a tensor was missing or left over.
"""

import sys
from pathlib import Path

import numpy as np

FAMILIES = ("llama", "gpt2", "bert", "roberta")
CLASSES = ("bad", "so so", "good")  # of the encoders, whose new head is trained and goes into the folder
CASES = {
    "pfeiffer": {},
    "pfeiffer-learned": {"scale": "learned", "size": 5, "non_linearity": "gelu"},
    "houlsby": {"kind": "houlsby", "size": 4},
    "houlsby-layer": {"kind": "houlsby", "layers": (1,), "reduction_factor": 4.5, "init": "bert"},
    "parallel": {"kind": "parallel"},
    "parallel-learned": {"kind": "parallel", "scale": "learned", "size": 9, "layers": (0,), "dropout": 0.1},
}


def batch():
    """Whole, padded right, padded left."""
    ids = np.random.default_rng(0).integers(3, 64, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:], mask[2, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def rows(pad):
    """For encoders whole and padded right, with the id that RoBERTa counts no position for."""
    found = {k: v[:2] for k, v in batch().items() if k != "position_ids"}
    return {**found, "input_ids": np.where(found["attention_mask"], found["input_ids"], pad)}


def squared(model, batch, *, key):
    """A model loss: rows are to give one-hot logits."""
    import jax.numpy as jnp

    logits = model(batch["input_ids"], batch["attention_mask"], key=key)
    return jnp.square(logits - jnp.eye(2, 3)).sum(), 2, {}


def make_encoders(root):
    import optax

    import jaxft
    from jaxft.models.hub import fresh_model
    from jaxft.models.roberta import RobertaConfig
    from jaxft.testing.tiny import BERT

    roberta = RobertaConfig.from_raw({**BERT, "model_type": "roberta", "pad_token_id": 1})
    for family, plain in (("bert", jaxft.testing.tiny_bert()), ("roberta", fresh_model(roberta))):
        base, _ = jaxft.load(jaxft.save_model(plain, root / f"plain-{family}"), labels=CLASSES)
        jaxft.save_model(base, root / family)
        inputs = rows(1)
        for case, options in CASES.items():
            state = jaxft.TrainState.create(base, jaxft.Adapter(**options), optax.adam(0.1))
            step = jaxft.make_train_step(squared)
            for _ in range(3):
                state, _ = step(state, inputs)
            folder = jaxft.save_adapter(state, root / f"{family}-{case}")
            np.savez(folder / "logits.npz", adapted=state.model(**inputs), base=base(**inputs))


def make(root):
    import optax

    import jaxft

    make_encoders(root)
    for family in FAMILIES[:2]:
        base = jaxft.testing.tiny_llama() if family == "llama" else jaxft.testing.tiny_gpt2()
        jaxft.save_model(base, root / family)
        inputs = {k: v for k, v in batch().items() if k != "position_ids"}
        for case, options in CASES.items():
            state = jaxft.TrainState.create(base, jaxft.Adapter(**options), optax.adam(0.1))
            step = jaxft.make_train_step(jaxft.losses.next_token_loss)
            for _ in range(3):
                state, _ = step(
                    state, {**inputs, "labels": np.where(inputs["attention_mask"], inputs["input_ids"], -100)}
                )
            folder = jaxft.save_adapter(state, root / f"{family}-{case}")
            np.savez(folder / "logits.npz", adapted=state.model(**inputs), base=base(**inputs))


def check(root):
    import adapters
    import torch
    import transformers

    print("adapters", adapters.__version__, "transformers", transformers.__version__)
    inputs, real, seen, worst = batch(), batch()["attention_mask"][..., None], 0, 0.0
    for family in FAMILIES:
        auto = transformers.AutoModelForCausalLM
        if family in FAMILIES[2:]:
            auto, inputs, real = transformers.AutoModelForSequenceClassification, rows(1), 1
        for case in CASES:
            folder, found = root / f"{family}-{case}", {}
            model = auto.from_pretrained(root / family).float()
            adapters.init(model)
            name = model.load_adapter(str(folder), use_safetensors=True, loading_info=found, set_active=True)
            assert not found["missing_keys"] and not found["unexpected_keys"], found
            model.eval()  # what was loaded begins with its dropout on
            with torch.no_grad():
                logits = model(**{k: torch.tensor(v) for k, v in inputs.items()}).logits.numpy()
            want = np.load(folder / "logits.npz")
            apart, effect = (np.abs((logits - want[key]) * real).max() for key in ("adapted", "base"))
            print(f"{family:6} {case:17} adapter {name!r}: {apart:.1e} from jaxft, {effect:.2f} from the base")
            assert apart < 1e-5 and effect > 0.1
            seen, worst = seen + 1, max(worst, apart)
    assert seen == len(FAMILIES) * len(CASES)
    print(f"{seen} folders, at most {worst:.1e} apart")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
