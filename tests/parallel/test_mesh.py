"""Meshes and rules: what is split over which axis, what is refused, and how a checkpoint comes onto a mesh."""

import jax
import numpy as np
import pytest

import jaxft
from jaxft.models.hub import fresh_model
from jaxft.models.placement import shardings
from jaxft.parallel.rules import constrain, spec
from jaxft.testing import tiny_gpt2, tiny_llama

EIGHT = jaxft.make_mesh(data=2, fsdp=2, tensor=2)


def on(model, **axes):
    """A model's shape on a mesh, with random values."""
    return fresh_model(model.config.replace(mesh=jaxft.make_mesh(**axes)))


def test_the_shape_of_a_mesh():
    assert dict(jaxft.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(jaxft.make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert EIGHT.devices.shape == (2, 2, 2)
    assert {d.id for d in EIGHT.devices.flat} == set(range(8))


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"data": 3}, "multiply to 3, and there are 8 devices"),
        ({"data": 4, "fsdp": 4}, "multiply to 16"),
        ({"data": -1, "fsdp": 3}, "data=-1, fsdp=3, tensor=1: its axes multiply to 6"),
        ({"data": -1, "fsdp": -1}, "only one axis can be -1"),
        ({"data": 0}, "at least 1"),
        ({"data": -2}, "at least 1"),
        ({"data": 8.0}, "whole number"),
        ({"data": True, "fsdp": 8}, "whole number"),
    ],
)
def test_a_mesh_that_the_devices_cannot_form(axes, said):
    with pytest.raises(jaxft.MeshError, match=said):
        jaxft.make_mesh(**axes)


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((2, 8, 6), ("layers", "embed", "mlp"), (None, "fsdp", "tensor")),
        ((8, 6), ("heads", "embed"), ("tensor", "fsdp")),
        ((2, 8), ("layers", "embed"), ()),  # a vector
        ((2, 8), ("layers", "heads"), (None, "tensor")),
        ((2, 8), ("layers", "norm"), ()),
        ((2, 8, 3), ("layers", "embed", "rank"), (None, "fsdp")),
        ((2, 3, 8), ("layers", "rank", "heads"), (None, None, ("tensor", "fsdp"))),
        ((2, 3, 6), ("layers", "rank", "heads"), (None, None, "tensor")),  # 6 does not divide over 4
        ((7, 8), ("vocab", "embed"), (None, "fsdp")),  # repeated where it does not divide
        ((5, 8), (), ()),
    ],
)
def test_the_rules(shape, axes, expected):
    assert tuple(spec(shape, axes, EIGHT)) == expected


def test_heads_are_not_cut():
    """One key/value head on two devices is repeated, though its width would divide; query heads are refused."""
    assert tuple(spec((8, 4), ("embed", "kv_heads"), EIGHT, {"kv_heads": 1})) == ("fsdp",)
    with pytest.raises(ValueError, match="heads of 3 does not divide over tensor=2"):
        spec((8, 12), ("embed", "heads"), EIGHT, {"heads": 3})


def test_narrow_factors_are_whole_at_work():
    assert tuple(spec((8, 3), ("embed", "rank"), EIGHT, at_work=True)) == ()
    assert tuple(spec((3, 8), ("rank", "mlp"), EIGHT, at_work=True)) == (None, "tensor")
    assert tuple(spec((8, 6), ("embed", "mlp"), EIGHT, at_work=True)) == ("fsdp", "tensor")


def test_every_parameter_that_does_not_divide_is_named():
    with pytest.raises(jaxft.MeshError) as refused:
        on(tiny_llama(hidden_size=36, intermediate_size=50), data=1, fsdp=8)
    for path in ("model.embed_tokens.embedding", "model.layers.self_attn.q_proj.kernel", "lm_head.kernel"):
        assert f"{path} [" in str(refused.value)
    assert "axis embed of 36 does not divide over fsdp=8" in str(refused.value)
    with pytest.raises(
        jaxft.MeshError, match=r"model.layers.mlp.up_proj.kernel \[2, 32, 50\]: axis mlp of 50 does not"
    ):
        on(tiny_llama(intermediate_size=50), data=2, tensor=4)


def test_one_key_value_head_is_repeated_over_tensor():
    model = on(tiny_llama(num_key_value_heads=1), data=4, tensor=2)
    lies = {path: tuple(s.spec) for path, s in shardings(model).items()}
    assert lies["model.layers.self_attn.k_proj.kernel"] == (None, "fsdp")
    assert lies["model.layers.self_attn.q_proj.kernel"] == (None, "fsdp", "tensor")
    ids = np.arange(3, 11).reshape(1, 8)
    plain = fresh_model(model.config.replace(mesh=None))
    np.testing.assert_allclose(model(ids), plain(ids), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_checkpoint_comes_onto_a_mesh_as_it_is(make, dtype, tmp_path):
    """Every value is in its place, each device holds its part alone, and the logits are those of one device."""
    jaxft.save_model(make(dtype=dtype), tmp_path)
    plain, _ = jaxft.load(tmp_path)
    split, _ = jaxft.load(tmp_path, mesh=EIGHT)
    wanted = shardings(split)
    seen = 0
    for path, value in jaxft.leaves(split).items():
        seen += 1
        assert value.sharding == wanted[path]
        assert value.dtype == dtype
        assert {s.data.nbytes for s in value.addressable_shards} == {
            value.dtype.itemsize * int(np.prod(wanted[path].shard_shape(value.shape)))
        }
        np.testing.assert_array_equal(np.asarray(value), np.asarray(jaxft.leaves(plain)[path]), err_msg=path)
    assert seen == len(wanted) == len(jaxft.leaves(plain))
    kernels = [v for p, v in jaxft.leaves(split).items() if p.endswith("kernel")]
    assert all(v.addressable_shards[0].data.size * 4 == v.size for v in kernels)  # fsdp x tensor
    again = jaxft.save_model(split, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    if dtype == "float32":
        ids = np.arange(3, 19).reshape(2, 8)
        np.testing.assert_allclose(split(ids), plain(ids), atol=1e-6)


def test_shapes_alone_lie_where_arrays_would(tmp_path):
    jaxft.save_model(tiny_llama(), tmp_path)
    shapes, _ = jaxft.load(tmp_path, mesh=EIGHT, abstract=True)
    whole, _ = jaxft.load(tmp_path, mesh=EIGHT)
    assert [x.sharding for x in jax.tree.leaves(shapes)] == [x.sharding for x in jax.tree.leaves(whole)]


def test_an_adapter_on_a_mesh(tmp_path):
    """Attached, switched, saved, loaded, merged and asked to write: what one device gives."""
    plain = tiny_llama()
    split = fresh_model(plain.config.replace(mesh=EIGHT))
    method = jaxft.LoRA(r=4, target_modules="all-linear", modules_to_save=("lm_head",))
    trained = [jaxft.attach(model, method, seed=1) for model in (plain, split)]
    for path, value in jaxft.leaves(trained[1]).items():
        assert value.sharding == shardings(trained[1])[path], path
        np.testing.assert_array_equal(np.asarray(value), np.asarray(jaxft.leaves(trained[0])[path]), err_msg=path)
    files = [jaxft.save_adapter(m, tmp_path / str(i)) / "adapter_model.safetensors" for i, m in enumerate(trained)]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = jaxft.load_adapter(split, tmp_path / "0")
    assert all(v.sharding == shardings(loaded)[p] for p, v in jaxft.leaves(loaded).items())
    off = jaxft.set_adapter(loaded, {"default": 0.5})
    assert off.adapter_weights.get_value().sharding == loaded.adapter_weights.get_value().sharding
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    want = jaxft.generate_ids(plain, prompts, max_new_tokens=6)
    merged = jaxft.merge(loaded)
    assert all(v.sharding == shardings(merged)[p] for p, v in jaxft.leaves(merged).items())
    for model in (loaded, merged):
        assert jaxft.generate_ids(model, prompts, max_new_tokens=6) == want


def test_rows_that_do_not_divide_stay_whole_outside_a_step():
    x = jax.numpy.ones((3, 2))
    assert constrain(x, None, "batch", None) is x
    assert constrain(x, EIGHT, "batch", None).sharding.is_fully_replicated
    assert not constrain(jax.numpy.ones((4, 2)), EIGHT, "batch", None).sharding.is_fully_replicated
