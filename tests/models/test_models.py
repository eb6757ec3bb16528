"""What holds of every family: padding, packing, remat, dtypes, dropout, the cache, compile time."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.testing import tiny_gpt2, tiny_llama, tiny_model, token_batch

HALF = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}  # the second layer slides
MODELS = {
    "llama": tiny_llama,
    "llama-one-kv": lambda **kw: tiny_llama(num_key_value_heads=1, head_dim=12, attention_bias=True, **kw),
    "llama-tied": lambda **kw: tiny_llama(tie_word_embeddings=True, **kw),
    "qwen2": lambda **kw: tiny_model("qwen2", tie_word_embeddings=True, **HALF, **kw),
    "gemma2": lambda **kw: tiny_model("gemma2", sliding_window=4, head_dim=12, **kw),
    "gemma3": lambda **kw: tiny_model("gemma3_text", sliding_window=4, sliding_window_pattern=2, **kw),
    "gpt2": tiny_gpt2,
    "gpt2-untied": lambda **kw: tiny_gpt2(tie_word_embeddings=False, **kw),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@every_model
def test_call_is_hidden_then_head(make):
    model, ids = make(), token_batch()["input_ids"]
    hidden = model.hidden(ids)
    chex.assert_shape(hidden, (3, 12, 32))
    chex.assert_shape(model(ids), (3, 12, 64))
    np.testing.assert_allclose(model.head(hidden), model(ids), atol=1e-5)


@every_model
def test_a_row_is_the_same_alone_padded_left_right_and_packed(make):
    model, row = make(), [5, 6, 7, 8, 9]
    alone = model(jnp.array([row]))[0]
    right = model(jnp.array([[*row, 3, 3]]), attention_mask=jnp.array([[1] * 5 + [0] * 2]))[0, :5]
    left = model(jnp.array([[3, 3, *row]]), attention_mask=jnp.array([[0] * 2 + [1] * 5]))[0, 2:]
    packed = model(jnp.array([[4, 4, *row, 2]]), segment_ids=jnp.array([[1] * 2 + [2] * 5 + [0]]))[0, 2:7]
    for other in (right, left, packed):
        np.testing.assert_allclose(other, alone, atol=1e-5)


@every_model
def test_what_stands_in_padding_stays_out_and_finite(make):
    model, batch = make(), token_batch()
    mask = batch["attention_mask"]
    clean = model(batch["input_ids"], attention_mask=mask)
    dirty = model(jnp.where(mask == 0, 9, batch["input_ids"]), attention_mask=mask)
    np.testing.assert_array_equal(jnp.where(mask[..., None] == 0, 0, clean), jnp.where(mask[..., None] == 0, 0, dirty))
    assert jnp.isfinite(clean).all()
    nothing = model(batch["input_ids"], attention_mask=jnp.zeros_like(mask))
    assert jnp.isfinite(nothing).all()


@every_model
def test_a_token_sees_itself_and_what_stands_before_it(make):
    model, ids = make(), token_batch()["input_ids"]
    changed = model(ids.at[:, 6].set(1))
    np.testing.assert_allclose(changed[:, :6], model(ids)[:, :6], atol=1e-6)
    assert jnp.abs(changed[:, 6:] - model(ids)[:, 6:]).max(-1).min() > 0


@every_model
def test_reading_through_the_cache_is_reading_at_once(make):
    model, batch = make(), token_batch()
    ids, valid = batch["input_ids"], batch["attention_mask"].at[1].set(1) == 1
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    whole = model.hidden(ids, attention_mask=valid)
    cache, parts = model.empty_cache(3, 16), []
    for a, b in ((0, 5), (5, 6), (6, 12)):
        hidden, cache = model.decode(ids[:, a:b], valid[:, a:b], positions[:, a:b], cache)
        parts.append(hidden)
    got = jnp.concatenate(parts, 1)
    np.testing.assert_allclose(got * valid[..., None], whole * valid[..., None], atol=1e-5)
    assert int(cache.index) == 12


@every_model
def test_computed_in_bfloat16(make):
    ids = token_batch()["input_ids"]
    wide, narrow = make(), make(dtype=jnp.bfloat16)
    logits = narrow(ids)
    assert logits.dtype == jnp.bfloat16
    assert jnp.abs(logits.astype(jnp.float32) - wide(ids)).max() < 0.05 * jnp.abs(wide(ids)).max()


@every_model
def test_logical_axes_on_every_parameter(make):
    for path, leaf in jaxft.models.names.variables(make()).items():
        axes = leaf.get_metadata("axes")
        assert len(axes) == leaf.get_value().ndim, path
        assert (axes[0] == "layers") is (".layers." in path or ".h." in path), path


def test_dropout_comes_with_a_key():
    model, ids = tiny_gpt2(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1), token_batch()["input_ids"]
    off, a, b = model(ids), model(ids, key=jax.random.key(0)), model(ids, key=jax.random.key(1))
    np.testing.assert_array_equal(off, model(ids))
    np.testing.assert_array_equal(a, model(ids, key=jax.random.key(0)))
    assert (a != b).any() and (a != off).any()
    np.testing.assert_array_equal(tiny_gpt2()(ids), tiny_gpt2()(ids, key=jax.random.key(0)))


def test_layers_drop_out_differently():
    """Each layer of the scan has a key of its own."""
    ctx = jaxft.models.seams.Context(key=jax.random.key(0))
    masks = [
        jaxft.models.layers.dropout(jnp.ones(64), 0.5, ctx.at_layer(jnp.int32(i)).key_for(n))
        for i in (0, 1)
        for n in (0, 1)
    ]
    assert len({tuple(m.tolist()) for m in masks}) == 4
    assert all(set(m.tolist()) == {0.0, 2.0} for m in masks)


def test_too_long_for_the_position_table():
    with pytest.raises(jaxft.BatchError, match="rows of 129 tokens: this model has 128 positions"):
        tiny_gpt2()(jnp.ones((1, 129), int))


def test_tracing_does_not_grow_with_depth():
    def size(layers):
        model = tiny_llama(num_hidden_layers=layers)
        return len(str(jax.make_jaxpr(lambda m: m.hidden(jnp.ones((1, 4), int)))(model)).splitlines())

    assert size(2) == size(7)


def test_a_compiled_call_is_not_compiled_again():
    model, ids = tiny_llama(), token_batch()["input_ids"]
    model(ids)
    compiled = jaxft.models.causal._logits._cache_size()
    tiny_llama(seed=1)(ids + 1)
    assert jaxft.models.causal._logits._cache_size() == compiled
