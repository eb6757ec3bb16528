"""What differs between the families: windows, biases, norms, bases of rotation, and what their configs may say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.models import FAMILIES, LlamaForCausalLM
from jaxft.models.attention import attend, causal_mask, slide
from jaxft.models.config import EVERYTHING
from jaxft.models.hub import abstract_model
from jaxft.models.names import variables
from jaxft.testing import tiny_model, token_batch
from jaxft.testing.tiny import LLAMA

FULL, SLIDING = "full_attention", "sliding_attention"


def config(model_type, **raw):
    return FAMILIES[model_type].config_class.from_raw({**LLAMA, "model_type": model_type, **raw})


def test_a_window_counts_the_query_itself():
    mask = slide(causal_mask(6), (EVERYTHING, 3), jnp.int32(1))[0, 0]
    assert mask.astype(int).sum(1).tolist() == [1, 2, 3, 3, 3, 3]
    assert mask[5].tolist() == [False, False, False, True, True, True]
    np.testing.assert_array_equal(slide(causal_mask(6), (EVERYTHING, 3), jnp.int32(0)), causal_mask(6))
    later = slide(jnp.ones((1, 1, 2, 6), bool), (3,), jnp.int32(0), start=3)[0, 0]
    assert later.astype(int).tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]


def test_a_token_reaches_as_far_as_layers_and_window():
    """Two layers with a window of 3: what stands 4 places back is still felt, what stands 5 back is not."""
    model, ids = tiny_model("mistral", sliding_window=3), token_batch()["input_ids"][:1]
    moved = jnp.abs(model(ids.at[:, 2].set(1)) - model(ids)).max(-1)[0]
    assert (moved[2:7] > 0).all() and not moved[7:].any() and not moved[:2].any()


def test_windows_by_layer():
    def windows(model_type, **raw):
        return config(model_type, num_hidden_layers=4, **raw).windows

    on = {"use_sliding_window": True, "sliding_window": 5}
    assert windows("mistral", sliding_window=None) == windows("qwen2") == windows("qwen2", sliding_window=5) == ()
    assert windows("mistral") == (4096,) * 4
    assert windows("qwen2", **on) == ()  # the first 28 layers see everything
    assert windows("qwen2", **on, max_window_layers=3) == (EVERYTHING,) * 3 + (5,)
    types = [SLIDING, FULL, FULL, SLIDING]
    assert windows("qwen3", **on, max_window_layers=3, layer_types=types) == (5, EVERYTHING, EVERYTHING, 5)
    assert windows("gemma2", sliding_window=5) == (5, EVERYTHING) * 2
    assert windows("gemma3_text", sliding_window=5, sliding_window_pattern=3) == (5, 5, EVERYTHING, 5)
    assert windows("gemma2", layer_types=[FULL] * 4) == ()


def test_depth_and_windows_do_not_grow_the_program():
    def size(layers):
        model = tiny_model("gemma3_text", num_hidden_layers=layers, sliding_window_pattern=2)
        return len(str(jax.make_jaxpr(lambda m: m.hidden(jnp.ones((1, 4), int)))(model)).splitlines())

    assert size(2) == size(7)


def test_the_scores_are_scaled_and_capped():
    q, k, v = (jnp.arange(12.0).reshape(1, 1, 3, 4) * x for x in (1, -0.5, 0.25))
    scores = np.asarray(q[0, 0] @ k[0, 0].T) * 0.3
    scores = np.where(np.tri(3), 2 * np.tanh(scores / 2), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    got = attend(q, k, v, causal_mask(3), scale=0.3, softcap=2.0)
    np.testing.assert_allclose(got[0, 0], weights @ np.asarray(v[0, 0]), atol=1e-6)


def test_gemma3_configs_from_before_transformers_5():
    scaling = {"rope_type": "linear", "factor": 8.0}
    before = {"rope_theta": 1e5, "rope_local_base_freq": 500.0, "rope_scaling": scaling}
    now = {SLIDING: {"rope_type": "default", "rope_theta": 500.0}, FULL: {**scaling, "rope_theta": 1e5}}
    old, new = (config("gemma3_text", **raw) for raw in (before, {"rope_parameters": now}))
    assert (old.rope, old.local_rope) == (new.rope, new.local_rope)
    assert (new.rope.theta, new.rope.factor, new.local_rope.theta) == (1e5, 8.0, 500.0)


REFUSED = {
    ("mistral", "sliding_window 0"): ({"sliding_window": 0}, "sliding_window is 0, but there are layers that slide"),
    ("mistral", "yarn"): ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope type 'yarn' is not supported"),
    ("qwen2", "few types"): ({"layer_types": [FULL]}, "layer_types has 1 entries for 2 layers"),
    ("qwen2", "windows off"): ({"layer_types": [FULL, SLIDING]}, "sliding_window is None, but there are layers"),
    ("qwen3", "chunks"): ({"layer_types": [FULL, "chunked"]}, "layer_types chunked are not supported; there are full"),
    ("qwen3", "act"): ({"hidden_act": "snake"}, "hidden_act 'snake' is not supported; there are silu"),
    ("qwen3", "ropes"): (
        {"rope_parameters": {FULL: {}}},
        "rope_parameters per kind of layer .* for model_type 'qwen3'",
    ),
    ("gemma2", "both ways"): ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supp"),
    ("gemma2", "act"): ({"hidden_activation": "snake"}, "hidden_activation 'snake' is not supported"),
    ("gemma2", "cap"): ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0; give a number above 0, or null"),
    ("gemma3_text", "cap"): ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported for"),
    ("gemma3_text", "rope"): ({"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters has rope_theta; for model_t"),
    ("gemma3_text", "yarn"): ({"rope_parameters": {SLIDING: {"rope_type": "yarn"}}}, "rope type 'yarn' is not supp"),
}


@pytest.mark.parametrize(("model_type", "what"), REFUSED)
def test_refused(model_type, what):
    raw, match = REFUSED[model_type, what]
    with pytest.raises(jaxft.CheckpointError, match=match):
        config(model_type, **raw)


@pytest.mark.parametrize("model_type", [m for m, f in FAMILIES.items() if issubclass(f, LlamaForCausalLM)])
def test_default_targets_are_the_peers(model_type):
    model = abstract_model(config(model_type))
    for method, want in (
        (jaxft.LoRA(r=2), {"q_proj", "v_proj"}),
        (
            jaxft.LoRA(r=2, target_modules="all-linear"),
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
    ):
        report = jaxft.parameter_report(model, method)
        assert {name.rsplit(".", 1)[-1] for name in report.modules} == want


def test_biases_of_each_family():
    biased = {"q_proj", "k_proj", "v_proj"}
    for model_type, raw, want in (
        ("qwen2", {}, biased),
        ("qwen3", {}, set()),
        ("qwen3", {"attention_bias": True}, {*biased, "o_proj"}),
        ("gemma2", {"attention_bias": True}, {*biased, "o_proj"}),
        ("mistral", {}, set()),
    ):
        paths = variables(abstract_model(config(model_type, **raw)))
        assert {path.split(".")[-2] for path in paths if path.endswith(".bias")} == want, model_type


def sizes(vocabulary, width, mlp, depth, heads, kv, **more):
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = (vocabulary, width, mlp, depth, heads)
    return {**dict(zip(keys, values, strict=True)), "num_key_value_heads": kv, **more}


RELEASED = {
    "Mistral 7B": ("mistral", sizes(32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Qwen2.5 0.5B": ("qwen2", sizes(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True), 494_032_768),
    "Qwen3 0.6B": ("qwen3", sizes(151936, 1024, 3072, 28, 16, 8, tie_word_embeddings=True), 596_049_920),
    "Gemma 2 2B": ("gemma2", sizes(256000, 2304, 9216, 26, 8, 4), 2_614_341_888),
    "Gemma 3 1B": ("gemma3_text", sizes(262144, 1152, 6912, 26, 4, 1), 999_885_952),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_number_of_parameters_of_released_models(name):
    model_type, raw, number = RELEASED[name]
    model = abstract_model(FAMILIES[model_type].config_class.from_raw(raw))
    assert sum(v.get_value().size for v in variables(model).values()) == number


def test_a_row_with_an_adapters_own_head_norms():
    """A copy of a norm over heads, mixed row by row, is the copy in one row and the base in another."""
    base = tiny_model("qwen3")
    state = jaxft.TrainState.create(base, jaxft.LoRA(r=2, modules_to_save=("q_norm",)), optax.sgd(1.0))
    batch = token_batch()
    state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, batch)
    ids = batch["input_ids"]
    both = jaxft.set_adapter(state.model, [[1], [0], [0]])(ids)
    np.testing.assert_allclose(both[0], state.model(ids)[0], atol=1e-6)
    np.testing.assert_allclose(both[1:], base(ids)[1:], atol=1e-6)
    assert jnp.abs(both[0] - base(ids)[0]).max() > 1e-5


def test_biases_that_a_family_cannot_write(tmp_path):
    """Created biases merge into any model; a folder can hold them where the family's config speaks of them."""

    def merged(model):
        return jaxft.merge(jaxft.attach(model, jaxft.BitFit(create=True)))

    llama = jaxft.save_model(merged(tiny_model("llama")), tmp_path / "llama")
    assert json.loads((llama / "config.json").read_text())["mlp_bias"] is True
    jaxft.load(llama)
    for model_type in ("mistral", "qwen2", "gemma2"):
        with pytest.raises(jaxft.MethodError, match=r"mlp.up_proj.bias is no tensor of a .* keep the adapter"):
            jaxft.save_model(merged(tiny_model(model_type)), tmp_path / model_type)
        assert not (tmp_path / model_type).exists()
