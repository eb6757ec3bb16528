"""Loading with the kernels as 4 or 8 bits: the values, the memory, files there and back, and what is refused."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.models.tensors import Tensors
from jaxft.quant import is_quantized, quantize
from jaxft.testing import tiny_bert, tiny_gpt2, tiny_llama, tiny_model, token_batch

MODELS = {
    "llama": tiny_llama,
    "llama-tied": lambda **more: tiny_llama(tie_word_embeddings=True, **more),
    "gpt2": tiny_gpt2,
    "gemma3": lambda **more: tiny_model("gemma3_text", **more),
    "bert": tiny_bert,
}
KINDS = ("nf4", "int8")
IDS = token_batch()["input_ids"]
every_kind = pytest.mark.parametrize("kind", KINDS)
STATE = "quant_state.bitsandbytes__nf4"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return jaxft.save_model(tiny_llama(), tmp_path / "whole")


@pytest.fixture
def packed(folder, tmp_path):
    """A folder with NF4 kernels, as we write it."""
    return jaxft.save_model(jaxft.load(folder, quantize="nf4")[0], tmp_path / "packed")


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)


def same(a, b):
    """Two models hold the same bits under the same paths."""
    a, b = (jax.tree_util.tree_flatten_with_path(x)[0] for x in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


def refused(folder, match, **options):
    with pytest.raises(jaxft.CheckpointError, match=match):
        jaxft.load(folder, **options)


@every_kind
@pytest.mark.parametrize("name", MODELS)
def test_as_the_whole_model_quantised(name, kind, tmp_path):
    """Tensor by tensor gives the bits of all at once; in bfloat16 the values are rounded first, as if loaded so."""
    jaxft.save_model(MODELS[name](), tmp_path)
    for dtype in ("float32", "bfloat16"):
        got = jaxft.load(tmp_path, quantize=kind, dtype=dtype)[0]
        whole = jaxft.load(tmp_path, dtype=dtype)[0]
        assert same(got, quantize(whole, kind))
        kept = {path for path, x in jaxft.leaves(got).items() if isinstance(x, jax.Array)}
        dropped = jaxft.leaves(whole).keys() - kept
        assert dropped and all(path.endswith(".kernel") for path in dropped)
        assert {path for path in jaxft.leaves(whole) if path.endswith(("embedding", "scale", "bias"))} <= kept
        assert "lm_head.kernel" not in dropped


@every_kind
def test_shapes_for_arrays(kind, folder):
    live = jaxft.load(folder, quantize=kind)[0]
    (folder / "model.safetensors").unlink()
    shapes = jaxft.load(folder, quantize=kind, abstract=True)[0]
    assert jax.tree.structure(live) == jax.tree.structure(shapes)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(live)] == [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))


@every_kind
@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_hold_what_one_does(kind, axes, folder):
    one = jaxft.load(folder, quantize=kind)[0]
    eight = jaxft.load(folder, quantize=kind, mesh=jaxft.make_mesh(**axes))[0]
    ours, theirs = (jax.tree.leaves(x) for x in (one, eight))
    assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert all(len(y.sharding.device_set) == 8 for y in theirs)
    np.testing.assert_allclose(one(IDS), eight(IDS), atol=1e-5)
    shapes = jaxft.load(folder, quantize=kind, mesh=jaxft.make_mesh(**axes), abstract=True)[0]
    assert [x.sharding for x in jax.tree.leaves(shapes)] == [y.sharding for y in theirs]


def test_whole_rows_are_split_over_the_mesh(tmp_path):
    """Where a row is whole blocks, each device holds its part of the codes, and not the rest."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    jaxft.save_model(tiny_llama(**wide), tmp_path)
    one = jaxft.load(tmp_path, quantize="nf4")[0]
    eight = jaxft.load(tmp_path, quantize="nf4", mesh=jaxft.make_mesh(data=1, fsdp=4, tensor=2))[0]
    for layers in (eight.model.layers.self_attn.q_proj, eight.model.layers.mlp.down_proj):
        leaf = layers.kernel.get_value()
        shards = {shard.data.nbytes for shard in leaf.codes.addressable_shards}
        assert shards == {leaf.codes.nbytes // 8}
        assert {shard.data.nbytes for shard in leaf.absmax.addressable_shards} == {leaf.absmax.nbytes // 8}
    np.testing.assert_allclose(one(IDS), eight(IDS), atol=1e-5)


def test_one_tensor_at_a_time(folder, monkeypatch):
    """Of what is read no more than one kernel, and what was made of it, is alive when the next one is read."""
    alive, most, read = {}, [], Tensors.read

    def watched(self, name, index=None):
        most.append(sum(alive.values()))
        made = read(self, name, index)
        alive[id(made)] = made.nbytes
        weakref.finalize(made, alive.pop, id(made), None)
        return made

    monkeypatch.setattr(Tensors, "read", watched)
    before = sum(x.nbytes for x in jax.live_arrays())
    model = jaxft.load(folder, quantize="nf4")[0]
    kernels = [x for name, x in load_file(folder / "model.safetensors").items() if "proj" in name]
    assert len(most) >= len(kernels) == 14
    assert max(most) <= max(x.nbytes for x in kernels) < sum(x.nbytes for x in kernels) / 4
    held = sum(x.nbytes for x in jax.live_arrays()) - before
    own = sum(x.nbytes for x in jax.tree.leaves(model))
    assert held <= own + 4 * 16 * 2**10, "something of the whole kernels is still there"


@every_kind
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise(name, kind, tmp_path, monkeypatch):
    """What was saved is read as it is, into any dtype, in one file or several: nothing is quantised again."""
    jaxft.save_model(MODELS[name](dtype="bfloat16"), tmp_path / "whole")
    model = jaxft.load(tmp_path / "whole", quantize=kind)[0]
    jaxft.save_model(model, tmp_path / "packed", shard_bytes=6_000)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    monkeypatch.setattr("jaxft.models.assemble.quantize_kernel", None)
    for options in ({}, {"quantize": kind}):
        assert same(model, jaxft.load(tmp_path / "packed", **options)[0])
    wide = jaxft.load(tmp_path / "packed", dtype="float32")[0]
    assert wide.dtype == jnp.float32
    shapes = jaxft.load(tmp_path / "packed", abstract=True)[0]
    assert jax.tree.structure(shapes) == jax.tree.structure(model)


def test_the_layout_is_that_of_the_hub(packed):
    tensors = load_file(packed / "model.safetensors")
    parts = {name.removeprefix(f"{Q}."): x for name, x in tensors.items() if name.startswith(f"{Q}.")}
    assert {name: (x.dtype.name, x.shape) for name, x in parts.items()} == {
        "absmax": ("uint8", (16,)),
        "quant_map": ("float32", (16,)),
        "nested_absmax": ("float32", (1,)),
        "nested_quant_map": ("float32", (256,)),
        STATE: ("uint8", parts[STATE].shape),
    }
    assert (tensors[Q].dtype, tensors[Q].shape) == (np.uint8, (512, 1))
    said = json.loads(parts[STATE].tobytes())
    assert {**said, "nested_offset": 0} == {
        **{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 32]},
        **{"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0},
    }
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["llm_int8_skip_modules"] == ["lm_head"]


def test_merged_it_is_a_plain_folder(packed, tmp_path):
    merged = jaxft.merge(jaxft.attach(jaxft.load(packed)[0], jaxft.LoRA(r=2)))
    jaxft.save_model(merged, tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    np.testing.assert_allclose(jaxft.load(tmp_path / "merged")[0](IDS), jaxft.load(packed)[0](IDS), atol=1e-5)


def edit_state(**fields):
    def change(tensors):
        said = {**json.loads(tensors[f"{Q}.{STATE}"].tobytes()), **fields}
        tensors[f"{Q}.{STATE}"] = np.frombuffer(json.dumps(said).encode(), np.uint8)

    return change


def drop(part):
    return lambda tensors: tensors.pop(f"{Q}.{part}")


def put(part, value):
    return lambda tensors: tensors.update({f"{Q}.{part}": value})


FAULTS = {
    "block": (edit_state(blocksize=128), r"q_proj.weight .*blocksize 128.* 64"),
    "nested-block": (edit_state(nested_blocksize=128), r"q_proj.weight .*nested_blocksize 128.* 256"),
    "shape": (edit_state(shape=[32, 16]), r"q_proj.weight"),
    "fp4": (edit_state(quant_type="fp4"), r"q_proj.weight .*fp4"),
    "absmax": (drop("absmax"), r"q_proj.weight.absmax is missing"),
    "nested": (drop("nested_absmax"), r"q_proj.weight.nested_absmax is missing"),
    "short": (put("absmax", np.zeros(3, np.uint8)), r"q_proj.weight.absmax is \(3,\)"),
    "map": (put("quant_map", np.linspace(-1, 1, 16, dtype=np.float32)), r"q_proj.weight.quant_map"),
    "nan": (put("nested_absmax", np.full(1, np.nan, np.float32)), r"q_proj.weight.nested_absmax has 1 val"),
    "garbage": (put(STATE, np.zeros(5, np.uint8)), r"q_proj.weight has a quant_state"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_other_layout_is_named(fault, packed):
    change, said = FAULTS[fault]
    rewrite(packed, change)
    refused(packed, said)


def test_a_layer_that_is_not_quantised_as_the_others(packed, folder):
    whole = load_file(folder / "model.safetensors")[Q]

    def change(tensors):
        for name in [name for name in tensors if name.startswith(Q)]:
            del tensors[name]
        tensors[Q] = whole

    rewrite(packed, change)
    refused(packed, r"layers.[01].self_attn.q_proj.weight .*the other layers")


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "jaxft_int3"}, "jaxft_int3"),
        ("nf4", "quantization_config"),
    ],
)
@pytest.mark.parametrize("abstract", [False, True])
def test_an_unknown_method_is_named(said, match, abstract, folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": said}))
    refused(folder, match, abstract=abstract)


def test_a_config_that_says_null_says_nothing(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": None}))
    for abstract in (False, True):
        assert not any(map(is_quantized, jaxft.leaves(jaxft.load(folder, abstract=abstract)[0]).values()))


def test_quantised_in_another_way(packed, folder):
    refused(packed, "nf4.*int8", quantize="int8")
    refused(packed, "nf4.*int8", quantize="int8", abstract=True)
    for abstract in (False, True):
        refused(folder, "quantize='fp4'.*'nf4'.*'int8'", quantize="fp4", abstract=abstract)


@every_kind
def test_infinities_are_named(kind, folder):
    def change(tensors):
        tensors[Q][3, 4] = np.inf

    rewrite(folder, change)
    refused(folder, r"q_proj.weight has 1 values that are NaN or infinite", quantize=kind)


@pytest.mark.slow
def test_a_gigabyte_is_never_in_memory():
    """The benchmark's own figures: anonymous memory at its peak is what is kept, and little beside it."""
    script = Path(__file__).parents[2] / "benchmarks" / "load_memory.py"
    done = subprocess.run([sys.executable, script, "--quantize"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["bfloat16", "int8", "nf4", "nf4", "nf4, again"]
    whole = float(rows[0][2])
    assert whole >= 1.0
    for _, _, model, peak, *_ in rows[1:]:
        assert float(peak) < float(model) + 0.3 < whole
