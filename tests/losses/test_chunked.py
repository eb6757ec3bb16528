"""Cross-entropy in chunks equals the whole logits' at every seam of the head, and forms nothing for what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxft
from jaxft.losses import chunked, chunked_cross_entropy, cross_entropy, next_token_loss
from jaxft.losses.language import predicted
from jaxft.models.layers import Linear
from jaxft.models.llama import LlamaForCausalLM
from jaxft.testing import tiny_gpt2, tiny_llama
from jaxft.testing.laws import _products, token_batch
from jaxft.train.step import with_leaves

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 12, 32, 64


@pytest.fixture
def small(monkeypatch):
    """Chunks of four positions of the twelve: five were asked for, and chunks are of one width."""
    monkeypatch.setitem(chunked.LOGITS, "cpu", 5 * ROWS * VOCABULARY)


class Capped(LlamaForCausalLM):
    """A head of one's own: a bias and capped logits."""

    def head(self, hidden, *, key=None):
        logits = super().head(hidden, key=key)
        return 3 * jnp.tanh(logits / 3)


def capped():
    model = Capped(tiny_llama().config, rngs=nnx.Rngs(0))
    axes = ("embed", "vocab")
    model.lm_head = Linear(WIDTH, VOCABULARY, axes=axes, use_bias=True, rngs=nnx.Rngs(1))
    model.lm_head.bias.set_value(jnp.linspace(-2, 2, VOCABULARY))
    return model


def tied(**raw):
    return tiny_llama(tie_word_embeddings=True, **raw)


def per_row():
    """Two adapters on the head, counting differently in each row."""
    model = tiny_llama()
    for name in ("a", "b"):
        model = jaxft.attach(model, jaxft.LoRA(r=2, target_modules=("lm_head", "v_proj")), name=name)
    return jaxft.set_adapter(model, jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0]]))


HEAD = jaxft.LoRA(r=2, target_modules=("q_proj", "lm_head"))
SAVED = jaxft.LoRA(r=2, modules_to_save=("lm_head",))
CASES = {
    "frozen": (tiny_llama, jaxft.LoRA(r=2), "default"),
    "frozen-tied": (tied, jaxft.LoRA(r=2), "default"),
    "frozen-gpt2": (tiny_gpt2, jaxft.LoRA(r=2), "default"),
    "trained": (tiny_llama, jaxft.Full(), "default"),
    "trained-tied": (tied, jaxft.Full(), "default"),
    "lora": (tiny_llama, HEAD, "default"),
    "lora-tied": (tied, HEAD, "default"),
    "saved": (tiny_llama, SAVED, "default"),
    "saved-tied": (tied, SAVED, "default"),
    "biased-capped-frozen": (capped, jaxft.LoRA(r=2), "default"),
    "biased-capped-trained": (capped, jaxft.Full(), "default"),
    "bias-alone": (capped, jaxft.BitFit(), "default"),
    "per-row": (per_row, None, "b"),
}


HIDDEN = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH))
LABELS = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, VOCABULARY).at[0, :5].set(-100).at[2, -1].set(-100)


def whole(model, hidden, labels, *, key=None):
    """The formula: all logits at once."""
    return cross_entropy(model.head(hidden, key=key), labels, reduction="sum")


def parts_of(model, method, name):
    """The two parts, the trained one away from its start, where half of LoRA has no gradient."""
    trainable, frozen = jaxft.partition(model, method, name=name)
    params = {
        path: v + 0.1 * jax.random.normal(jax.random.key(i), v.shape)
        for i, (path, v) in enumerate(jaxft.leaves(trainable).items())
    }
    return params, lambda params: jaxft.combine(with_leaves(trainable, params), frozen)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_whole(case, small):
    make, method, name = case
    params, model_of = parts_of(make(), method, name)

    def differentiated(loss):
        f = lambda params, hidden: loss(model_of(params), hidden, LABELS)
        return jax.jit(jax.value_and_grad(f, (0, 1)))

    (value, (grads, dhidden)) = differentiated(chunked_cross_entropy)(params, HIDDEN)
    (want, (wanted, dwanted)) = differentiated(whole)(params, HIDDEN)
    assert "while" in differentiated(chunked_cross_entropy).lower(params, HIDDEN).as_text()
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(dhidden, dwanted, atol=1e-6)
    moved = {path for path in wanted if bool((wanted[path] != 0).any())}
    assert bool(moved) is ("frozen" not in name_of(case)), moved
    for path in wanted:
        size = max(float(jnp.abs(wanted[path]).max()), 1)
        np.testing.assert_allclose(grads[path], wanted[path], atol=1e-6 * size, err_msg=path)


def name_of(case):
    return next(name for name, known in CASES.items() if known is case)


@pytest.mark.parametrize("make", [tiny_llama, tied])
def test_the_model_loss_is_the_formula(make, small):
    """Through the layers too: under Full a tied table is trained by the head and by the look-up."""
    params, model_of = parts_of(make(num_hidden_layers=1), jaxft.Full(), "default")
    batch = token_batch()

    def formula(params):
        model = model_of(params)
        logits = model.head(model.hidden(batch["input_ids"], batch["attention_mask"])[:, :-1])
        labels = jnp.where(predicted(batch), batch["labels"][:, 1:], -100)
        return cross_entropy(logits, labels, reduction="sum")

    got = jax.jit(jax.value_and_grad(lambda params: next_token_loss(model_of(params), batch)[0]))(params)
    want = jax.jit(jax.value_and_grad(formula))(params)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for path, wanted in want[1].items():
        size = max(float(jnp.abs(wanted).max()), 1)
        np.testing.assert_allclose(got[1][path], wanted, atol=1e-6 * size, err_msg=path)


@pytest.mark.parametrize("chunk", [1, 5, 7, 100])
def test_any_chunk(chunk):
    model, hidden, labels = tiny_llama(), HIDDEN[:2, :7], LABELS[:2, 3:10]
    f = jax.jit(jax.value_and_grad(lambda hidden: 2 * chunked_cross_entropy(model, hidden, labels, chunk=chunk)))
    want = jax.value_and_grad(lambda hidden: 2 * whole(model, hidden, labels))(hidden)
    for a, b in zip(f(hidden), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_differentiated_from_outside(wrap, small):
    """What the head reads reaches the rule through jit and checkpoint, a key and a stacked adapter with it."""
    params, model_of = parts_of(tiny_llama(), jaxft.LoRA(r=2, dropout=0.5, target_modules=("lm_head",)), "default")
    f = wrap(lambda params, key: chunked_cross_entropy(model_of(params), HIDDEN, LABELS, key=key))
    plain = lambda params, key: chunked_cross_entropy(model_of(params), HIDDEN, LABELS, key=key)
    got, want = (jax.grad(g)(params, jax.random.key(0)) for g in (f, jax.jit(plain)))
    for path in want:
        assert bool((want[path] != 0).any())
        np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_an_unused_loss_has_no_gradient():
    model, hidden, labels = tiny_llama(), jnp.ones((1, 3, WIDTH)), jnp.array([[1, 2, 3]])
    unused = jax.grad(lambda hidden: (chunked_cross_entropy(model, hidden, labels), hidden.sum())[1])(hidden)
    np.testing.assert_array_equal(unused, 1)


@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf])
def test_junk_at_ignored_labels_changes_nothing(junk):
    hidden = jax.random.normal(jax.random.key(0), (2, 5, WIDTH))
    labels = jnp.array([[1, -100, 2, 3, -100], [-100, -100, 4, 5, 6]])
    dirty = jnp.where((labels == -100)[..., None], junk, hidden)
    f = jax.value_and_grad(lambda m, h: chunked_cross_entropy(m, h, labels, chunk=2), (0, 1))
    got, want = f(tiny_llama(), dirty), f(tiny_llama(), hidden)
    assert bool(jnp.abs(want[1][1]).sum() > 0)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_dropout_on_the_head_differs_from_chunk_to_chunk():
    model = tiny_llama()
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=2, dropout=0.5, target_modules=("lm_head",)), optax.sgd(0.1))
    trained = jax.tree.map(lambda v: v + 0.3, state.trainable)
    model = jaxft.combine(trained, state.frozen)
    hidden, labels = jnp.ones((1, 2, WIDTH)), jnp.array([[1, 1]])
    f = jax.grad(lambda h, key: chunked_cross_entropy(model, h, labels, key=key, chunk=1))
    one, two = f(hidden, jax.random.key(0))[0]
    assert bool((one != two).any()), "both chunks dropped the same"
    np.testing.assert_array_equal(f(hidden, jax.random.key(0)), f(hidden, jax.random.key(0)))
    one, two = f(hidden, None)[0]
    np.testing.assert_array_equal(one, two)


def largest(jaxpr):
    """Size of the largest array that a jaxpr makes, in its loops too."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [v.aval.size for v in eqn.outvars if hasattr(v.aval, "size")]
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            sizes += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(sizes)


def differentiated(make, method, loss=next_token_loss):
    params, model_of = parts_of(make(), method, "default")
    batch = token_batch()
    return jax.make_jaxpr(jax.value_and_grad(lambda params: loss(model_of(params), batch)[0]))(params).jaxpr


def test_no_array_is_larger_than_a_chunk_of_logits(monkeypatch):
    vocabulary = 1000
    monkeypatch.setitem(chunked.LOGITS, "cpu", 2 * ROWS * vocabulary + 1)
    make = lambda: tiny_llama(vocab_size=vocabulary)
    assert largest(differentiated(make, jaxft.LoRA(r=2))) == 2 * ROWS * vocabulary
    monkeypatch.setitem(chunked.LOGITS, "cpu", 2**22)
    assert largest(differentiated(make, jaxft.LoRA(r=2))) == LENGTH * ROWS * vocabulary


@pytest.mark.parametrize("make", [tiny_llama, tied])
@pytest.mark.parametrize("method", [jaxft.LoRA(r=2), jaxft.Full()])
def test_only_a_trained_head_has_its_product(make, method, small):
    shapes = _products(differentiated(make, method))
    found = [shape for shape in shapes if shape in ((WIDTH, VOCABULARY), (VOCABULARY, WIDTH))]
    assert len(found) == isinstance(method, jaxft.Full)
    logits = [shape for shape in shapes if shape[-1] == VOCABULARY and shape not in found]
    assert logits == [(4 * ROWS, VOCABULARY)], "the logits are computed twice, or not by chunks"
