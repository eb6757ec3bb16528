"""The laws over methods on a BERT with a new head: each method is held to those that an encoder can break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import loop

import jaxft
from jaxft.models.bert import BertConfig
from jaxft.models.hub import fresh_model
from jaxft.testing import LAWS, token_batch
from jaxft.testing.laws import TX, gradients
from jaxft.testing.tiny import BERT
from jaxft.train.state import with_leaves

NEW = 32 * 3 + 3 + 32 * 32 + 32  # the classifier, and the pooler under it
IDENTITY = {
    "full": (jaxft.Full(), 20_387),
    "bitfit": (jaxft.BitFit(), 2 * (7 * 32 + 48) + 32 + NEW),
    "lora-all": (
        jaxft.LoRA(r=2, target_modules="all-linear", init="gaussian"),
        2 * 2 * (4 * 64 + 2 * 80) + NEW,  # the pooler is new, and trained whole
    ),
    "ia3": (jaxft.IA3(), 2 * (32 + 32 + 32 + 48) + NEW),
    "pfeiffer": (jaxft.Adapter(size=4), 2 * (2 * 32 * 4 + 36) + NEW),
    "houlsby": (jaxft.Adapter(kind="houlsby", size=4), 4 * (2 * 32 * 4 + 36) + NEW),
    "lora|bitfit": (jaxft.LoRA(r=2) | jaxft.BitFit(), None),
}
VIRTUAL = {
    "prefix": (jaxft.PrefixTuning(num_virtual_tokens=3), 3 * 128 + NEW),
    "prompt": (jaxft.PromptTuning(num_virtual_tokens=3), 3 * 32 + NEW),
}
METHODS = {**IDENTITY, **VIRTUAL}
CHECKED = ("partition", "step_0", "gradients", "off", "padding")
CASES = [m if m in ("prompt", "lora|bitfit") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


def bert(**options):
    config = BertConfig.from_raw(BERT, labels=("bad", "so so", "good"), **options)
    return fresh_model(config)


def squared(model, batch, *, key):
    """A model loss, of rows that are to give one-hot logits."""
    logits = model(**{k: batch[k] for k in model.inputs if k in batch}, key=key)
    return jnp.square(logits - jax.nn.one_hot(batch["targets"], 3)).sum(), logits.shape[0], {}


@pytest.fixture(scope="module")
def batch():
    found = token_batch()
    types = jnp.zeros_like(found["input_ids"]).at[:, 6:].set(1)
    return {**{k: found[k] for k in ("input_ids", "attention_mask")}, "token_type_ids": types, "targets": jnp.arange(3)}


@pytest.mark.parametrize("method", CASES)
def test_laws(method, batch):
    assert set(CHECKED) < set(LAWS)
    for law in CHECKED:
        LAWS[law](METHODS[method][0], bert(), batch, squared, identity=method in IDENTITY, null=("*.key.bias",))


def test_counts():
    model = bert()
    counts = {name: (jaxft.parameter_report(model, method).trainable, n) for name, (method, n) in METHODS.items() if n}
    assert len(counts) == len(METHODS) - 1
    assert {name: found for name, (found, _) in counts.items()} == {name: n for name, (_, n) in counts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["houlsby", "prompt"])
def test_remat_and_layers_one_by_one(method, batch, monkeypatch):
    """Law 8: the same gradients with remat, and from the layers applied one by one without jit."""
    made = METHODS[method][0]
    state, rematted = (jaxft.TrainState.create(bert(remat=remat), made, TX) for remat in ("none", "full"))
    move = lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    state = state.replace(trainable=jax.tree.map(move, state.trainable))
    rematted = rematted.replace(trainable=with_leaves(rematted.trainable, jaxft.leaves(state.trainable)))
    want = gradients(state, batch, squared)
    others = {"remat": gradients(rematted, batch, squared)}
    monkeypatch.setattr(jax.lax, "scan", loop)
    with jax.disable_jit():
        others["loop"] = gradients(state, batch, squared)
    for how, got in others.items():
        assert got.keys() == want.keys()
        for path in want:
            np.testing.assert_allclose(got[path], want[path], atol=1e-5, rtol=1e-4, err_msg=f"{how}: {path}")
