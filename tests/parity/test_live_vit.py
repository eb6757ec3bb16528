"""ViT, its pictures and LoRA on it beside transformers and peft."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from test_golden_vit import TOLERANCE

import jaxft
from jaxft.data import read_processor
from jaxft.data.pixels import grey_levels

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
vit_cases = pytest.importorskip("vit_cases", reason="needs the [parity] extra")
torch = pytest.importorskip("torch")
peft = vit_cases.peers.peft
every_case = pytest.mark.parametrize("name", vit_cases.CASES)


@every_case
def test_there_and_back(name, tmp_path):
    """The peer's folder computes the same here, and ours holds the same tensors there."""
    theirs = vit_cases.model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = jaxft.load(tmp_path / "theirs")
    want = vit_cases.expected(theirs)
    assert np.abs(ours.hidden(jnp.asarray(want["pixels"])) - want["hidden"]).max() < TOLERANCE
    if "logits" in want:
        assert np.abs(ours(want["pixels"]) - want["logits"]).max() < TOLERANCE
    jaxft.save_model(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert type(again).__name__ == type(ours).__name__
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_pictures(resample, tmp_path):
    processor, want = vit_cases.processed(resample)
    processor.save_pretrained(tmp_path)
    ours = read_processor(tmp_path, size=12)
    images = np.stack([grey_levels(picture, ours) for picture in vit_cases.pictures()])
    np.testing.assert_allclose(ours(images), want, atol=1e-6)


def test_the_peer_reads_our_processor(tmp_path):
    from transformers import AutoImageProcessor

    ours = read_processor(tmp_path, size=12)
    ours.save_pretrained(tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    picture = vit_cases.pictures()[0]
    want = theirs(picture, return_tensors="np").pixel_values
    np.testing.assert_allclose(ours(grey_levels(picture, ours)[None]), want, atol=1e-6)


def total(model, batch, *, key):
    return jnp.square(model.answer({"pixel_values": batch["pixel_values"]}, key)).sum(), jnp.float32(1), {}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])  # there the classifier too
def test_lora_of_peft(targets, tmp_path):
    """Its adapter on our model: logits and gradients; ours, written again, is the same to the bit."""
    base = vit_cases.model("classifier")
    base.save_pretrained(tmp_path / "base")
    made = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    vit_cases.peers.roughen([p for n, p in sorted(made.named_parameters()) if "lora_" in n], 0.1)
    made.eval().save_pretrained(tmp_path / "theirs")
    pixels = vit_cases.pixels(base.config)
    logits = made(pixel_values=torch.tensor(pixels)).logits
    logits.square().sum().backward()
    model = jaxft.load_adapter(jaxft.load(tmp_path / "base")[0], tmp_path / "theirs")
    assert np.abs(model(pixels) - logits.detach().numpy()).max() < TOLERANCE
    jaxft.save_adapter(model, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    state = jaxft.TrainState.create(model, None, optax.sgd(1.0))
    state, _ = jaxft.make_train_step(total)(state, {"pixel_values": jnp.asarray(pixels)})
    jaxft.save_adapter(state, tmp_path / "stepped")
    stepped, seen = load_file(tmp_path / "stepped" / "adapter_model.safetensors"), 0
    for key, p in made.named_parameters():
        if "lora_" in key:
            seen += 1
            key, want = key.replace(".default", ""), p.grad.numpy()
            np.testing.assert_allclose(theirs[key] - stepped[key], want, atol=1e-5 * np.abs(want).max(), rtol=1e-4)
    assert seen == 2 * (2 * 2 if isinstance(targets, list) else 2 * 6 + 1)


def test_a_new_head_reaches_peft(tmp_path):
    """For other classes than the checkpoint's: trained beside LoRA, saved with it, and found there."""
    vit_cases.model("classifier").save_pretrained(tmp_path / "base")
    model, _ = jaxft.load(tmp_path / "base", labels=("no", "yes"))
    pixels = vit_cases.pixels(vit_cases.transformers.ViTConfig(image_size=12))
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=2), optax.adamw(0.1))
    for _ in range(2):
        state, _ = jaxft.make_train_step(total)(state, {"pixel_values": jnp.asarray(pixels)})
    folder = jaxft.save_adapter(state, tmp_path / "ours")
    kind = vit_cases.transformers.ViTForImageClassification
    base = kind.from_pretrained(tmp_path / "base", num_labels=2, ignore_mismatched_sizes=True)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        want = theirs(pixel_values=torch.tensor(pixels)).logits.numpy()
    assert np.abs(state.model(pixels) - want).max() < TOLERANCE
    assert np.abs(state.model(pixels) - model(pixels)).max() > 0.1
