"""bitsandbytes and transformers beside us: their NF4 folders read here, ours read there."""

import json

import numpy as np
import optax
import pytest
from agreement import batch
from test_golden_quantized import check

import jaxft
from jaxft.testing import tiny_llama

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
quantized_cases = pytest.importorskip("quantized_cases", reason="needs the [parity] extra")
torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
CASES = quantized_cases.CASES


def quantised(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


@pytest.mark.parametrize("name", CASES)
def test_theirs_here_and_ours_there(name, tmp_path):
    """The same values, logits and tensors in both directions; from the plain folder we make the same codes."""
    theirs = quantized_cases.quantized(name, tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "theirs")
    want = quantized_cases.expected(theirs)
    ours = jaxft.load(tmp_path / "theirs")[0]
    check(ours, want)
    jaxft.save_model(ours, tmp_path / "ours")
    again = quantized_cases.read(tmp_path / "ours")
    assert quantised(again).keys() == quantised(theirs).keys() != set()
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if "quant_state" in key:
            assert json.loads(bytes(after[key].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(after[key], tensor), key
    np.testing.assert_array_equal(quantized_cases.expected(again)["logits"], want["logits"])


@pytest.mark.parametrize("name", ["double", "gpt2"])
def test_from_the_whole_checkpoint_the_bytes_are_theirs(name, tmp_path):
    theirs = quantized_cases.quantized(name, tmp_path / "plain").state_dict()
    jaxft.save_model(jaxft.load(tmp_path / "plain", quantize="nf4")[0], tmp_path / "ours")
    ours = quantized_cases.read(tmp_path / "ours").state_dict()
    assert ours.keys() == theirs.keys()
    codes = [key for key, x in theirs.items() if x.dtype == torch.uint8 and "quant_state" not in key]
    assert len(codes) == 2 * len([key for key in theirs if "nested_absmax" in key]) > 0
    for key, tensor in theirs.items():
        if key in codes:
            assert torch.equal(ours[key], tensor), key
        elif "quant_state" not in key:  # the mean of the scales is equal to rounding
            np.testing.assert_allclose(ours[key].float().numpy(), tensor.float().numpy(), rtol=1e-6, atol=1e-8)


def test_an_adapter_of_ours_over_their_base(tmp_path):
    """Trained here beside NF4 kernels, read by peft beside bitsandbytes' of the same checkpoint; and the other way."""
    theirs = quantized_cases.quantized("double", tmp_path / "plain")
    model = jaxft.load(tmp_path / "plain", quantize="nf4")[0]
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=4, target_modules="all-linear"), optax.sgd(1.0))
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    for _ in range(2):
        state, _ = step(state, {**batch(), "labels": batch()["input_ids"]})
    jaxft.save_adapter(state, tmp_path / "adapter")
    peft = quantized_cases.peers.peft
    with_adapter = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    for module in with_adapter.modules():
        module.support_avx512bf16_for_cpu = False
    want, mask = quantized_cases.peers.logits(with_adapter), np.asarray(batch()["attention_mask"])[..., None]
    got, bare = np.asarray(state.model(**batch())), np.asarray(model(**batch()))
    assert np.abs((got - want) * mask).max() < 1e-5 < 1e-2 < np.abs((got - bare) * mask).max()
    with_adapter.save_pretrained(tmp_path / "again")
    again = jaxft.load_adapter(model, tmp_path / "again")
    np.testing.assert_array_equal(again(**batch()), got)


@pytest.mark.parametrize("options", [{"blocksize": 128}, {"quant_type": "fp4"}])
def test_another_code_or_block_is_refused(options, tmp_path):
    """As `bitsandbytes` itself writes its parts."""
    jaxft.save_model(jaxft.load(jaxft.save_model(tiny_llama(), tmp_path / "w"), quantize="nf4")[0], tmp_path / "q")
    name = "model.layers.1.mlp.up_proj.weight"
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "q" / "model.safetensors")
    whole = load_file(tmp_path / "w" / "model.safetensors")[name]
    given = {"blocksize": 64, "quant_type": "nf4", **options}
    codes, state = bitsandbytes.functional.quantize_4bit(whole, compress_statistics=True, **given)
    tensors = {key: x for key, x in tensors.items() if not key.startswith(name)}
    parts = {f"{name}.{part}": x for part, x in state.as_dict(packed=True).items()}
    save_file({**tensors, name: codes, **parts}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(jaxft.CheckpointError, match=f"{name} .*({'128' if 'blocksize' in options else 'fp4'})"):
        jaxft.load(tmp_path / "q")
