"""The serving export, read by an engine that knows r, lora_alpha, target_modules and the tensors, and nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.models.names import variables
from jaxft.testing import tiny_gpt2, tiny_llama, token_batch

CASES = {
    "patterns": (
        tiny_llama,
        jaxft.LoRA(
            r=4,
            alpha=16,
            use_rslora=True,
            target_modules=("q_proj", "lm_head", "down_proj"),
            exclude_modules=r".*0\.mlp\..*",
            rank_pattern={r"1\..*q_proj": 2},
            alpha_pattern={"q_proj": 3},
        ),
        4,
    ),
    "pissa": (tiny_gpt2, jaxft.LoRA(r=2, alpha=3, init="pissa", rank_pattern={r"1\..*": 3}), 6),
}


def engine(base, adapter):
    """{tensor: array} of a base with an adapter folded in, as an engine of one rank and one scale sees it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors, loras = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    used = set()
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.rsplit(".", 1)[-1] in config["target_modules"]:
            a, b = (loras[f"base_model.model.{module}.lora_{which}.weight"] for which in "AB")
            assert a.shape[0] == b.shape[1] == config["r"]
            change = config["lora_alpha"] / config["r"] * b @ a
            tensors[name] = weight + (change.T if config["fan_in_fan_out"] else change)
            used |= {f"base_model.model.{module}.lora_{which}.weight" for which in "AB"}
    assert used == set(loras)
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_a_plain_engine_computes_the_same(case, tmp_path):
    make, method, rank = CASES[case]
    base = make()
    model = jaxft.attach(base, method)
    for path, variable in variables(model).items():
        if path.endswith((".a", ".b")):
            value = variable.get_value()
            variable.set_value(value + 0.1 * jax.random.normal(jax.random.key(len(path)), value.shape))
    jaxft.save_model(base, tmp_path / "base")
    folder = jaxft.save_serving(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank
    assert not config.get("rank_pattern") and not config["use_rslora"] and config["init_lora_weights"] is True
    save_file(engine(tmp_path / "base", folder), tmp_path / "base" / "model.safetensors")
    served, _ = jaxft.load(tmp_path / "base")
    ids = token_batch()["input_ids"]
    want = model(ids)
    assert float(jnp.abs(want - base(ids)).max()) > 1e-2
    np.testing.assert_allclose(served(ids), want, atol=1e-5, rtol=0)
    np.testing.assert_allclose(jaxft.load_adapter(base, folder)(ids), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (jaxft.LoRA(r=2, use_dora=True), "q_proj has a DoRA in its slot `delta`"),
        (jaxft.LoRA(r=2, modules_to_save=("lm_head",)), "lm_head has a Copies in its slot `saved`"),
        (jaxft.LoRA(r=2, target_modules=("embed_tokens",)), "embed_tokens has a LowRankEmbedding"),
        (jaxft.LoRA(r=2, trainable_tokens=(3,)), "embed_tokens has a TokenRows"),
        (jaxft.IA3(), "(?s)down_proj has a InputScale.*k_proj has a Scale"),
        (jaxft.LoRA(r=2) | jaxft.BitFit(create=True), "has a Copies in its slot `saved`"),
    ],
)
def test_what_a_plain_lora_cannot_express(method, match, tmp_path):
    with pytest.raises(jaxft.MethodError, match=match):
        jaxft.save_serving(jaxft.attach(tiny_llama(), method), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_base_leaves_that_are_trained(tmp_path):
    model = jaxft.attach(tiny_gpt2(), jaxft.LoRA(r=2) | jaxft.BitFit())
    with pytest.raises(jaxft.MethodError, match="transformer.h.attn.c_proj.bias of the base is trained"):
        jaxft.save_serving(model, tmp_path)


class Stacked(nnx.Module):
    """A person's own model with one `nnx.Linear` for two layers."""

    def __init__(self, rngs):
        self.stack = nnx.split_rngs(splits=2)(nnx.vmap(lambda r: nnx.Linear(6, 6, rngs=r)))(rngs)


def test_layers_of_ones_own_under_one_name(tmp_path):
    model = jaxft.attach(Stacked(nnx.Rngs(0)), jaxft.LoRA(r=2))
    with pytest.raises(jaxft.MethodError, match="stack is several layers of your own model under one name"):
        jaxft.save_serving(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
