"""Prefixes and prompts of the peer: the cases, and where its encoders' parameters stand in our tree. No torch here."""

import re

import jax.numpy as jnp
import numpy as np
import optax

import jaxft
from jaxft.models.names import variables

CASES = {  # peft's class, its options, and the method that has the same encoder
    "prefix": ("PrefixTuningConfig", {}, jaxft.PrefixTuning(4)),
    "projected": (
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 6},
        jaxft.PrefixTuning(4, prefix_projection=True, encoder_hidden_size=6),
    ),
    "prompt": ("PromptTuningConfig", {}, jaxft.PromptTuning(4)),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 6}, jaxft.PTuning(4, encoder_hidden_size=6)),
    "lstm": (
        "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6, "encoder_num_layers": 2},
        jaxft.PTuning(4, encoder="lstm", encoder_hidden_size=6),
    ),
}
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [12, 13])
NEW = 6


def rows():
    """Three rows: whole, padded right, padded left; the positions count real tokens."""
    ids = np.random.default_rng(0).integers(3, 64, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:], mask[2, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def labels():
    """Labels of the first two rows, without the first token, which peft predicts from the last virtual one."""
    found = np.where(rows()["attention_mask"] == 1, rows()["input_ids"], -100)[:2]
    found[:, 0] = -100
    return found


def place(name):
    """Return the path under the module, and whether the peer holds it transposed."""
    if name == "embedding.weight":
        return "vectors", False
    kind = "kernel" if "weight" in name else "bias"
    dense = re.fullmatch(r"(transform|mlp_head)\.(\d)\.\w+", name)
    if dense:
        return f"{{}}layers.{int(dense[2]) // 2}.{kind}", kind == "kernel"
    which, layer, back = re.fullmatch(r"lstm_head\.\w+_(ih|hh)_l(\d)(_reverse)?", name).groups()
    module = f"encoder.{'backward' if back else 'forward'}.{layer}.{'input' if which == 'ih' else 'recurrent'}"
    return f"{module}.{kind}", kind == "kernel"


def ours(case, values):
    """Return the peer's parameters, or their gradients, by our paths."""
    slot = "past" if case in ("prefix", "projected") else "prompt"
    found = {}
    for name, value in values.items():
        path, transposed = place(name)
        path = path.format("encoder.head." if case == "lstm" else "encoder.")
        found[f"{slot}.default.{path}"] = value.T if transposed else value
    return found


def with_encoder(base, case, values):
    """Return the base with the peer's virtual tokens and what makes them."""
    model = jaxft.attach(base, CASES[case][2])
    held, mine = variables(model), ours(case, values)
    assert set(mine) == {path for path in held if ".default." in path}
    for path, value in mine.items():
        assert held[path].get_value().shape == value.shape, path
        held[path].set_value(jnp.asarray(value))
    return model


def check(base, case, folder, found, tolerance=1e-5):
    """Hold what a folder of the peer's, and its encoder, give here to what the peer computes; return the worst."""
    assert np.abs(found["logits"] - found["base"]).max() > 1e-2
    real = rows()["attention_mask"][..., None]
    encoder = {k.removeprefix("value "): v for k, v in found.items() if k.startswith("value ")}
    wanted = ours(case, {k.removeprefix("grad "): v for k, v in found.items() if k.startswith("grad ")})
    flat, whole = jaxft.load_adapter(base, folder), with_encoder(base, case, encoder)
    worst = np.abs((np.asarray(flat(**rows())) - found["logits"]) * real).max()
    assert worst < tolerance
    assert jaxft.generate_ids(flat, PROMPTS, max_new_tokens=NEW, stop_ids=()) == found["new"].tolist()
    assert np.array_equal(jaxft.set_adapter(flat, None)(**rows()), base(**rows()))
    state = jaxft.TrainState.create(whole, None, optax.sgd(1.0))
    before = {k: np.array(v) for k, v in jaxft.leaves(state.trainable).items()}
    batch = {k: jnp.asarray(v[:2]) for k, v in rows().items()}
    state, metrics = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, {**batch, "labels": labels()})
    assert abs(float(metrics["loss"]) - found["loss"]) < tolerance
    assert set(wanted) == set(before)
    for path, after in jaxft.leaves(state.trainable).items():
        np.testing.assert_allclose(before[path] - after, wanted[path], atol=1e-6, rtol=1e-4, err_msg=path)
    return worst
