"""The leaves by themselves: what they hold, what they stand for, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import MethodError
from jaxft.quant import NF4, quantize_int8, quantize_nf4
from jaxft.quant.halves import halves, over_columns, over_rows
from jaxft.quant.product import product
from jaxft.quant.tables import NF4_VALUES, dynamic_map


def kernel(*shape, scale=0.1, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def unpacked(leaf):
    """The weights by the formula alone, in numpy: codes, scales and their codes one after the other."""
    codes = np.asarray(leaf.codes).reshape(-1)
    codes = np.stack([codes >> 4, codes & 15], -1).reshape(-1)
    absmax = np.asarray(leaf.absmax).reshape(-1)
    if leaf.double:
        over = np.repeat(np.asarray(leaf.nested), 256)[: absmax.size]
        absmax = dynamic_map()[absmax] * over + np.asarray(leaf.offset)
    scales = np.repeat(absmax, leaf.block)[: codes.size]
    flat = (np.array(NF4_VALUES, np.float32)[codes] * scales)[: leaf.size]
    return flat.reshape(leaf.matrix[::-1]).T if leaf.transposed else flat.reshape(leaf.matrix)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (96, 100), (33, 51), (3, 5), (1, 1)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_it_is_the_formula_and_near_the_kernel(shape, double, transposed):
    x = kernel(*shape)
    leaf = quantize_nf4(x, double=double, transposed=transposed)
    back = leaf.dequantize()
    assert leaf.shape == x.shape == back.shape and leaf.size == x.size
    np.testing.assert_array_equal(back, unpacked(leaf))
    np.testing.assert_array_equal(back, jax.jit(lambda leaf: leaf.dequantize())(leaf))
    blocks = np.resize(np.asarray(x.T if transposed else x).reshape(-1), -(-x.size // 64) * 64).reshape(-1, 64)
    widest = 0.152 * np.abs(blocks).max()  # half of the widest gap of the code, times the largest scale
    assert float(jnp.abs(back - x).max()) < widest + (0.03 * np.abs(blocks).max() if double else 1e-7)
    np.testing.assert_array_equal(leaf.dequantize(jnp.bfloat16), back.astype(jnp.bfloat16))


def test_a_compiler_at_its_best_rounds_as_without_a_program():
    leaf = quantize_nf4(kernel(128, 512), transposed=True)
    best = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # conftest asks for less
    fast = jax.jit(lambda leaf: leaf.dequantize(), compiler_options=best)(leaf)
    np.testing.assert_array_equal(fast, unpacked(leaf))


def test_bits():
    leaf = quantize_nf4(jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16), transposed=True)
    assert 8 * leaf.nbytes / leaf.size == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-6)
    assert 8 * leaf.nbytes / leaf.size <= 4.13
    single = quantize_nf4(jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16), double=False)
    assert 8 * single.nbytes / single.size == 4.5
    assert 8 * quantize_int8(jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)).nbytes / 4096**2 == 8 + 32 / 4096


def test_shapes_alone_are_those_of_arrays():
    for shape in ((2, 64, 128), (2, 33, 51)):
        for options in ({}, {"double": False}, {"transposed": True}, {"block": 128}):
            real = quantize_nf4(kernel(*shape), **options)
            shapes = quantize_nf4(jax.ShapeDtypeStruct(shape, jnp.float32), **options)
            found = jax.tree.map(lambda x: (x.shape, x.dtype), real)
            assert found == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
            assert shapes.nbytes == real.nbytes == sum(x.nbytes for x in jax.tree.leaves(real))


@pytest.mark.parametrize("shape", [(3, 64, 128), (3, 33, 51)])
@pytest.mark.parametrize("quantise", [quantize_nf4, quantize_int8])
def test_a_stack_is_its_layers(shape, quantise):
    x = kernel(*shape) * jnp.arange(1, 4)[:, None, None]
    whole = quantise(x)
    for i in range(3):
        one = quantise(x[i])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], whole), one)
    _, sliced = jax.lax.scan(lambda carry, leaf: (carry, leaf.dequantize()), 0, whole)
    np.testing.assert_array_equal(sliced, whole.dequantize())


@pytest.mark.parametrize("double", [True, False])
def test_zeros_stay_zeros(double):
    x = kernel(66, 97).at[:3].set(0)
    back = quantize_nf4(x, double=double).dequantize()
    assert not back[:3].any() and bool(jnp.isfinite(back).all())
    assert not quantize_nf4(jnp.zeros((64, 64)), double=double).dequantize().any()
    assert not quantize_int8(x.T).dequantize()[:, :3].any()


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(37, 53), (64, 64), (1, 90)])
def test_the_largest_of_a_block_is_exact(shape, block, transposed):
    x = kernel(*shape)
    leaf = quantize_nf4(x, block=block, double=False, transposed=transposed)
    flat, back = (np.asarray(a.T if transposed else a).reshape(-1) for a in (x, leaf.dequantize()))
    for start in range(0, flat.size, block):
        one, two = flat[start : start + block], back[start : start + block]
        i = np.abs(one).argmax()
        assert one[i] == two[i]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantise", [quantize_nf4, quantize_int8])
def test_what_is_not_finite_is_refused(bad, quantise):
    x = kernel(64, 64).at[3, 5].set(bad)
    with pytest.raises(MethodError, match=f"{quantise.__name__}: 1 of 4,096 values.*NaN or infinite"):
        quantise(x)


@pytest.mark.parametrize(
    "array, options, said",
    [
        (jnp.ones(64), {}, "give a kernel"),
        (jnp.ones((0, 64)), {}, "give a kernel"),
        (jnp.ones((8, 8), jnp.int32), {}, "floats"),
        (jnp.ones((8, 8)), {"block": 60}, "block=60 is none of 32, 64"),
    ],
)
def test_what_is_no_kernel_is_refused(array, options, said):
    with pytest.raises(MethodError, match=said):
        quantize_nf4(array, **options)


def test_int8_rounds_to_half_a_step():
    x = kernel(50, 30) * jnp.arange(1, 31)[None]
    leaf = quantize_int8(x)
    assert leaf.codes.dtype == jnp.int8 and int(jnp.abs(leaf.codes).max()) == 127
    assert bool((jnp.abs(leaf.dequantize() - x) <= leaf.scale[None] * 0.5001).all())


LEAVES = {
    "nf4": lambda x: quantize_nf4(x, transposed=True),
    "nf4-own-order": quantize_nf4,
    "nf4-flat": lambda x: quantize_nf4(x[:50, :70]),
    "int8": quantize_int8,
}


@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES)
def test_the_product_is_that_of_the_dequantised_kernel(make):
    leaf = make(kernel(64, 128))
    x, dy = kernel(2, 3, leaf.shape[0], seed=1), kernel(2, 3, leaf.shape[1], seed=2)

    @jax.jit
    def both(x, leaf):
        y, back = jax.vjp(product, x, leaf)
        return y, back(dy)[0], jax.vjp(lambda x: x @ leaf.dequantize(), x)

    y, dx, (want, pull) = both(x, leaf)
    np.testing.assert_allclose(y, want, atol=1e-6)
    np.testing.assert_allclose(dx, pull(dy)[0], atol=1e-6)


@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES)
def test_nothing_dequantised_is_kept_for_the_backward_pass(make):
    leaf = make(kernel(64, 128))
    x = kernel(6, leaf.shape[0])
    _, back = jax.vjp(product, x, leaf)
    kept = sum(a.nbytes for a in jax.tree.leaves(back))
    assert kept <= leaf.nbytes
    _, plain = jax.vjp(lambda x: x @ leaf.dequantize(), x)  # what it would be otherwise
    assert sum(a.nbytes for a in jax.tree.leaves(plain)) >= 4 * leaf.size


@pytest.mark.parametrize("transposed", [True, False])
def test_the_products_of_a_tpu_are_the_same(transposed):
    x = kernel(128, 192)
    leaf = quantize_nf4(x, transposed=transposed)
    rows = leaf.dequantize().T if transposed else leaf.dequantize()  # [R, C]
    high, low = halves(leaf, jnp.float32)
    np.testing.assert_array_equal(high, rows[:, ::2])
    np.testing.assert_array_equal(low, rows[:, 1::2])
    a, b = kernel(5, rows.shape[1], seed=1), kernel(5, rows.shape[0], seed=2)
    np.testing.assert_allclose(over_columns(a, leaf), a @ rows.T, atol=2e-6)
    np.testing.assert_allclose(over_rows(b, leaf), b @ rows, atol=2e-6)


def test_it_is_a_pytree():
    leaf = quantize_nf4(kernel(64, 64))
    assert isinstance(jax.tree.map(lambda x: x, leaf), NF4)
    assert len(jax.tree.leaves(leaf)) == 4
    assert hash(jax.tree.structure(leaf)) == hash(jax.tree.structure(quantize_nf4(kernel(64, 64, seed=1))))
