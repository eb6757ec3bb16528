"""Losses over embeddings beside sentence-transformers and transformers' CLIP."""

import pytest
from contrastive_cases import OURS, check

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
pytest.importorskip("sentence_transformers", reason="needs the [parity] extra")
make = pytest.importorskip("make_contrastive")


@pytest.mark.parametrize("case", OURS)
def test_loss_and_gradients(case):
    check(case, make.theirs(case))


def test_these_are_all():
    assert OURS.keys() == make.THEIRS.keys()
