"""The losses of preferences and of GRPO beside trl's trainers."""

import preference_cases as cases
import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
pytest.importorskip("trl", reason="needs the [parity] extra")
make = pytest.importorskip("make_preference")


@pytest.mark.parametrize("case", cases.OURS)
def test_loss_and_gradients(case):
    cases.check(case, make.THEIRS[case]())


@pytest.mark.parametrize("scale", cases.ADVANTAGES)
def test_advantages(scale):
    cases.check_advantages(scale, make.advantages(scale))


@pytest.mark.parametrize("part", cases.OF_MODELS)
def test_of_models(part):
    cases.OF_MODELS[part](make.OF_MODELS[part]())


def test_these_are_all():
    assert cases.OURS.keys() == make.THEIRS.keys()
    assert cases.OF_MODELS.keys() == make.OF_MODELS.keys()
