"""Losses over embeddings against what the peers made of the same ones: no torch is needed here."""

from pathlib import Path

import pytest
from contrastive_cases import OURS, check
from safetensors.numpy import load_file

GOLDEN = load_file(Path(__file__).parent / "golden" / "contrastive.safetensors")


@pytest.mark.parametrize("case", OURS)
def test_loss_and_gradients(case):
    check(case, {key.split(" ")[1]: value for key, value in GOLDEN.items() if key.split(" ")[0] == case})


def test_the_golden_file_has_every_case():
    assert {key.split(" ")[0] for key in GOLDEN} == set(OURS)
    assert len(OURS) == 13
