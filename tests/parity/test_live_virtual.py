"""Prefixes and prompts side by side with peft: what one writes the other reads, in every family, past its window."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
peers = pytest.importorskip("peers", reason="needs the [parity] extra")
torch = pytest.importorskip("torch")
peft, transformers = peers.peft, peers.transformers
families, peers_virtual, virtual = map(pytest.importorskip, ("families", "peers_virtual", "virtual"))

TRAINED = {
    "prefix": jaxft.PrefixTuning(4),
    "prefix-projected": jaxft.PrefixTuning(4, prefix_projection=True),
    "prompt": jaxft.PromptTuning(4),
    "p-mlp": jaxft.PTuning(4, encoder_hidden_size=8),
    "p-lstm": jaxft.PTuning(4, encoder="lstm", encoder_hidden_size=8, encoder_num_layers=1),
    "v2": jaxft.PTuningV2(4),
    "v2-transformer": jaxft.PTuningV2(4, encoder="transformer"),
}


@pytest.mark.parametrize(("base", "case"), [("llama", "projected"), ("gpt2", "lstm")])
def test_peft_to_us(base, case, tmp_path):
    """The same as the golden files, made now: forward pass, continuations, loss, every gradient."""
    model = peers.base_model(base)
    model.save_pretrained(tmp_path / "base")
    theirs, found = peers_virtual.computed(model, case)
    theirs.save_pretrained(tmp_path / "adapter")
    worst = virtual.check(jaxft.load(tmp_path / "base")[0], case, tmp_path / "adapter", found)
    print(f"{base} {case}: worst difference {worst:.1e}")


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("name", TRAINED)
def test_us_to_peft(base, name, tmp_path):
    """What jaxft trained and wrote, peft loads with the same logits, and writes again as it was."""
    made = peers.base_model(base)
    made.save_pretrained(tmp_path / "base")
    model, _ = jaxft.load(tmp_path / "base")
    state = jaxft.TrainState.create(model, TRAINED[name], optax.adamw(3e-2), seed=1)
    batch = {k: jnp.asarray(v) for k, v in virtual.rows().items()}
    state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, {**batch, "labels": batch["input_ids"]})
    jaxft.save_adapter(state, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(made, tmp_path / "ours").eval()
    ours, real = np.asarray(state.model(**batch)), virtual.rows()["attention_mask"][..., None]
    error = np.abs((ours - peers_virtual.logits(theirs, virtual.rows())) * real).max()
    print(f"{base} {name}: worst difference {error:.1e}")
    assert error < 1e-5 and np.abs(ours - model(**batch)).max() > 1e-2
    theirs.save_pretrained(tmp_path / "back")
    back = jaxft.load_adapter(model, tmp_path / "back")
    np.testing.assert_allclose(back(**batch), ours, atol=1e-5)


@pytest.mark.parametrize("case", ["prefix", "prompt"])
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_families(name, case, tmp_path):
    """Windows shorter than the rows, heads of another width, scaled embeddings, caps: each as peft has it.

    Rows that are padded left are compared where nothing slides: there peft counts the pads as places between, and
    what stands in padding should change nothing.
    """
    model = families.model(name)
    model.save_pretrained(tmp_path / "base")
    theirs = peers_virtual.adapted(model, case)
    theirs.save_pretrained(tmp_path / "adapter")
    batch = {k: v[:2] for k, v in families.padded().items()}
    want = peers_virtual.logits(theirs, batch)
    base = jaxft.load(tmp_path / "base")[0]
    ours = jaxft.load_adapter(base, tmp_path / "adapter")
    real = batch["attention_mask"][..., None]
    error, moved = (np.abs((np.asarray(m(**batch)) - want) * real).max() for m in (ours, base))
    print(f"{name} {case}: worst difference {error:.1e} of {np.abs(want).max():.1f}")
    assert error < 1e-5 * max(1, np.abs(want).max()) and moved > 1e-2


def test_the_transformer_of_p_tuning_v2_is_torch_s():
    """`TransformerEncoder` with the norm first, on the virtual tokens, then a linear layer."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 6, dropout=0.0, norm_first=True, batch_first=True)
    stack = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    last = torch.nn.Linear(16, 64)
    peers.roughen([*stack.parameters(), *last.parameters()], 0.1)
    method = jaxft.PTuningV2(5, encoder="transformer", encoder_hidden_size=6)
    module = jaxft.attach(jaxft.testing.tiny_llama(), method).past["default"]
    names = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "out.",
        "linear1.": "mlp.layers.0.",
        "linear2.": "mlp.layers.1.",
    }
    theirs = {f"encoder.blocks.{n.removeprefix('layers.')}": p for n, p in stack.named_parameters()}
    theirs |= {f"encoder.last.{n}": p for n, p in last.named_parameters()}
    leaves, seen = jaxft.models.names.variables(module), 0
    for name, p in theirs.items():
        for old, new in names.items():
            name = name.replace(old, new)
        name = name.replace("weight", "scale" if ".norm" in name else "kernel")
        value = p.detach().numpy()
        leaves[name].set_value(jnp.asarray(value.T if name.endswith("kernel") else value))
        seen += 1
    assert seen == len(leaves) - 1 == 2 * 12 + 2
    x = torch.tensor(np.asarray(module.vectors.get_value()))
    want = last(stack(x[None]))[0]
    np.testing.assert_allclose(module(jaxft.models.seams.Context(), 1)[0], want.detach().numpy(), atol=1e-5)


def test_first_values_are_drawn_as_the_reference_draws_them():
    """N(0, 1) vectors; the layers of the encoders uniform within the reference's bounds."""
    wide = {"hidden_size": 64, "num_hidden_layers": 2}
    for case, method in (("projected", jaxft.PrefixTuning), ("lstm", jaxft.PTuning)):
        kind, options, _ = virtual.CASES[case]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(peers.llama(**wide))
        config = getattr(peft, kind)(
            task_type="CAUSAL_LM", num_virtual_tokens=50, **{**options, "encoder_hidden_size": 40}
        )
        peer = peft.get_peft_model(model, config).prompt_encoder["default"]
        extra = {"prefix_projection": True} if case == "projected" else {"encoder": "lstm"}
        ours = jaxft.attach(jaxft.testing.tiny_llama(**wide), method(50, encoder_hidden_size=40, **extra))
        mine = jaxft.leaves(ours)
        theirs = virtual.ours(case, {n: p.detach().numpy() for n, p in peer.named_parameters()})
        for path, value in theirs.items():
            limit = 0.2 if value.size < 500 else 0.07
            assert abs(float(jnp.std(mine[path])) / value.std() - 1) < limit, path
        assert len(theirs) > 4 and jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, mine))
