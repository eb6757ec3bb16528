"""IA3, DoRA, PiSSA, LoRA on embeddings and trainable token rows: laws, formulas, merging, what is refused."""

import jax
import numpy as np
import pytest

import jaxft
from jaxft.models.names import variables
from jaxft.testing import check_method, tiny_gpt2, tiny_llama, token_batch

IDS = token_batch()["input_ids"]
EMBEDDING_AND_ROWS = jaxft.LoRA(r=2, target_modules=("wte",), trainable_tokens={"wpe": (3, 1)})
LAWS = {  # method, model, trained parameters by the closed formula
    "ia3-llama": (jaxft.IA3(), tiny_llama, 2 * (16 + 16 + 48)),
    "ia3-gpt2": (jaxft.IA3(), tiny_gpt2, 2 * (3 * 32 + 4 * 32)),
    "dora-llama": (jaxft.LoRA(r=2, use_dora=True), tiny_llama, 448 + 2 * (32 + 16)),
    "dora-gpt2": (jaxft.LoRA(r=2, use_dora=True), tiny_gpt2, 2 * (2 * (32 + 96) + 96)),
    "pissa-llama": (jaxft.LoRA(r=2, init="pissa"), tiny_llama, 448),
    "pissa-gpt2": (jaxft.LoRA(r=2, init="pissa", rank_pattern={"h.1.attn.c_attn": 1}), tiny_gpt2, 3 * (32 + 96)),
    "rows-llama": (
        jaxft.LoRA(r=2, trainable_tokens=(7, 3, 20)),
        lambda: tiny_llama(tie_word_embeddings=True),
        448 + 3 * 32,
    ),
    "embedding-and-rows-gpt2": (EMBEDDING_AND_ROWS, tiny_gpt2, 2 * (64 + 32) + 2 * 32),
}


@pytest.mark.parametrize("case", LAWS)
def test_laws(case):
    method, make, count = LAWS[case]
    check_method(method, make(), count=count)


def moved(model, method, name="default", by=0.1):
    """The model with the adapter attached, its trained leaves moved away from where they begin."""
    attached = jaxft.attach(model, method, name=name)
    trained = set(jaxft.leaves(jaxft.partition(attached, method, name=name)[0]))
    for i, (path, variable) in enumerate(sorted(variables(attached).items())):
        if path in trained:
            value = variable.get_value()
            variable.set_value(value + by * jax.random.normal(jax.random.key(i), value.shape))
    return attached


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)
