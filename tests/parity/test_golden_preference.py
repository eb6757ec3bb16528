"""The losses of preferences and of GRPO against what trl made of the same arrays and models; without torch."""

import preference_cases as cases
import pytest
from safetensors.numpy import load_file

GOLDEN = load_file(cases.GOLDEN / "preference.safetensors")


def of(case):
    return {key.split(" ", 1)[1]: value for key, value in GOLDEN.items() if key.split(" ")[0] == case}


@pytest.mark.parametrize("case", cases.OURS)
def test_loss_and_gradients(case):
    cases.check(case, of(case))


@pytest.mark.parametrize("scale", cases.ADVANTAGES)
def test_advantages(scale):
    cases.check_advantages(scale, of(f"advantages-{scale}")[scale])


@pytest.mark.parametrize("part", cases.OF_MODELS)
def test_of_models(part):
    cases.OF_MODELS[part](of(f"models-{part}"))


def test_the_golden_file_has_every_case():
    more = {f"advantages-{scale}" for scale in cases.ADVANTAGES} | {f"models-{part}" for part in cases.OF_MODELS}
    assert {key.split(" ")[0] for key in GOLDEN} == cases.OURS.keys() | more
    assert len(cases.OURS) == 10 + 24
