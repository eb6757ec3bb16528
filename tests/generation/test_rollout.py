"""Answers drawn to a batch: what belongs to them, where they end, and that nothing is compiled again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.generation.rollout import draw_answers, stopping_of
from jaxft.generation.sampling import sample

PROMPTS = np.array([[0, 0, 5, 7], [3, 9, 4, 6], [0, 8, 8, 2]])
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


@pytest.fixture(scope="module")
def model():
    return jaxft.testing.tiny_llama()


def draw(model, *, stops=(1, 2, 3, 4, 5, 6, 7, 8), seed=0, ids=PROMPTS, mask=MASK, temperature=1.0, top_k=0, top_p=1.0):
    knobs = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    key, stopping = jax.random.key(seed), stopping_of(stops, 64)
    return draw_answers(model, jnp.asarray(ids), jnp.asarray(mask), stopping, key, *knobs, room=12)


def test_the_token_that_ends_an_answer_belongs_to_it(model):
    ended, whole = 0, 0
    for seed in range(4):
        drawn = jax.device_get(draw(model, seed=seed))
        assert (drawn.input_ids[:, :4] == PROMPTS).all()
        assert (drawn.attention_mask == np.concatenate([MASK, drawn.answer_mask], 1)).all()
        for row, real, end in zip(drawn.input_ids[:, 4:], drawn.answer_mask, drawn.ended, strict=True):
            n = int(real.sum())
            assert real[:n].all()
            stops = np.isin(row[:n], range(1, 9))
            assert stops.sum() == stops[-1] == end  # the last token ends it, and no other one
            assert (row[n:] == 0).all()
            assert end or n == 12
            ended, whole = ended + int(end), whole + int(not end)
    assert ended > 3
    assert whole > 0


def test_no_end_is_found_where_there_is_none(model):
    drawn = draw(model, stops=())
    assert not drawn.ended.any()
    assert drawn.lengths.tolist() == [12, 12, 12]


def test_an_answer_may_be_its_end_alone(model):
    drawn = draw(model, stops=range(64))
    assert drawn.lengths.tolist() == [1, 1, 1]
    assert drawn.ended.all()


def test_padding_changes_no_draw(model):
    wide = np.pad(PROMPTS, ((0, 0), (5, 0)), constant_values=63), np.pad(MASK, ((0, 0), (5, 0)))
    narrow, wide = draw(model), draw(model, ids=wide[0], mask=wide[1])
    assert (narrow.input_ids[:, 4:] == wide.input_ids[:, 9:]).all()


def test_other_values_compile_nothing(model):
    before = draw_answers._cache_size()
    draw(model)
    first = draw_answers._cache_size()
    for other in ({"seed": 3}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}, {"stops": ()}):
        draw(model, **other)
    assert draw_answers._cache_size() == first <= before + 1


def test_draws_from_all_tokens_are_those_of_the_filter():
    logits, key = jax.random.normal(jax.random.key(1), (5, 64)) * 2, jax.random.key(2)
    knobs = jnp.float32(0.7), jnp.int32(0), jnp.float32(1)
    nearly = sample(logits, key, jnp.float32(0.7), jnp.int32(64), jnp.float32(1))  # the filter lets all pass
    assert (sample(logits, key, *knobs) == nearly).all()
    assert (sample(logits, key, jnp.float32(0.7), jnp.int32(1), jnp.float32(1)) == logits.argmax(-1)).all()
