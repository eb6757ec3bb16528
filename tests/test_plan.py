"""The plan of a run: bytes as of live arrays, FLOPs by the formula, and no TPU for a TPU."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft import cli
from jaxft.config import load_config
from jaxft.flops import count_flops
from jaxft.parallel.topology import CAPACITY, capacity, topology_devices
from jaxft.plan import abstract_batch, make_plan
from jaxft.tasks.sft import SupervisedTuning
from jaxft.tasks.start import choose_mesh, load_state
from jaxft.testing import tiny_llama

ROOT = Path(__file__).parents[1]
SHAPE = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
KERNELS = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
TABLES = 2 * 512 * 256
NORMS = 7 * 256
LORA = 3 * 8 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))


@pytest.fixture
def config(tmp_path):
    """Writes a config over the shape, with no weights and no rows anywhere."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))

    def write(*, method="{name: lora, r: 8, target_modules: all-linear}", model="", more=""):
        file = tmp_path / "c.yaml"
        file.write_text(
            f"task: sft\nmodel: {{config: {tmp_path}/config.json, dtype: bfloat16{model}}}\nmethod: {method}\n"
            "data: {train: nowhere.jsonl, format: text, max_length: 100}\n"
            f"train: {{steps: 3, batch_size: 8}}\noutput: {tmp_path}/run\n{more}"
        )
        return file

    return write


@pytest.mark.parametrize("mesh", ["", "mesh: {data: 2, fsdp: 2, tensor: 2}\n", "mesh: {data: 1, fsdp: 8}\n"])
@pytest.mark.parametrize("method", ["{name: full}", "{name: lora, r: 8, target_modules: all-linear}"])
def test_its_bytes_are_those_of_live_arrays(config, mesh, method, tmp_path, tokenizer):
    read = load_config(config(method=method, more=mesh))
    plan = make_plan(read)
    jaxft.save_model(tiny_llama(**SHAPE, dtype="bfloat16"), tmp_path / "model", tokenizer)
    trained = load_config(config(method=method, more=mesh), [f"model.path={tmp_path}/model"])
    live = load_state(trained, 3, choose_mesh(trained))

    def held(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert plan.parameters_bytes == held((live.trainable, live.frozen))
    assert plan.optimizer_bytes == held(live.opt_state)
    assert plan.trainable_parameters == (LORA if "lora" in method else KERNELS + TABLES + NORMS)
    assert plan.total_parameters == KERNELS + TABLES + NORMS + (LORA if "lora" in method else 0)
    assert plan.total_bytes >= plan.parameters_bytes + plan.optimizer_bytes + plan.temporary_bytes
    assert plan.capacity_bytes == capacity(jax.devices()[0])
    assert plan.fits
    assert plan.width == 128
    assert bool(plan.collectives) == bool(mesh)
    assert not (tmp_path / "run").exists()


def on_tpu(file, *more):
    """A process of its own: the compiler is told nothing by this suite's settings."""
    command = [sys.executable, "-m", "jaxft.cli", "plan", str(file), "--topology", "v5e:2x2", "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_slice_of_four_tpus(config, method):
    """Two bytes a frozen number, four a trained one, eight for its moments; matrices in four parts, vectors whole.

    The rank is a TPU's lanes: what is narrower takes as much room, which the total has in it and the formula not.
    """
    text = "{name: full}" if method == "full" else "{name: lora, r: 128, target_modules: all-linear}"
    plan = on_tpu(config(method=text, more="mesh: {data: 1, fsdp: 4}\n"))
    trained = KERNELS + TABLES if method == "full" else LORA * 128 // 8
    weights = 4 * trained // 4 + (4 * NORMS if method == "full" else 2 * (KERNELS + TABLES) // 4 + 2 * NORMS)
    assert abs(plan["parameters_bytes"] - weights) < 12000  # gates
    assert abs(plan["optimizer_bytes"] - 8 * (trained // 4 + (NORMS if method == "full" else 0))) < 100
    assert plan["device"] == "TPU v5 lite"
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert plan["capacity_bytes"] == int(15.75 * 2**30)
    assert plan["fits"] is True
    assert plan["remat"] == "full"
    assert plan["collectives"]["all-gather"] > 0
    assert plan["total_bytes"] == pytest.approx(
        plan["parameters_bytes"] + plan["optimizer_bytes"] + plan["temporary_bytes"], rel=0.05
    )


def test_what_does_not_fit_is_an_answer(config):
    """The compiler itself gives up: temporaries of one device alone are above its memory."""
    plan = on_tpu(config(model=", remat: none"), "--set", "data.max_length=16384", "--set", "train.batch_size=64")
    assert plan["fits"] is False
    assert plan["total_bytes"] > plan["capacity_bytes"]
    assert plan["collectives"] is None
    rest = plan["total_bytes"] - plan["temporary_bytes"] - plan["parameters_bytes"] - plan["optimizer_bytes"]
    assert 0 <= rest < 64 * 16384 * 3 * 4 + 1000  # the batch


@pytest.mark.slow
def test_arguments_alone_can_be_too_much(config, tmp_path):
    """The compiler's figure has the arguments in it: they are not counted twice."""
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "intermediate_size": 4 * 2**20}))
    plan = on_tpu(config(), "--set", "train.batch_size=1", "--set", "data.max_length=8")
    assert plan["fits"] is False
    assert plan["parameters_bytes"] > plan["capacity_bytes"]
    assert plan["total_bytes"] < 1.3 * (plan["parameters_bytes"] + plan["optimizer_bytes"])


@pytest.mark.parametrize("kind", ["v4:2x2x1", "v5p:2x2x1", "v5e:2x4", "v6e:2x4"])
def test_meshes_of_every_kind(kind):
    """One device a chip; any product of axes, whatever the grid of the slice."""
    devices = topology_devices(kind)
    assert len(devices) == np.prod([int(n) for n in kind.partition(":")[2].split("x")])
    for fsdp in (1, 2, len(devices)):
        mesh = jaxft.make_mesh(data=-1, fsdp=fsdp, devices=devices)
        assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    assert 15 * 2**30 < capacity(devices[0]) < 96 * 2**30


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 8}, {"data": 1, "fsdp": 2, "tensor": 8}])
def test_a_mesh_that_is_no_part_of_the_grid(shape):
    assert jaxft.make_mesh(**shape, devices=topology_devices("v6e:4x4")).size == 16


@pytest.mark.parametrize("topology", ["v5e:3x3", "v9:2x2", "nonsense", "v5e:", "tpu7x:2x2x1"])
def test_an_unknown_topology(config, topology, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxft", "plan", str(config()), "--topology", topology])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert f"topology {topology!r}: no such TPU slice" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_for_people(config):
    said = str(make_plan(load_config(config(more="mesh: {data: 1, fsdp: 8}\n"))))
    for part in ("8 x cpu (data=1, fsdp=8, tensor=1)\n8 rows x 128 tokens", f"{LORA:,} of", "to spare", "all-gather"):
        assert part in said
    assert "1 x cpu (data=1, fsdp=1, tensor=1), of 8 (`mesh: {data: -1}` uses" in str(make_plan(load_config(config())))


def test_the_widest_batch_is_planned(config):
    padded = abstract_batch(load_config(config()), None)
    packed = abstract_batch(load_config(config(), ["data.packing=true"]), None)
    names = ("input_ids", "labels", "attention_mask")
    assert {name: x.shape for name, x in padded.items()} == dict.fromkeys(names, (8, 128))
    assert {name: x.shape for name, x in packed.items()} == dict.fromkeys(
        (*names, "segment_ids", "position_ids"), (8, 100)
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("mesh: {data: 3}\n", "there are 8 devices"),
        ("mesh: {data: -1, fsdp: -1}\n", "only one axis"),
        ("mesh: {data: 1, fsdp: 8}\nevaluation: {rows: 0}\n", "evaluation.rows"),
    ],
)
def test_a_config_that_does_not_fit(config, more, said):
    with pytest.raises(jaxft.JaxftError, match=said):
        make_plan(load_config(config(more=more)))


def test_rows_that_do_not_divide_are_told_by_key(config):
    with pytest.raises(jaxft.MeshError, match=r"train.batch_size 8: 2 rows of a micro-batch .* take a multiple of 32"):
        make_plan(load_config(config(more="mesh: {data: 8}\n"), ["train.accumulate=4"]))


@pytest.mark.parametrize(
    ("file", "said"), [("", "is a folder: give a config.json in it"), ("/no.json", "is not there")]
)
def test_a_shape_that_is_no_file(config, tmp_path, file, said):
    with pytest.raises(jaxft.ConfigError, match=f"model.config: {tmp_path}{file} {said}"):
        make_plan(load_config(config(), [f"model.config={tmp_path}{file}"]))


def test_random_weights_take_one_shape(config, tmp_path):
    with pytest.raises(jaxft.ConfigError, match="random weights take the shape of model.path"):
        load_config(config(), [f"model.path={tmp_path}", "model.init=random"])
    plan = make_plan(
        load_config(config(), [f"model.path={tmp_path}", "model.init=random", "model.config=null", "model.dtype=null"])
    )
    assert plan.parameters_bytes > 4 * (KERNELS + TABLES)  # float32, as train would


def test_the_hub_is_asked_for_no_weights(config, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path)
    )
    make_plan(load_config(config(), ["model.path=some/model", "model.config=null"]))
    assert len(asked) == 1
    assert "*.json" in asked[0]
    assert "*.safetensors" not in asked[0]


def test_a_shape_alone_cannot_be_trained(config):
    with pytest.raises(jaxft.ConfigError, match="set model.path to train"):
        SupervisedTuning(load_config(config())).load_data()


def test_weights_of_another_shape_than_the_config_says(config, tmp_path, tokenizer):
    jaxft.save_model(tiny_llama(**{**SHAPE, "num_hidden_layers": 2}), tmp_path / "model", tokenizer)
    with pytest.raises(jaxft.ConfigError, match="num_hidden_layers"):
        load_state(load_config(config(), [f"model.path={tmp_path}/model"]), 3, None)


def test_flops_of_loops_branches_and_what_is_computed_again():
    x = jnp.ones((4, 8))
    w = jnp.ones((8, 8))
    one = 2 * 4 * 8 * 8

    def three(x):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=3)[0]

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert count_flops(jax.make_jaxpr(three)(x)) == 3 * one
    assert count_flops(jax.make_jaxpr(either)(x)) == 2 * one
    assert count_flops(jax.make_jaxpr(jax.jit(three))(x)) == 3 * one
    assert count_flops(jax.make_jaxpr(jax.grad(lambda x: jnp.sin(x @ w).sum()))(x)) == 2 * one
    again = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))
    assert count_flops(jax.make_jaxpr(jax.grad(lambda x: again(x).sum()))(x)) == 6 * one
    batched = jax.make_jaxpr(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5)))
    assert count_flops(batched) == 2 * 2 * 3 * 4 * 5


def test_flops_of_a_lora_step_are_the_formulas(config):
    """Forward and the gradient of activations, 4 N a token; no gradient of a frozen weight, 6 P of the adapter's."""
    plan = make_plan(load_config(config(model=", remat: none")))
    tokens = 8 * 128
    attention = 3 * 4 * 128 * 256  # layers x (scores and values, all keys) a token, forward
    ideal = tokens * (4 * (KERNELS + TABLES // 2) + 3 * attention + 6 * LORA)
    assert 0.9 * ideal < plan.flops_per_step < 1.15 * ideal


def test_capacities_have_the_compilers_names():
    assert set(CAPACITY) == {"TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"}
