"""NF4 against the bytes that bitsandbytes made of the same kernels; without torch."""

import numpy as np
import pytest
import quant_cases as cases
from safetensors.numpy import load_file

from jaxft.quant.tables import dynamic_map

GOLDEN = load_file(cases.GOLDEN / "quant.safetensors")


@pytest.mark.parametrize("case", cases.CASES)
def test_bytes(case):
    cases.check(case, {key.split(" ")[1]: value for key, value in GOLDEN.items() if key.split(" ")[0] == case})


def test_the_code_of_the_scales():
    np.testing.assert_array_equal(dynamic_map(), GOLDEN["dynamic-map"])


def test_the_golden_file_has_every_case():
    assert {key.split(" ")[0] for key in GOLDEN} == {*cases.CASES, "dynamic-map"}
