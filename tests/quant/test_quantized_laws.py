"""Every law over methods beside quantised kernels: the base untouched to the bit, step 0 the dequantised base."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.quant import dequantize, quantize
from jaxft.testing import check_method, tiny_bert, tiny_gpt2, tiny_llama, tiny_model, token_batch
from jaxft.testing.laws import summed_loss

LLAMA = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks; the default's are flat
MODELS = {
    "llama": lambda: quantize(tiny_llama(**LLAMA), "nf4"),
    "llama-flat": lambda: quantize(tiny_llama(), "nf4"),
    "llama-int8": lambda: quantize(tiny_llama(), "int8"),
    "llama-remat": lambda: quantize(tiny_llama(**LLAMA, remat="full"), "nf4"),
    "llama-skip": lambda: quantize(tiny_llama(), "nf4", skip=["*.self_attn.*"]),
    "gpt2": lambda: quantize(tiny_gpt2(n_embd=64), "nf4"),
    "gemma3": lambda: quantize(tiny_model("gemma3_text", sliding_window=4, sliding_window_pattern=2), "nf4"),
}
EVERY = {"r": 4, "alpha": 16, "target_modules": "all-linear", "use_rslora": True}
METHODS = {
    "lora": (jaxft.LoRA(**EVERY), {}),
    "lora-patterns": (jaxft.LoRA(r=4, target_modules=["q_proj", "up_proj"], layers=1, rank_pattern={"q_proj": 2}), {}),
    "dora": (jaxft.LoRA(r=2, use_dora=True, dropout=0.1), {}),
    "pissa": (jaxft.LoRA(r=2, init="pissa"), {}),
    "saved": (jaxft.LoRA(r=2, modules_to_save=("lm_head", "norm"), trainable_tokens=(3, 5)), {}),
    "adapter": (jaxft.Adapter(reduction_factor=8), {}),
    "houlsby": (jaxft.Adapter(kind="houlsby", reduction_factor=8), {}),
    "prefix": (jaxft.PrefixTuning(num_virtual_tokens=3), {"identity": False}),
    "prompt": (jaxft.PromptTuning(num_virtual_tokens=3), {"identity": False}),
    "ia3": (jaxft.IA3(), {}),
    "lora|bitfit": (jaxft.LoRA(r=2) | jaxft.BitFit(create=True), {}),
}
CASES = [("llama", name) for name in METHODS]
CASES += [("llama-flat", "lora"), ("llama-int8", "lora"), ("llama-int8", "dora"), ("llama-remat", "dora")]
CASES += [("llama-skip", "lora"), ("gpt2", "lora"), ("gemma3", "lora")]
QUICK = [("llama", "lora"), ("llama-int8", "dora")]


@pytest.mark.parametrize(
    ("family", "method"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_laws_beside_quantised_kernels(family, method):
    method, declared = METHODS[method]
    check_method(method, MODELS[family](), **declared)


@pytest.mark.parametrize("family", MODELS)
def test_step_0_is_the_dequantised_base(family):
    model = MODELS[family]()
    batch = token_batch(64)
    adapted = jaxft.attach(model, jaxft.LoRA(r=2, target_modules="all-linear"))
    small, whole = (float(summed_loss(jaxft.losses.next_token_loss, m, batch)) for m in (adapted, dequantize(model)))
    assert small == pytest.approx(whole, rel=1e-6)


def test_rows_of_a_batch_may_differ_in_their_adapters():
    model = quantize(tiny_bert(hidden_size=64, intermediate_size=128))
    for seed, name in enumerate(("one", "two")):
        model = jaxft.attach(model, jaxft.LoRA(r=2, init="pissa", target_modules=["query"]), name=name, seed=seed)
    ids = jnp.array([[5, 6, 7], [8, 9, 4]])
    both = jaxft.set_adapter(model, jnp.eye(2))(ids)
    for i, name in enumerate(("one", "two")):
        np.testing.assert_allclose(both[i], jaxft.set_adapter(model, name)(ids)[i], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (jaxft.Full(), "Full would train quantised kernels.*jaxft.LoRA"),
        (jaxft.LoRA(modules_to_save=("q_proj",), target_modules=["v_proj"]), "q_proj has a quantised kernel.*skip"),
        (jaxft.LoRA() | jaxft.Full(), r"LoRA \| Full would train quantised kernels"),
    ],
)
def test_what_would_train_codes_is_refused(method, said):
    with pytest.raises(jaxft.MethodError, match=f"(?s){said}"):
        jaxft.partition(MODELS["llama-flat"](), method)
    with pytest.raises(jaxft.MethodError):
        jaxft.trainable_mask(MODELS["llama-flat"](), method)


def test_what_is_skipped_can_be_copied_whole():
    model = quantize(tiny_llama(), skip=["q_proj"])
    trainable, _ = jaxft.partition(model, jaxft.LoRA(modules_to_save=("q_proj",), target_modules=["v_proj"]))
    assert "model.layers.self_attn.q_proj.saved.default.kernel" in jaxft.leaves(trainable)


def test_biases_of_the_base_can_be_trained():
    trainable, frozen = jaxft.partition(quantize(tiny_gpt2()), jaxft.BitFit())
    assert {path.rsplit(".", 1)[-1] for path in jaxft.leaves(trainable)} == {"bias"}
    assert type(jaxft.leaves(frozen)["transformer.h.attn.c_attn.kernel"]).__name__ == "NF4"
