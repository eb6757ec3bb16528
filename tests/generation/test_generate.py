"""Generation: each row as it would continue alone, stop tokens, sampling on renormalised probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.generation.generate import decode_loop
from jaxft.generation.sampling import filter_logits, sample
from jaxft.testing import ToyTokenizer, tiny_gpt2, tiny_llama, tiny_model, token_batch

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
MODELS = {
    "llama": lambda: tiny_llama(seed=1),
    "gpt2": lambda: tiny_gpt2(seed=1),
    "mistral": lambda: tiny_model("mistral", seed=1, sliding_window=3),
    "gemma3": lambda: tiny_model("gemma3_text", seed=1, sliding_window=3, sliding_window_pattern=2),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def one_by_one(model, prompt, n):
    """Greedy, the whole text read again for every token."""
    text = list(prompt)
    for _ in range(n):
        padded = jnp.array([text + [0] * (24 - len(text))])
        text.append(int(model(padded)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@every_model
def test_greedy_is_the_likeliest_token_each_time(make):
    model = make()
    got = jaxft.generate_ids(model, PROMPTS, max_new_tokens=9)
    assert got == [one_by_one(model, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(row) for row in got}) == 3


@every_model
def test_a_row_is_continued_as_alone(make):
    model = make()
    together = jaxft.generate_ids(model, PROMPTS, max_new_tokens=9)
    assert together == [jaxft.generate_ids(model, [prompt], max_new_tokens=9)[0] for prompt in PROMPTS]


def test_a_row_that_stops_leaves_the_others_going():
    model = tiny_llama(seed=1)
    free = jaxft.generate_ids(model, PROMPTS, max_new_tokens=9)
    stop = free[1][4]
    stopped = jaxft.generate_ids(model, PROMPTS, max_new_tokens=9, stop_ids=[stop])
    for row, whole in zip(stopped, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(stopped[1]) <= 4 and max(map(len, stopped)) > 4


def test_stop_tokens_of_config_and_tokenizer():
    model, tokenizer = tiny_llama(seed=1), ToyTokenizer()
    ids = tokenizer("abc")["input_ids"]
    free = jaxft.generate_ids(model, [ids], max_new_tokens=8, stop_ids=[])[0]
    for source in ("config", "tokenizer"):
        stop = free[3]
        if source == "config":
            model.config = model.config.replace(stop_ids=(stop,))
            tokenizer.eos_token_id = None
        else:
            model.config = model.config.replace(stop_ids=())
            tokenizer.eos_token_id = stop
        text = jaxft.generate(model, tokenizer, "abc", max_new_tokens=8)
        assert text == [tokenizer.decode(free[: free.index(stop)])], source


def test_compiled_once_for_a_bucket():
    model = tiny_llama(seed=1)
    jaxft.generate_ids(model, PROMPTS, max_new_tokens=3)
    compiled = decode_loop._cache_size()
    jaxft.generate_ids(model, [[1] * 20, [2, 3], [4]], max_new_tokens=17, stop_ids=[3])
    adapted = jaxft.attach(model, jaxft.LoRA(r=2))
    assert decode_loop._cache_size() == compiled
    jaxft.generate_ids(adapted, PROMPTS, max_new_tokens=3)
    jaxft.generate_ids(jaxft.set_adapter(adapted, None), PROMPTS, max_new_tokens=3)
    assert decode_loop._cache_size() == compiled + 1


def test_adapters_take_part():
    base = tiny_llama(seed=1)
    state = jaxft.TrainState.create(base, jaxft.LoRA(r=4), optax.sgd(3.0))
    state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, token_batch())
    with_it, without = (jaxft.generate_ids(m, PROMPTS, max_new_tokens=9) for m in (state.model, base))
    assert with_it != without
    assert jaxft.generate_ids(jaxft.set_adapter(state.model, None), PROMPTS, max_new_tokens=9) == without
    rows = jaxft.generate_ids(jaxft.set_adapter(state.model, [[1.0], [0.0], [1.0]]), PROMPTS, max_new_tokens=9)
    assert rows == [with_it[0], without[1], with_it[2]]


def test_drawn_tokens_are_seeded_and_differ():
    model = tiny_llama(seed=1)
    a, b, c = (jaxft.generate_ids(model, [[5, 6]] * 2, max_new_tokens=12, temperature=1.0, seed=s) for s in (0, 0, 1))
    assert a == b and a != c and a[0] != a[1]
    greedy = jaxft.generate_ids(model, [[5, 6]], max_new_tokens=12)[0]
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert jaxft.generate_ids(model, [[5, 6]], max_new_tokens=12, **{"temperature": 1.0, **options})[0] == greedy


def knobs(temperature=1.0, top_k=0, top_p=1.0):
    return jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.3}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),  # of 4/9, 3/9, 2/9: the first holds less than a half
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),  # of 4/7, 3/7 the first is enough
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 99}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 1e-9, "top_k": 1}, [1, 0, 0, 0]),
    ],
)
def test_filtering_by_hand(options, want):
    """Temperature, top-k, top-p in that order, each on what the one before left, renormalised."""
    shuffled = jnp.log(jnp.array([[0.2, 0.4, 0.1, 0.3]]))
    got = jax.nn.softmax(filter_logits(shuffled, *knobs(**options)))[0]
    np.testing.assert_allclose(got[jnp.array([1, 3, 0, 2])], want, atol=1e-6)


def test_draws_follow_the_probabilities():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.2])), (4000, 3))
    drawn = sample(logits, jax.random.key(0), *knobs(top_k=2))
    np.testing.assert_allclose(jnp.bincount(drawn, length=3) / 4000, [5 / 8, 3 / 8, 0], atol=0.03)


def test_ties_keep_exactly_k():
    assert jnp.isfinite(filter_logits(jnp.zeros((1, 5)), *knobs(top_k=2))).sum() == 2


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        ([], {}, "no prompt was given"),
        ([[1], []], {}, r"prompts \[1\] have no token"),
        ([[64]], {}, r"token ids \[64\] are outside the vocabulary of 64"),
        ([1, 2], {}, "rows of whole numbers"),
        ([[1.5]], {}, "rows of whole numbers"),
        ([[1]], {"max_new_tokens": None}, "max_new_tokens=None"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"top_k": -2}, "top_k=-2"),
        ([[1] * 100], {"max_new_tokens": 29}, "a prompt of 100 tokens and 29 new ones: this model has 128 positions"),
    ],
)
def test_what_cannot_be_served(prompts, options, match):
    with pytest.raises(jaxft.GenerationError, match=match):
        jaxft.generate_ids(tiny_gpt2(), prompts, **options)


def test_up_to_the_last_position():
    row = jaxft.generate_ids(tiny_gpt2(seed=1), [[1] * 100], max_new_tokens=28)[0]
    assert len(row) == 28


def test_text_needs_a_tokenizer():
    with pytest.raises(jaxft.GenerationError, match="give a tokenizer"):
        jaxft.generate(tiny_llama(), None, ["a"])
