"""What does not add up is refused wherever it would count, by name, and changes nothing."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxft
from jaxft.testing import tiny_gpt2, tiny_llama, token_batch

IDS = token_batch()["input_ids"]
COPY = jaxft.LoRA(r=2, modules_to_save=("lm_head",))


def test_a_second_copy_is_refused_where_the_first_counts():
    first = jaxft.attach(tiny_llama(), COPY, name="a")
    for make in (jaxft.attach, lambda m, method, name: jaxft.TrainState.create(m, method, optax.sgd(1.0), name=name)):
        with pytest.raises(jaxft.MethodError, match="'a' and 'b' each have a copy of lm_head.kernel"):
            make(first, COPY, name="b")
    second = jaxft.attach(jaxft.set_adapter(first, None), COPY, name="b")
    assert second.adapter_weights.get_value().tolist() == [0, 1]
    with pytest.raises(jaxft.MethodError, match="do not stack"):
        jaxft.set_adapter(second, {"a": 1, "b": 1})
    jaxft.set_adapter(second, [[1, 0], [0, 1]])  # in different rows they may


def test_loading_combining_and_taking_up_beside_a_copy_that_counts(tmp_path):
    first = jaxft.attach(tiny_llama(), COPY, name="a")
    both = jaxft.load_adapter(first, jaxft.save_adapter(first, tmp_path, name="a"), name="b")
    assert both.adapter_weights.get_value().tolist() == [1, 0]
    again = jaxft.TrainState.create(
        both, jaxft.LoRA(r=2, dropout=0.1, modules_to_save=("lm_head",)), optax.sgd(1.0), name="a"
    )
    assert list(jaxft.adapters(again.frozen)) == ["a", "b"]  # in the order that they had
    assert again.model.adapter_weights.get_value().tolist() == [1, 0]
    assert list(jaxft.adapters(jaxft.average_adapters(both, ["a", "b"], name="c"))) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: jaxft.attach(tiny_llama(), jaxft.LoRA(modules_to_save=("embed_tokens",), trainable_tokens=(1, 2))),
            "a copy of model.embed_tokens.embedding, and 'default' a TokenRows",
        ),
        (
            lambda: jaxft.attach(
                tiny_llama(),
                jaxft.LoRA(target_modules=("q_proj",), modules_to_save=("v_proj",))
                | jaxft.LoRA(use_dora=True, target_modules=("v_proj",)),
            ),
            "v_proj.kernel, and 'default' a DoRA",
        ),
        (
            lambda: jaxft.partition(tiny_gpt2(), jaxft.LoRA(use_dora=True, target_modules=("lm_head",)) | jaxft.Full()),
            "a DoRA has the norm: transformer.wte.embedding",
        ),
        (lambda: jaxft.attach(tiny_llama(), jaxft.LoRA(r=2), name="items"), "adapter name 'items'"),
        (lambda: jaxft.merge(jax.eval_shape(lambda: jaxft.attach(tiny_llama(), jaxft.LoRA(r=2)))), "shapes for arrays"),
    ],
)
def test_what_does_not_add_up(make, match):
    with pytest.raises(jaxft.MethodError, match=match):
        make()


def test_scales_that_act_on_each_other_are_not_merged_at_once():
    other = jaxft.IA3(target_modules=("down_proj",), feedforward_modules=())
    model = jaxft.attach(jaxft.attach(tiny_llama(), jaxft.IA3(), name="a"), other, name="b")
    for undo in (jaxft.merge, jaxft.unmerge):
        with pytest.raises(jaxft.MethodError, match=r"down_proj has the InputScale of 'a', the Scale of 'b'"):
            undo(model)
    plain = jaxft.merge(
        jaxft.attach(jaxft.set_adapter(model, "a"), jaxft.LoRA(r=2, target_modules=("down_proj",)), name="c")
    )
    np.testing.assert_allclose(plain(IDS), tiny_llama()(IDS), atol=1e-6)


def test_a_prefix_of_another_position_convention_is_not_taken_up():
    model = jaxft.attach(tiny_llama(), jaxft.PrefixTuning(3, position_offset=False))
    with pytest.raises(jaxft.MethodError, match="past.default: computes"):
        jaxft.TrainState.create(model, jaxft.PrefixTuning(3), optax.sgd(1.0))


def test_a_module_of_ones_own_under_a_slot_s_name():
    class Mine(nnx.Module):
        def __init__(self, rngs):
            self.prompt, self.out = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    with pytest.raises(jaxft.MethodError, match="prompt: give it another name"):
        jaxft.attach(Mine(nnx.Rngs(0)), jaxft.LoRA(r=2, target_modules="all-linear"))
