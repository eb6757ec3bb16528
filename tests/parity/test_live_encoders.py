"""BERT and RoBERTa side by side with transformers and peft: hidden states, gradients, heads, folders both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
encoders = pytest.importorskip("peers_encoders", reason="needs the [parity] extra")
torch = pytest.importorskip("torch")
peft, transformers = encoders.peft, encoders.transformers
TOLERANCE = 1e-5
both = pytest.mark.parametrize("kind", encoders.KINDS)
METHODS = {
    "lora": jaxft.LoRA(r=2, alpha=8, target_modules="all-linear"),
    "dora": jaxft.LoRA(r=2, alpha=8, use_dora=True),
    "lora-embedding": jaxft.LoRA(r=2, target_modules=("word_embeddings", "value")),
    "ia3": jaxft.IA3(),
    "prompt": jaxft.PromptTuning(num_virtual_tokens=3),
    "p_tuning": jaxft.PTuning(num_virtual_tokens=3, encoder_hidden_size=8),
}
PLAIN = {**METHODS, "prefix": jaxft.PrefixTuning(num_virtual_tokens=3)}


def here(kind, **more):
    return {k: jnp.asarray(v.numpy()) for k, v in encoders.inputs(kind, **more).items()}


def by_position(kind, found):
    """The peer's inputs with the positions that we count: over the real tokens, from the family's first."""
    first = 2 if kind == "roberta" else 0
    return {**found, "position_ids": torch.clamp(found["attention_mask"].cumsum(1) - 1, min=0) + first}


@both
@pytest.mark.parametrize("head", [True, False], ids=["classifier", "plain"])
def test_there_and_back(kind, head, tmp_path):
    """The peer's folder computes the same here, padded right and left, and ours holds the same tensors there."""
    theirs = encoders.model(kind, head)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = jaxft.load(tmp_path / "theirs")
    for left in (False, True):
        inputs = encoders.inputs(kind, left=left)
        with torch.no_grad():
            out = theirs(**by_position(kind, inputs))
        real = inputs["attention_mask"].numpy()[..., None]
        if head:  # the peer reads the first place even where that is padding
            rows = slice(0, 2) if left else slice(None)
            assert np.abs((np.asarray(ours(**here(kind, left=left))) - out.logits.numpy())[rows]).max() < TOLERANCE
        else:
            apart = np.asarray(ours(**here(kind, left=left))) - out.last_hidden_state.numpy()
            assert np.abs(apart * real).max() < TOLERANCE
    jaxft.save_model(ours, tmp_path / "ours")
    auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
    again = auto.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in theirs.state_dict().items()
    }
    assert again.config.id2label == (encoders.LABELS if head else again.config.id2label)


@both
def test_gradients(kind, tmp_path):
    """The gradient of a sum of squared logits in every parameter of a classifier."""
    theirs = encoders.model(kind)
    theirs.save_pretrained(tmp_path)
    (theirs(**encoders.inputs(kind)).logits ** 2).sum().backward()
    ours, _ = jaxft.load(tmp_path)

    @jax.jit
    def gradients(model):
        return jax.grad(lambda m: jnp.square(m(**here(kind))).sum(), allow_int=True)(model)

    found = jaxft.leaves(gradients(ours))
    wanted, seen = dict(theirs.named_parameters()), 0
    kernel = lambda name: wanted[name].grad.numpy().T
    stem = ours.prefix
    for place in (
        "attention.self.query",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ):
        want = [kernel(f"{stem}.encoder.layer.{i}.{place}.weight") for i in range(2)]
        np.testing.assert_allclose(found[f"{stem}.encoder.layer.{place}.kernel"], want, atol=1e-4, rtol=1e-4)
        seen += 1
    for place in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        want = wanted[f"{stem}.embeddings.{place}.weight"].grad.numpy().copy()
        if kind == "roberta" and place != "token_type_embeddings":
            want[1] = found[f"{stem}.embeddings.{place}.embedding"][1]  # torch leaves the pad's row out
        np.testing.assert_allclose(found[f"{stem}.embeddings.{place}.embedding"], want, atol=1e-4, rtol=1e-4)
        seen += 1
    assert seen == 8


def moved(model):
    """Every leaf of the adapter `default` moved, as training would."""
    trainable, frozen = jaxft.partition(model, None)
    move = lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    return jaxft.combine(jax.tree.map(move, trainable), frozen)


def check_in_peft(ours, base, folder, kind, types=True):
    inputs = encoders.inputs(kind)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    if not types:
        del inputs["token_type_ids"]
    with torch.no_grad():
        out = theirs(**inputs)
    want = out.logits.numpy() if "logits" in out else out.last_hidden_state.numpy()
    got = np.asarray(ours(**{k: jnp.asarray(v.numpy()) for k, v in inputs.items()}))
    real = np.ones((1, 1)) if got.ndim == 2 else inputs["attention_mask"].numpy()[..., None]
    want = want[:, -got.shape[1] :] if got.ndim == 3 else want
    assert np.abs((got - want) * real).max() < TOLERANCE


@both
@pytest.mark.parametrize("method", METHODS)
def test_a_new_head_in_peft(kind, method, tmp_path):
    """An adapter with the copy of a new head, trained here, gives the same logits in peft."""
    encoders.model(kind, head=False).save_pretrained(tmp_path / "plain")
    labels = ("no", "yes")
    jaxft.save_model(jaxft.load(tmp_path / "plain", labels=labels)[0], tmp_path / "base")
    model, _ = jaxft.load(tmp_path / "plain", labels=labels)
    ours = moved(jaxft.attach(model, METHODS[method]))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    check_in_peft(ours, base, jaxft.save_adapter(ours, tmp_path / "adapter"), kind)


@pytest.mark.parametrize("method", PLAIN)
def test_a_plain_encoder_in_peft(method, tmp_path):
    base = encoders.model("bert", head=False)
    base.save_pretrained(tmp_path / "base")
    ours = moved(jaxft.attach(jaxft.load(tmp_path / "base")[0], PLAIN[method]))
    virtual = method in ("prompt", "p_tuning", "prefix")
    check_in_peft(ours, base, jaxft.save_adapter(ours, tmp_path / "adapter"), "bert", types=not virtual)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_decoders_classify(family, tmp_path):
    """`score` of the last real token, where pads have an id of their own and where they share one with a token."""
    own = (
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32} if family == "GPT2" else {"num_key_value_heads": 2}
    )
    config = getattr(transformers, f"{family}Config")(**{**encoders.SHAPE, **own, "pad_token_id": 0, "num_labels": 3})
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForSequenceClassification")(config).float().eval()
    encoders.peers.roughen(theirs.parameters(), 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = jaxft.load(tmp_path / "theirs")
    inputs = {k: v for k, v in encoders.inputs("bert").items() if k != "token_type_ids"}
    with torch.no_grad():
        want = theirs(**inputs).logits.numpy()
    assert np.abs(np.asarray(ours(**{k: jnp.asarray(v.numpy()) for k, v in inputs.items()})) - want).max() < TOLERANCE
    jaxft.save_model(ours, tmp_path / "ours")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert np.abs(again(**inputs).logits.numpy() - want).max() < 1e-6
