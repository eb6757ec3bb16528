"""What is compared of an adapter with what a peer says of it; no torch is needed here."""

import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

import jaxft
from jaxft.interop.entries import entries

SVD = 1e-5  # two routines for a singular value decomposition differ by rounding, over the gap of the singular values
STEP = optax.sgd(1.0)


def batch():
    """The rows that the peers saw: whole, padded right, padded left."""
    ids = np.random.default_rng(0).integers(3, 64, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:], mask[2, :4] = 0, 0
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}


def check_logits(model, want, tolerance=1e-5):
    inputs = batch()
    got = np.asarray(model(**inputs))
    assert np.isfinite(got).all()
    assert np.abs((got - want) * np.asarray(inputs["attention_mask"])[..., None]).max() < tolerance


def tensors(model):
    """{name in a file: array} of the adapter `default`."""
    return {k: e.read() for k, e in entries(model, "default", lambda *_: False).items()}


def check_gradients(model, want):
    """The gradient of every trained leaf is the peer's; return the state after a step of SGD along it."""
    inputs = batch()
    labels = jnp.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100).at[2, 4].set(-100)
    before = tensors(model)
    state = jaxft.TrainState.create(model, None, STEP)
    state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, {**inputs, "labels": labels})
    after = tensors(state.model)
    assert before.keys() == want.keys()
    for key, gradient in want.items():
        np.testing.assert_allclose(before[key] - after[key], gradient, atol=1e-6, rtol=1e-4, err_msg=key)
    return state


def check_merged(model, want, folder, tolerance=1e-6):
    """Merged weights by their names in a checkpoint."""
    jaxft.save_model(jaxft.merge(model), folder)
    ours = load_file(folder / "model.safetensors")
    for key, value in want.items():
        np.testing.assert_allclose(ours[key], value, atol=tolerance, err_msg=key)


def part(found, kind):
    """The values of one kind, `"gradient "` say, by the rest of their names."""
    return {key.removeprefix(kind): value for key, value in found.items() if key.startswith(kind)}
