"""What holds of every encoder: padding, packing, remat, dropout, pooling, prompts, the table of positions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.models.pooling import POOLINGS, pool
from jaxft.testing import tiny_bert, token_batch

ROW = [5, 6, 7, 8, 9]


def test_a_row_is_the_same_alone_padded_left_right_and_packed():
    model = tiny_bert()
    alone = model([ROW])[0]
    right = model([[*ROW, 3, 3]], attention_mask=[[1] * 5 + [0] * 2])[0, :5]
    left = model([[3, 3, *ROW]], attention_mask=[[0] * 2 + [1] * 5])[0, 2:]
    packed = model([[4, 4, *ROW, 2]], segment_ids=[[1] * 2 + [2] * 5 + [0]])[0, 2:7]
    for other in (right, left, packed):
        np.testing.assert_allclose(other, alone, atol=1e-5)
    assert jnp.abs(model([[*ROW[:4], 10]])[0, 0] - alone[0]).max() > 1e-3, "a token does not see what stands behind it"


def test_what_stands_in_padding_stays_out_and_finite():
    model, batch = tiny_bert(), token_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    clean, dirty = (model.pooled(input_ids=x, attention_mask=mask) for x in (ids, jnp.where(mask == 0, 9, ids)))
    np.testing.assert_array_equal(clean, dirty)
    assert jnp.isfinite(model(ids, attention_mask=jnp.zeros_like(mask))).all()


def test_token_types_remat_and_dropout():
    model, ids = tiny_bert(hidden_dropout_prob=0.5), token_batch()["input_ids"]
    types = jnp.zeros_like(ids).at[:, 6:].set(1)
    plain = model(ids)
    assert jnp.array_equal(model(ids, token_type_ids=jnp.zeros_like(ids)), plain)
    assert jnp.abs(model(ids, token_type_ids=types) - plain).max() > 1e-3
    remat = tiny_bert(hidden_dropout_prob=0.5, remat="full")
    one, two = (m(ids, key=jax.random.key(1)) for m in (model, remat))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert jnp.abs(one - plain).max() > 0.1 and not jnp.array_equal(one, model(ids, key=jax.random.key(2)))


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_by_hand(mode):
    """Three real tokens, padded right, left and with NaN; a row without any; and its gradient."""
    real = np.array([[1.0, -8.0], [2.0, 4.0], [6.0, 1.0]])
    want = {
        "cls": real[0],
        "mean": real.mean(0),
        "max": [6, 4],
        "last": real[2],
        "mean_sqrt_len_tokens": real.sum(0) / np.sqrt(3),
        "weightedmean": (real * [[1], [2], [3]]).sum(0) / 6,
    }[mode]
    junk = np.full((2, 2), np.nan)
    hidden = jnp.asarray([[*real, *junk], [*junk, *real], [*junk, *junk, junk[0]]], jnp.float32)
    mask = jnp.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0] * 5])
    np.testing.assert_allclose(pool(hidden, mask, mode), [want, want, [0, 0]], atol=1e-6)
    gradient = jax.grad(lambda h: pool(h, mask, mode).sum())(hidden)
    assert jnp.isfinite(gradient).all() and not (gradient * (1 - mask[..., None])).any()
    assert gradient[:2].any()


def test_pooling_that_is_not_known():
    with pytest.raises(jaxft.MethodError, match="nearest: 'mean'"):
        pool(jnp.zeros((1, 2, 3)), None, "means")


def test_decoders_are_encoders_too():
    """A causal model's vector is its last real token's, padded left or right."""
    model = jaxft.testing.tiny_llama()
    ids, mask = jnp.array([[*ROW, 0, 0], [0, 0, *ROW]]), jnp.array([[1] * 5 + [0] * 2, [0] * 2 + [1] * 5])
    want = model.hidden(jnp.array([ROW]))[0, -1]
    np.testing.assert_allclose(model.pooled(input_ids=ids, attention_mask=mask), [want, want], atol=1e-5)
    with pytest.raises(jaxft.BatchError, match="a packed row holds several texts"):
        model.pooled(input_ids=ids, segment_ids=mask)


def test_a_text_longer_than_the_table():
    model = jaxft.attach(tiny_bert(max_position_embeddings=8), jaxft.PrefixTuning(num_virtual_tokens=2), name="a")
    model = jaxft.attach(model, jaxft.PromptTuning(num_virtual_tokens=3), name="b")
    assert model([[5, 6, 7]]).shape == (1, 3, 32)
    with pytest.raises(jaxft.BatchError, match="rows of 4 tokens: this model has 8 positions, of which virtual to.* 5"):
        model([[5, 6, 7, 8]])


def test_prompts_see_the_sequence_and_stand_first():
    """As the same vectors embedded before the words: seen, and seeing, with positions that count them."""
    method = jaxft.PromptTuning(num_virtual_tokens=2, init="text", init_ids=(3, 4))
    model = tiny_bert()
    prompted = jaxft.attach(model, method)
    want = model([[3, 4, *ROW, 9]], attention_mask=[[1] * 7 + [0]])[:, 2:]
    got = prompted([[*ROW, 9]], attention_mask=[[1] * 5 + [0]])
    np.testing.assert_allclose(got[:, :5], want[:, :5], atol=1e-5)
    twice = jaxft.set_adapter(prompted, jnp.array([[1.0], [0.0]]))  # rows with weights of their own
    ids = jnp.array([ROW, ROW])
    np.testing.assert_allclose(twice(ids), jnp.concatenate([got[:, :5], model(ids[:1])]), atol=1e-5)
    with pytest.raises(jaxft.BatchError, match="carry one packed text into another"):
        prompted(ids, segment_ids=jnp.ones_like(ids))


def test_old_names_and_another_heads_tensors(tmp_path):
    """gamma and beta, the backbone's name in front, a language model's head, no pooler."""
    model = tiny_bert()
    jaxft.save_model(model, tmp_path)
    tensors, old = load_file(tmp_path / "model.safetensors"), {}
    for name, value in tensors.items():
        if not name.startswith("pooler."):
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            old[f"bert.{name}"] = value
    old["bert.embeddings.position_ids"] = np.arange(64)[None]
    old["cls.predictions.bias"] = np.zeros(64, np.float32)
    save_file(old, tmp_path / "model.safetensors")
    again, _ = jaxft.load(tmp_path)
    assert again.pooler is None
    assert jnp.array_equal(again([ROW]), model([ROW]))
    jaxft.save_model(again, tmp_path / "again")
    written = load_file(tmp_path / "again/model.safetensors")
    assert written.keys() == {name for name in tensors if not name.startswith("pooler.")}
    del old["bert.encoder.layer.1.output.LayerNorm.beta"]
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(jaxft.CheckpointError, match=r"encoder\.layer\.1\.output\.LayerNorm\.bias is missing"):
        jaxft.load(tmp_path)


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}])
def test_on_a_mesh(mesh, tmp_path):
    model, ids = tiny_bert(), jnp.tile(token_batch()["input_ids"], (4, 1))[:8]
    jaxft.save_model(model, tmp_path)
    split, _ = jaxft.load(tmp_path, mesh=jaxft.make_mesh(**mesh))
    np.testing.assert_allclose(split(ids), model(ids), atol=1e-5)
    kernel = split.encoder.layer.attention.self.query.kernel.get_value()
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 16)
    chex.assert_shape(split.pooled(input_ids=ids), (8, 32))
