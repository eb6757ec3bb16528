"""Folders of NF4 kernels as bitsandbytes and transformers write them: read, computed with, and written again."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from agreement import batch
from safetensors.numpy import load_file

import jaxft
from jaxft.models.names import parameters
from jaxft.quant import NF4

GOLDEN = Path(__file__).parent / "golden" / "quantized"
CASES = sorted(f.parent.name for f in GOLDEN.glob("*/model.safetensors"))
TOLERANCE = 1e-5  # of logits up to 3


def check(model, want):
    """Kernels stand for the peer's values bit for bit; logits agree where tokens are."""
    seen = 0
    for named, _, variable in parameters(model):
        if not isinstance(variable.get_value(), NF4):
            continue
        ours = np.asarray(variable.get_value().dequantize())
        for i, name in enumerate(f"{name}.weight" for name in named.names):
            if name in want:
                np.testing.assert_array_equal(ours[i].T, want[name])
                seen += 1
    assert seen == len(want) - 1 >= 2
    error = np.abs(np.asarray(model(**batch())) - want["logits"])
    assert (error * np.asarray(batch()["attention_mask"])[..., None]).max() < TOLERANCE < 1 < want["logits"].max()


def test_every_case_is_there():
    assert CASES == ["double", "gpt2", "single"]


@pytest.mark.parametrize("name", CASES)
def test_values_and_logits(name):
    check(jaxft.load(GOLDEN / name)[0], load_file(GOLDEN / name / "expected.safetensors"))


@pytest.mark.parametrize("name", CASES)
def test_written_again(name, tmp_path):
    """The same bytes under the same names; a config that names what stays whole."""
    jaxft.save_model(jaxft.load(GOLDEN / name)[0], tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / name))
    assert ours.keys() == theirs.keys()
    for key, there in theirs.items():
        if "quant_state" in key:
            assert json.loads(ours[key].tobytes()) == json.loads(there.tobytes())
        else:
            np.testing.assert_array_equal(ours[key], there, err_msg=key)
    ours, theirs = (
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (tmp_path, GOLDEN / name)
    )
    whole = ours.pop("llm_int8_skip_modules")
    assert ours == {key: theirs[key] for key in ours}
    assert ("lm_head" in whole, any("o_proj" in n for n in whole)) == (True, name == "single")


@pytest.mark.parametrize("name", CASES)
def test_shapes_for_arrays(name):
    """What the config alone says is what the tensors are."""
    live, shapes = (jaxft.load(GOLDEN / name, abstract=abstract)[0] for abstract in (False, True))
    assert [x.shape for x in jax.tree.leaves(live)] == [x.shape for x in jax.tree.leaves(shapes)]
