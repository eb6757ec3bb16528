"""NF4 beside bitsandbytes, on the kernels of the golden file and on one of half a million weights."""

import numpy as np
import pytest
import quant_cases as cases

from jaxft.quant.tables import dynamic_map

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
pytest.importorskip("bitsandbytes", reason="needs the [parity] extra")
make = pytest.importorskip("make_quant")


@pytest.mark.parametrize("case", cases.CASES)
def test_bytes(case):
    cases.check(case, make.theirs(case))


def test_many_weights(monkeypatch):
    monkeypatch.setitem(cases.CASES, "many", ((768, 704), 0.05, "bfloat16", 64, True))
    cases.check("many", make.theirs("many"))


def test_the_code_of_the_scales():
    np.testing.assert_array_equal(dynamic_map(), make.map_of_scales())
