"""BERT and RoBERTa against what transformers, peft and the adapters library computed and saved; no torch is needed."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxft

GOLDEN = Path(__file__).parent / "golden/encoders"
CASES = sorted(f.parent.name for f in GOLDEN.glob("*-*/expected.safetensors"))
TOLERANCE = 1e-5
METHODS = {
    "lora": jaxft.LoRA,
    "dora": jaxft.LoRA,
    "ia3": jaxft.IA3,
    "prompt": jaxft.PromptTuning,
    "prefix": jaxft.PrefixTuning,
    "p_tuning": jaxft.PTuning,
}
KINDS = {"seq_bn": "pfeiffer", "double_seq_bn": "houlsby", "par_bn": "parallel"}


def batch(kind, pad=0):
    """The rows that the peers saw: whole, padded right, with token types where there are any."""
    ids = np.random.default_rng(0).integers(3, 40, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    types = np.zeros_like(ids)
    types[:, 6 if kind == "bert" else 12 :] = 1
    found = {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask, "token_type_ids": types}
    return {k: jnp.asarray(v) for k, v in found.items()}


def base(kind, plain=False):
    return jaxft.load(GOLDEN / kind / "base", labels=() if plain else None)[0]


def same(model, kind, want, types=True):
    inputs = batch(kind)
    if not types:
        del inputs["token_type_ids"]
    got = np.asarray(model(**inputs))
    real = np.ones((1, 1)) if got.ndim == 2 else np.asarray(inputs["attention_mask"])[..., None]
    return np.abs((got - want) * real).max()


def test_the_sweep_sees_every_case():
    peft = [f"{kind}-{m}" for kind in ("bert", "roberta") for m in METHODS if m != "prefix"]
    plain = ["bert-lora-plain", "bert-prefix-plain", "bert-prompt-plain"]
    assert sorted([*peft, *plain, *(f"{kind}-{k}" for kind in ("bert", "roberta") for k in KINDS)]) == CASES


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_base(kind):
    """Hidden states and logits; the pad id and its position count for nothing."""
    want, model, plain = load_file(GOLDEN / kind / "expected.safetensors"), base(kind), base(kind, plain=True)
    assert same(model, kind, want["logits"]) < TOLERANCE
    assert same(plain, kind, want["hidden"]) < TOLERANCE
    inputs = batch(kind)
    mask = inputs["attention_mask"][..., None]
    mean = (want["hidden"] * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(plain.pooled(**inputs), mean, atol=TOLERANCE)
    assert model.config.labels == ("bad", "so so", "good")
    assert jnp.array_equal(model(**batch(kind, pad=1)), model(**batch(kind, pad=7)))


@pytest.mark.parametrize("case", CASES)
def test_adapter(case, tmp_path):
    """A peer's folder loads, with the head in it, computes the same, and is written again to the bit."""
    kind, _, method = case.partition("-")
    plain, folder = method.endswith("-plain"), GOLDEN / case
    model, want = base(kind, plain), load_file(folder / "expected.safetensors")["out"]
    adapted = jaxft.load_adapter(model, folder)
    here = jaxft.adapters(adapted)["default"]
    if method in KINDS:
        assert here.kind == KINDS[method]
    else:
        assert type(here) is METHODS[method.removesuffix("-plain")] and not getattr(here, "modules_to_save", ())
    types = method not in ("prefix-plain", "prompt-plain")  # peft leaves them out beside virtual tokens, but of a head
    assert same(adapted, kind, want, types) < TOLERANCE
    assert same(model, kind, want, types) > 0.1
    again = jaxft.save_adapter(adapted, tmp_path)
    for file in folder.glob("*.safetensors"):
        if file.name != "expected.safetensors":
            theirs, ours = load_file(file), load_file(again / file.name)
            rename = lambda key: key.replace(f".adapters.my_{method}.", ".adapters.default.")
            assert {rename(k) for k in theirs} == ours.keys()
            assert all(np.array_equal(theirs[k], ours[rename(k)]) for k in theirs)
    was, config = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, again))
    assert set(config) <= set(was)
    assert (config.get("peft_type"), config.get("task_type")) == (was.get("peft_type"), was.get("task_type"))
    if not plain and method not in KINDS:
        assert list(dict.fromkeys(was["modules_to_save"])) == config["modules_to_save"] == ["classifier", "score"]
