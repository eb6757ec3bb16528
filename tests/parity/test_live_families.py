"""Every family and transformers side by side: logits, gradients, text, and folders in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_golden_families import compare

import jaxft
from jaxft.models.seams import Context

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
families = pytest.importorskip("families", reason="needs the [parity] extra")
torch = pytest.importorskip("torch")
peers = families.peers
every_case = pytest.mark.parametrize("name", families.CASES)


@every_case
def test_there_and_back(name, tmp_path):
    """The peer's folder computes the same here, and ours holds the same tensors there."""
    theirs = families.model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = jaxft.load(tmp_path / "theirs")
    compare(ours, families.expected(theirs))
    jaxft.save_model(ours, tmp_path / "ours")
    again = peers.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again).__name__ == type(ours).__name__
    assert theirs.state_dict().keys() == again.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@every_case
def test_gradients(name, tmp_path):
    """The gradients of every A and B of LoRA on all linear layers, its adapter read from the peer's folder.

    They reach 1.5, and the peer's own are up to 8e-6 away from what it computes in float64.
    """
    base = families.model(name)
    base.save_pretrained(tmp_path / "base")
    config = peers.peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")
    theirs = peers.peft.get_peft_model(base, config)
    peers.roughen([p for n, p in sorted(theirs.named_parameters()) if "lora_" in n], 0.1)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    batch = {k: torch.tensor(v) for k, v in families.padded().items()}
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[2, 5] = -100  # a first token that transformers would predict from padding
    theirs(**batch, labels=labels).loss.backward()
    model = jaxft.load_adapter(jaxft.load(tmp_path / "base")[0], tmp_path / "adapter")
    state = jaxft.TrainState.create(model, None, optax.sgd(1.0))
    before, seen = jaxft.leaves(jax.tree.map(jnp.copy, state.trainable)), 0
    inputs = {k: jnp.asarray(v) for k, v in families.padded().items()}
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    state, _ = step(state, {**inputs, "labels": jnp.asarray(labels.numpy())})
    after = jaxft.leaves(state.trainable)
    for key, p in theirs.named_parameters():
        if p.grad is None:
            continue
        layer, _, rest = key.removeprefix("base_model.model.model.layers.").partition(".")
        module, _, which = rest.partition(".lora_")
        path = f"model.layers.{module}.delta.default.{which[0].lower()}"
        ours = (before[path] - after[path])[int(layer)].T
        assert 1e-3 < np.abs(ours).max() < 2, key
        np.testing.assert_allclose(ours, p.grad.numpy(), atol=1e-5, rtol=1e-4, err_msg=key)
        seen += 1
    assert seen == 2 * 2 * 7


@every_case
def test_greedy_text(name, tmp_path):
    """Unequal prompts, continued past the window as transformers continues each of them alone."""
    theirs = families.model(name)
    theirs.save_pretrained(tmp_path)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [11], [12, 13, 14]]
    ours = jaxft.generate_ids(jaxft.load(tmp_path)[0], prompts, max_new_tokens=20, stop_ids=[])
    for prompt, row in zip(prompts, ours, strict=True):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert row == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_the_scaled_embedding_in_bfloat16(name, tmp_path):
    """sqrt(D) is rounded to bfloat16 before it multiplies: bit for bit the peer's."""
    theirs = families.model(name, hidden_size=24).bfloat16()  # the root of 16 has nothing to round
    theirs.save_pretrained(tmp_path)
    ours, _ = jaxft.load(tmp_path)
    ids = families.padded()["input_ids"]
    want = theirs.model.embed_tokens(torch.tensor(ids)).detach().float().numpy()
    np.testing.assert_array_equal(ours.model.embed(jnp.asarray(ids), Context()).astype(jnp.float32), want)
