"""Log-probabilities of tokens equal those of the whole logits, with their gradients, wherever the model lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_chunked import largest, parts_of

import jaxft
from jaxft.losses import chunked, token_log_probs
from jaxft.losses.language import predicted
from jaxft.models.hub import fresh_model
from jaxft.testing import tiny_bert, tiny_gpt2, tiny_llama, token_batch

ROWS, LENGTH, VOCABULARY = 3, 12, 64
SLOW = pytest.mark.slow
BATCH = {name: x for name, x in token_batch().items() if name != "labels"}
WEIGHTS = jax.random.normal(jax.random.key(3), (2, ROWS, LENGTH - 1))


compiled = jax.jit(token_log_probs, static_argnames=("entropy", "last", "chunk"))


def llama(**raw):
    return tiny_llama(num_hidden_layers=1, **raw)


@pytest.fixture
def small(monkeypatch):
    """Chunks of four positions of the eleven, the last one filled up."""
    monkeypatch.setitem(chunked.LOGITS, "cpu", 4 * ROWS * VOCABULARY)


def whole(model, batch, temperature=1.0):
    """The formula: all logits at once."""
    logits = model(**batch)[:, :-1] / temperature
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, batch["input_ids"][:, 1:, None], -1)[..., 0]
    return tuple(jnp.where(predicted(batch), x, 0) for x in (picked, -(jnp.exp(log_p) * log_p).sum(-1)))


CASES = [
    pytest.param(
        lambda: llama(tie_word_embeddings=True), jaxft.LoRA(r=2, target_modules=("q_proj", "lm_head")), id="head"
    ),
    pytest.param(llama, jaxft.Full(), id="full"),
    pytest.param(llama, jaxft.LoRA(r=2), id="lora", marks=SLOW),
    pytest.param(lambda: tiny_gpt2(n_layer=1), jaxft.BitFit(), id="biases", marks=SLOW),
]


@pytest.mark.parametrize(("make", "method"), CASES)
def test_equals_the_whole(make, method, small):
    params, model_of = parts_of(make(), method, "default")

    def differentiated(f):
        def total(params):
            made = f(model_of(params))
            return sum((w * x).sum() for w, x in zip(WEIGHTS, made, strict=True)), made

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    ours = differentiated(lambda model: token_log_probs(model, BATCH, temperature=0.7, entropy=True))
    (_, got), grads = ours(params)
    (_, want), wanted = differentiated(lambda model: whole(model, BATCH, 0.7))(params)
    assert "while" in ours.lower(params).as_text()
    for a, b in zip(got, want, strict=True):
        assert a.shape == (ROWS, LENGTH - 1) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert len(wanted) > 1
    for path, b in wanted.items():
        size = max(float(jnp.abs(b).max()), 1)
        np.testing.assert_allclose(grads[path], b, atol=2e-6 * size, err_msg=path)


@pytest.mark.parametrize(("last", "chunk"), [(1, 1), (5, 3), (11, 1), (11, 100)])
def test_the_last_places_alone(last, chunk):
    model = llama()
    got = compiled(model, BATCH, last=last, chunk=chunk, entropy=True)
    for a, b in zip(got, jax.jit(whole)(model, BATCH), strict=True):
        np.testing.assert_allclose(a, b[:, -last:], atol=1e-6)


def test_the_head_runs_on_the_last_places_alone():
    model = llama(vocab_size=1000)
    f = lambda model: token_log_probs(model, BATCH, last=2)
    assert largest(jax.make_jaxpr(f)(model).jaxpr) == 2 * ROWS * 1000


def test_no_array_is_larger_than_a_chunk_of_logits(monkeypatch):
    vocabulary = 1000
    params, model_of = parts_of(llama(vocab_size=vocabulary), jaxft.LoRA(r=2), "default")
    f = jax.value_and_grad(lambda params: sum(x.sum() for x in token_log_probs(model_of(params), BATCH, entropy=True)))
    monkeypatch.setitem(chunked.LOGITS, "cpu", 3 * ROWS * vocabulary + 1)
    assert largest(jax.make_jaxpr(f)(params).jaxpr) == 3 * ROWS * vocabulary


def test_padding_and_borders_are_zero_and_do_not_matter():
    """A row alone, padded left or right, and behind another in one row."""
    model = llama()
    alone = compiled(model, {"input_ids": jnp.array([[5, 6, 7]])})[0]
    padded = {
        "input_ids": jnp.array([[5, 6, 7, 9, 9], [9, 9, 5, 6, 7]]),
        "attention_mask": jnp.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]),
    }
    got = compiled(model, padded, entropy=True)
    np.testing.assert_allclose(got[0], [[*alone, 0, 0], [0, 0, *alone]], atol=1e-6)
    assert np.array_equal(got[1] != 0, got[0] != 0)
    packed = {"input_ids": jnp.array([[8, 4, 5, 6, 7, 0]]), "segment_ids": jnp.array([[1, 1, 2, 2, 2, 0]])}
    np.testing.assert_allclose(compiled(model, packed)[0, 1:], [0, *alone, 0], atol=1e-6)


def test_what_padding_holds_changes_no_gradient():
    params, model_of = parts_of(llama(), jaxft.LoRA(r=2), "default")
    mask = jnp.array([[1, 1, 1, 1, 0, 0]])
    f = jax.jit(jax.grad(lambda p, ids: token_log_probs(model_of(p), {"input_ids": ids, "attention_mask": mask}).sum()))
    one, other = (f(params, jnp.array([[5, 6, 7, 8, *pad]])) for pad in ((0, 0), (63, 9)))
    assert all((one[path] != 0).any() for path in one)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_two_policies_at_once_are_each_alone():
    """As actor and reference are: two trained parts over one frozen part."""
    model = llama()
    trainable, frozen = jaxft.partition(model, jaxft.LoRA(r=2))
    first, second = (jax.tree.map(lambda x, k=k: x + 0.1 * k, trainable) for k in (1, 2))
    f = jax.jit(lambda part: token_log_probs(jaxft.combine(part, frozen), BATCH, last=6, entropy=True))
    both = jax.jit(jax.vmap(f))(jax.tree.map(lambda *x: jnp.stack(x), first, second))
    for k, part in enumerate((first, second)):
        for a, b in zip(both, f(part), strict=True):
            np.testing.assert_allclose(a[k], b, atol=2e-6)
    assert not np.allclose(both[0][0], both[0][1], atol=1e-2)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, pytest.param({"data": 1, "fsdp": 8}, marks=SLOW)])
def test_eight_devices_are_one(axes, small):
    batch = {name: jnp.concatenate([x, x[::-1], x[:2]]) for name, x in BATCH.items()}
    config = llama().config

    def results(mesh):
        params, model_of = parts_of(fresh_model(config.replace(mesh=mesh)), jaxft.Full(), "default")
        weights = jnp.concatenate([*WEIGHTS, WEIGHTS[0, :2]])
        f = lambda params: (weights * token_log_probs(model_of(params), batch)).sum()
        return jax.jit(jax.value_and_grad(f))(params)

    got, want = results(jaxft.make_mesh(**axes)), results(None)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for path, b in want[1].items():
        np.testing.assert_allclose(got[1][path], b, atol=1e-5 * max(float(jnp.abs(b).max()), 1), err_msg=path)


def test_low_precision_and_cold_sampling():
    """Logits of bfloat16 are divided and summed in float32, and a temperature near 0 gives finite numbers."""
    model = llama(dtype=jnp.bfloat16)
    logits = model(**BATCH)[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits / 0.3), BATCH["input_ids"][:, 1:, None], -1)[..., 0]
    got = compiled(model, BATCH, temperature=0.3)
    np.testing.assert_allclose(got, jnp.where(predicted(BATCH), picked, 0), atol=2e-2)  # two programs, in bfloat16
    f = jax.value_and_grad(lambda t: sum(x.sum() for x in compiled(model, BATCH, temperature=t, entropy=True)))
    assert all(np.isfinite(x) for x in f(1e-6))


def test_a_key_is_dropout():
    """Of the head, whose chunks draw each for itself: in a row of one token all places are alike without it."""
    params, model_of = parts_of(llama(), jaxft.LoRA(r=2, dropout=0.5, target_modules=("lm_head",)), "default")
    model, batch = model_of(params), {"input_ids": jnp.full((1, 4), 7)}
    one, again, other = (compiled(model, batch, key=jax.random.key(k), chunk=1)[0] for k in (0, 0, 1))
    assert np.array_equal(one, again) and (one != other).all()
    assert len(np.unique(one)) == 3
    np.testing.assert_allclose(
        compiled(model, batch, chunk=1)[0], compiled(model, batch)[0, 0] * jnp.ones(3), atol=1e-5
    )


def test_what_cannot_be():
    with pytest.raises(jaxft.BatchError, match="needs input_ids"):
        token_log_probs(llama(), {"labels": jnp.ones((1, 2))})
    with pytest.raises(jaxft.BatchError, match="a BertModel predicts no next token"):
        token_log_probs(tiny_bert(), BATCH)
    with pytest.raises(jaxft.BatchError, match="12 tokens have 11 places .*; last=12"):
        token_log_probs(llama(), BATCH, last=12)
    with pytest.raises(jaxft.BatchError, match="1 tokens have 0 places"):
        token_log_probs(llama(), {"input_ids": jnp.ones((2, 1), int)})
