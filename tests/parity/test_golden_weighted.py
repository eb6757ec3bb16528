"""Weighted combinations against what peft made of the same two adapters: no torch is needed here."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from weighted_cases import CASES, WEIGHTS

import jaxft
from jaxft.models.names import named_modules
from jaxft.models.stack import spread

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model():
    base, _ = jaxft.load(GOLDEN / "llama" / "base")
    for name in WEIGHTS:
        base = jaxft.load_adapter(base, GOLDEN / "weighted" / name, name=name)
    return base


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "weighted" / "expected.safetensors")


def delta(model, name):
    """{module: what the adapter adds to the kernel}, by the names of a checkpoint."""
    return {
        module: np.asarray(change)
        for n in named_modules(model)
        if name in (getattr(n.module, "delta", None) or {})
        for module, change in zip(
            n.names, spread(n.module.delta[name], len(n.names)).kernel_change(n.module.kernel), strict=True
        )
    }


@pytest.mark.parametrize("case", CASES)
def test_combination(case, model, expected):
    got = delta(jaxft.add_weighted_adapter(model, WEIGHTS, name="c", **CASES[case]), "c")
    seen = 0
    for key, want in expected.items():
        which, _, module = key.partition(" ")
        if which == case:
            np.testing.assert_allclose(got[module], want, atol=1e-5, err_msg=key)
            seen += bool(np.abs(want).max() > 1e-2)
    assert seen == 3


def test_the_golden_files_are_these():
    config = json.loads((GOLDEN / "weighted" / "bb" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 12)
