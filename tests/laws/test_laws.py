"""Every law over every method on Llama and GPT-2, and over some on the families that differ most from them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import loop

import jaxft
from jaxft.testing import LAWS, check_method, tiny_gpt2, tiny_llama, tiny_model, token_batch
from jaxft.testing.laws import TX, gradients
from jaxft.train.state import with_leaves

MODELS = {
    "llama": tiny_llama,
    "llama-tied": lambda **kw: tiny_llama(tie_word_embeddings=True, num_hidden_layers=3, **kw),
    "gpt2": tiny_gpt2,
    "qwen2": lambda **kw: tiny_model(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True, **kw
    ),
    "gemma3": lambda **kw: tiny_model("gemma3_text", sliding_window=4, sliding_window_pattern=2, **kw),
}
LORA_PATTERNS = {
    "r": 4,
    "target_modules": "all-linear",
    "exclude_modules": r".*(mlp\.c_proj|mlp\.down_proj)",
    "rank_pattern": {r"1\..*": 2},
    "alpha_pattern": {r"0\..*": 32},
    "use_rslora": True,
}
METHODS = {
    "full": lambda family: jaxft.Full(),
    "bitfit": lambda family: jaxft.BitFit(create=family != "gpt2"),
    "lora-all": lambda family: jaxft.LoRA(r=4, alpha=16, target_modules="all-linear", init="gaussian"),
    "lora-patterns": lambda family: jaxft.LoRA(**LORA_PATTERNS),
    "lora-layer": lambda family: jaxft.LoRA(
        r=3, target_modules=("c_attn",) if family == "gpt2" else ("q_proj", "up_proj"), layers=1
    ),
    "lora-head": lambda family: jaxft.LoRA(r=2, target_modules=("lm_head",)),
    "lora-saved": lambda family: jaxft.LoRA(
        r=2, modules_to_save=("lm_head", "wte", "ln_f") if family == "gpt2" else ("lm_head", "embed_tokens", "norm")
    ),
    "lora|bitfit": lambda family: jaxft.LoRA(r=2) | jaxft.BitFit(create=family != "gpt2"),
}
BIASES = {
    "lora-bias-all": lambda family: jaxft.LoRA(r=2, target_modules=("c_proj",), bias="all"),
    "lora-bias-only": lambda family: jaxft.LoRA(r=2, layers=0, target_modules=("c_attn",), bias="lora_only"),
}
CASES = [
    *itertools.product(["llama", "gpt2"], METHODS),
    *[("qwen2", "lora-all"), ("gemma3", "lora-saved")],
    *itertools.product(["llama-tied"], ["lora-head", "lora-saved"]),
    *itertools.product(["gpt2"], BIASES),
]
BOTH_WAYS = [("llama", "lora-patterns"), ("llama", "lora-layer"), ("llama-tied", "lora-saved")]
BOTH_WAYS += [
    ("gpt2", "lora-all"),
    ("gpt2", "lora-head"),
    ("gpt2", "bitfit"),
    ("qwen2", "lora-all"),
    ("gemma3", "full"),
]


def test_the_sweep_sees_every_method():
    assert len(CASES) == 2 * 8 + 2 + 2 + 2 and len(LAWS) == 9
    # the others are held to the laws in tests/methods: test_bottleneck.py, test_virtual.py, test_lowrank.py
    elsewhere = {jaxft.Adapter, jaxft.PrefixTuning, jaxft.PromptTuning, jaxft.PTuning, jaxft.PTuningV2, jaxft.IA3}
    here = {type(part) for m in METHODS.values() for part in getattr(m("gpt2"), "parts", (m("gpt2"),))}
    assert here | elsewhere == set(jaxft.methods.METHODS.values())


@pytest.mark.parametrize(("family", "method"), CASES)
def test_laws(family, method):
    check_method({**METHODS, **BIASES}[method](family), MODELS[family]())


@pytest.mark.parametrize(("family", "method"), BOTH_WAYS)
def test_remat_jit_and_loop_agree(family, method, monkeypatch):
    """Law 8: remat and none, jit and no jit, scan and the layers one by one: the same loss and gradients."""
    method = {**METHODS, **BIASES}[method](family)
    batch, loss = token_batch(), jaxft.losses.next_token_loss
    state, rematted = (jaxft.TrainState.create(MODELS[family](remat=remat), method, TX) for remat in ("none", "full"))
    moved = jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), state.trainable
    )
    state = state.replace(trainable=moved)
    rematted = rematted.replace(trainable=with_leaves(rematted.trainable, jaxft.leaves(moved)))
    want = gradients(state, batch, loss)

    others = {"remat": gradients(rematted, batch, loss)}
    monkeypatch.setattr(jax.lax, "scan", loop)
    with jax.disable_jit():
        others["loop, no jit"] = gradients(state, batch, loss)
    for how, got in others.items():
        assert got.keys() == want.keys()
        for path in want:
            atol = max(1e-5, 1e-6 * float(jnp.abs(want[path]).max()))  # rounding is of the largest numbers, up to 78
            np.testing.assert_allclose(got[path], want[path], atol=atol, rtol=1e-4, err_msg=f"{how}: {path}")


@pytest.mark.parametrize("family", MODELS)
def test_a_union_is_one_after_the_other(family):
    """Law 9: `a | b` trains exactly the union, and equals attaching a, then b."""
    a = jaxft.LoRA(r=2, target_modules=("c_attn",) if family == "gpt2" else ("q_proj",))
    b = jaxft.LoRA(r=3, target_modules=("c_fc",) if family == "gpt2" else ("up_proj",))
    union = jaxft.attach(MODELS[family](), a | b)
    apart = jaxft.attach(jaxft.attach(MODELS[family](), a, name="a"), b, name="b")
    paths = [
        {p.replace(".a.", ".default.").replace(".b.", ".default.") for p in jaxft.leaves(m)} for m in (union, apart)
    ]
    assert paths[0] == paths[1]
    trained = set(jaxft.leaves(jaxft.partition(union, a | b)[0]))
    assert trained == {p for m in (a, b) for p in jaxft.leaves(jaxft.partition(MODELS[family](), m)[0])}
    ids = token_batch()["input_ids"]
    assert jnp.array_equal(union(ids), apart(ids))


def test_a_union_that_does_not_add_up():
    with pytest.raises(jaxft.MethodError, match="claim `delta` of the same module"):
        jaxft.attach(tiny_llama(), jaxft.LoRA(r=2) | jaxft.LoRA(r=4))


class Leaky(jaxft.LoRA):
    """A method that trains what it does not say: the laws must see it."""

    def trains(self, path, variable, name):
        return super().trains(path, variable, name) or path.endswith("norm.scale")


class Loud(jaxft.LoRA):
    """A method that is not the base at step 0."""

    def fill(self, model, name, key):
        super().fill(model, name, key)
        delta = model.model.layers.self_attn.q_proj.delta[name]
        delta.b.set_value(delta.b.get_value() + 1)


class Dead(jaxft.LoRA):
    """A method with a leaf that never learns."""

    def fill(self, model, name, key):
        super().fill(model, name, key)
        delta = model.model.layers.self_attn.q_proj.delta[name]
        delta.gate.set_value(0 * delta.gate.get_value())


@pytest.mark.parametrize(("broken", "law"), [(Leaky(r=2), "count"), (Loud(r=2), "step_0"), (Dead(r=2), "gradients")])
def test_the_laws_can_fail(broken, law):
    with pytest.raises(AssertionError, match=law):
        check_method(broken, tiny_llama(), count=448)
