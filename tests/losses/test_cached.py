"""Rows in chunks: the whole batch's values and gradients, in the memory of a chunk, on one device and on eight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.losses import embed_in_chunks
from jaxft.losses.contrastive import by_class, picked
from jaxft.parallel.rules import repeated, rows_sharding

WIDTH, HIDDEN, OUT = 8, 40, 6
RNG = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(RNG.standard_normal(shape), jnp.float32) / 4 for name, shape in
          (("a", (WIDTH, HIDDEN)), ("b", (HIDDEN, OUT)))}  # fmt: skip


def encode(params, x, key=None):
    """A network of a wide middle, the size of which shows in the memory, with dropout."""
    x = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["a"].T @ params["a"])
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x / 0.7, 0)
    return x @ params["b"]


def loss(params, x, y, labels, chunk=None, mesh=None, key=None, rows=None):
    """InfoNCE over both columns, and SupCon over the first."""
    embed = lambda x, key: encode(params, x, key)
    x, y = (
        embed_in_chunks(embed, x, chunk=chunk, key=None if key is None else jax.random.fold_in(key, i), mesh=mesh)
        for i, x in enumerate((x, y))
    )
    first, hits = picked(x, y, 0.1, symmetric=True, chunk=rows, mesh=mesh)
    second, anchors, _ = by_class(x, labels, 0.1, chunk=rows, mesh=mesh)
    return first.mean() + second.sum() / anchors.sum(), hits


def batch(rows):
    x, y = jnp.asarray(RNG.standard_normal((2, rows, WIDTH)), jnp.float32)
    return x, x + y / 2, jnp.arange(rows) % 5


def differentiated(**options):
    return jax.jit(jax.value_and_grad(lambda *args: loss(*args, **options), has_aux=True))


def agree(got, want):
    assert 0.2 < np.mean(want[0][1]) < 1
    np.testing.assert_array_equal(got[0][1], want[0][1])  # row by row: the order is kept
    np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-5)
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, atol=1e-5 * float(jnp.abs(value).max()), err_msg=name)


@pytest.mark.parametrize(("chunk", "rows"), [(8, None), (5, 7), (1000, 1000)])
def test_chunks_are_the_whole(chunk, rows):
    given = batch(26)
    agree(differentiated(chunk=chunk, rows=rows)(PARAMS, *given), differentiated()(PARAMS, *given))


def test_dropout_is_drawn_once_for_a_chunk():
    """The recomputation takes the forward pass's masks: the gradient is that of the same masks without it."""
    given, key = batch(24), jax.random.key(3)

    def by_hand(params, x, y, labels):
        columns = []
        for i, column in enumerate((x, y)):
            parts = [encode(params, column[c::3], jax.random.fold_in(jax.random.fold_in(key, i), c)) for c in range(3)]
            columns.append(jnp.stack(parts, 1).reshape(24, OUT))
        first, hits = picked(*columns, 0.1, symmetric=True)
        second, anchors, _ = by_class(columns[0], labels, 0.1)
        return first.mean() + second.sum() / anchors.sum(), hits

    want = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(PARAMS, *given)
    agree(differentiated(chunk=8, key=key)(PARAMS, *given), want)
    assert float(want[0][0]) != float(differentiated(chunk=8)(PARAMS, *given)[0][0])


MESHES = [({"data": 8}, None), ({"data": 1, "fsdp": 8}, 16), ({"data": 2, "fsdp": 2, "tensor": 2}, 24)]


@pytest.mark.parametrize(("mesh", "chunk"), MESHES)
def test_eight_devices_are_one(mesh, chunk):
    """The negatives are the whole global batch's; only embeddings are sent, and each chunk is everyone's."""
    given = batch(64)
    want = differentiated()(PARAMS, *given)
    mesh = jaxft.make_mesh(**mesh)
    lying = jax.device_put(PARAMS, repeated(mesh)), *jax.device_put(given, rows_sharding(mesh))
    program = differentiated(chunk=chunk, rows=chunk, mesh=mesh).lower(*lying).compile()
    agree(program(*lying), want)
    text = program.as_text()
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    assert f"f32[{(chunk or 64) // devices},{HIDDEN}]" in text
    assert not re.search(rf"f32\[({chunk}|64),{HIDDEN}\]", text), "a device embeds what others embed"
    sent = re.findall(r"(f32\[[\d,]*\])\S* (?:all-gather|all-to-all|collective-permute)\(", text)
    if chunk != 24:  # 64 rows are not three times 24
        assert set(sent) == {f"f32[64,{OUT}]"}


def test_4096_negatives_in_the_memory_of_a_chunk():
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((4096, WIDTH), jnp.float32),) * 2 + (((4096,), jnp.int32),)]

    def temporary(**options):
        return differentiated(**options).lower(PARAMS, *shapes).compile().memory_analysis().temp_size_in_bytes

    whole, parts = temporary(), temporary(chunk=64, rows=64)
    embeddings, table = 4096 * OUT * 4, 4096 * 4096 * 4
    assert whole > 3 * table, "the table of cosines and what its gradient needs"
    assert parts < 64 * 4096 * 4 * 8 + 30 * embeddings, parts
    assert parts < whole / 25
