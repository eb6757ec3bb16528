"""Kernels that both libraries quantise, and how their bytes are held against each other."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxft.quant import quantize_nf4

GOLDEN = Path(__file__).parent / "golden"
CASES = {  # shape, scale, dtype, block, double quantisation
    "whole-rows": ((96, 192), 0.03, "float32", 64, True),
    "whole-rows-single": ((96, 192), 0.03, "float32", 64, False),
    "bfloat16": ((32, 128), 1.0, "bfloat16", 64, True),
    "short-rows": ((96, 100), 0.3, "float32", 64, True),
    "odd-size": ((33, 51), 0.3, "float32", 64, False),
    "less-than-a-block": ((3, 5), 1.0, "float32", 64, True),
    "block-128": ((24, 256), 0.1, "float32", 128, True),
    "zeros": ((66, 97), 0.1, "float32", 64, True),  # whole blocks of them, and the last one too
    "zeros-single": ((66, 97), 0.1, "float32", 64, False),
}


def kernel(case):
    """A case's kernel, float32; of values that its dtype has."""
    shape, scale, dtype, _, _ = CASES[case]
    x = (np.random.default_rng(len(case)).standard_normal(shape) * scale).astype(np.float32)
    if case.startswith("zeros"):
        x.reshape(-1)[:128] = 0
        x.reshape(-1)[-90:] = 0
    return np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32))


def check(case, theirs):
    """Hold our leaf against what bitsandbytes made: codes byte for byte."""
    shape, _, dtype, block, double = CASES[case]
    x = jnp.asarray(kernel(case)).astype(dtype)
    flat = {k: np.asarray(v).reshape(-1) for k, v in theirs.items()}
    for leaf in (
        quantize_nf4(x, block=block, double=double),
        quantize_nf4(x.T, block=block, double=double, transposed=True),
    ):
        np.testing.assert_array_equal(np.asarray(leaf.codes).reshape(-1), flat["codes"])
        absmax = np.where(flat["absmax"] < 1e-37, 0, flat["absmax"])  # theirs of a last, short block of zeros is 1e-38
        np.testing.assert_array_equal(np.asarray(leaf.absmax).reshape(-1), absmax)
        if double:  # how torch adds up a mean depends on the processor: it is equal to one unit in the last place
            np.testing.assert_allclose(leaf.offset, flat["offset"][0], rtol=1.2e-7)
            np.testing.assert_allclose(np.asarray(leaf.nested), flat["nested"], rtol=1e-6, atol=1e-8)
        back = np.asarray(leaf.dequantize(dtype).astype(jnp.float32))
        back = back.T if leaf.transposed else back
        np.testing.assert_allclose(back.reshape(-1), flat["values"], atol=1e-6 if dtype == "float32" else 0, rtol=0)
    zeros = flat["values"][kernel(case).reshape(-1) == 0]
    assert case[:5] != "zeros" or (zeros.size >= 218 and not zeros.any())
    assert shape == leaf.shape[::-1]
