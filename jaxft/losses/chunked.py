"""Cross-entropy of a head, chunk by chunk over the positions: the logits `[B, T, V]` are not formed whole.

Each chunk's gradient is taken in the forward pass, while its logits are there, so that nothing is computed twice:
`4 T D V` operations with a frozen head and `6 T D V` with a trained one. The frozen head's gradient is never formed.
Shapes: B rows, T positions, V tokens of the vocabulary, D model width.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .entropy import IGNORED, cross_entropy

LOGITS = {"cpu": 2**22}  # numbers in the logits of one chunk on one device: what a cache holds of 16 MiB
ACCELERATOR = 2**24  # 64 MiB: a hundred tokens at the largest vocabularies, or matrix units would idle


def chunked_cross_entropy(
    model: Any, hidden: jax.Array, labels: jax.Array, *, key: jax.Array | None = None, chunk: int | None = None
) -> jax.Array:
    """Return `sum of -log softmax(model.head(hidden))[label]` over the labels that are not -100, chunk by chunk.

    The value and gradients of `cross_entropy(model.head(hidden), labels, reduction="sum")`; forward-mode
    differentiation is not defined. On a mesh a trained head takes all chunks as one for its gradient. Which dropout
    masks a head's own adapter draws follows the chunks, and so the devices.

    Args:
        model: A pytree with `head(hidden, *, key) -> logits`, which maps every position by itself.
        hidden: `[B, T, D]`.
        labels: `[B, T]` int; -100 is not trained. Not shifted: label t belongs to hidden state t.
        key: Dropout key of the head, of which each chunk gets its own; None: no dropout.
        chunk: Positions of each row in a chunk; by default as many as give 2^22 logits a device on a CPU, else 2^24.

    Returns:
        A float32 scalar, in nats.

    >>> import jaxft
    >>> model, hidden, labels = jaxft.testing.tiny_llama(), jnp.ones((2, 5, 32)), jnp.array([[1, 2, 3, 4, -100]] * 2)
    >>> whole = cross_entropy(model.head(hidden), labels, reduction="sum")
    >>> bool(jnp.allclose(chunked_cross_entropy(model, hidden, labels, chunk=2), whole))
    True
    """
    leaves, tree = jax.tree.flatten(model)

    def loss(head: dict[int, Any], key: jax.Array | None, index: Any, hidden: Any, labels: Any) -> jax.Array:
        whole = jax.tree.unflatten(tree, [head.get(i, leaf) for i, leaf in enumerate(leaves)])
        key = None if key is None else jax.random.fold_in(key, index)
        hidden = jnp.where((labels != IGNORED)[..., None], hidden, 0)
        return cross_entropy(whole.head(hidden, key=key), labels, reduction="sum")

    chunks = split_positions(model, hidden, labels, chunk)
    jaxpr = jax.make_jaxpr(loss)(dict(enumerate(leaves)), key, 0, *(x[0] for x in chunks)).jaxpr
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    head = {i: leaf for i, leaf in enumerate(leaves) if id(jaxpr.invars[i]) in read}
    spread = _mesh(model) is not None and _mesh(model).size > 1
    return _total(loss, spread, head, key, *chunks)


def chunked_figures(
    model: Any, hidden: jax.Array, labels: jax.Array, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the value of `chunked_cross_entropy`, and how many of the labels have the highest logit: to evaluate.

    Args:
        model: As there.
        hidden: `[B, T, D]`.
        labels: `[B, T]` int; -100 is not counted.
        key: As there.

    Returns:
        Two float32 scalars.

    >>> import jaxft
    >>> model, hidden = jaxft.testing.tiny_llama(), jnp.ones((1, 3, 32))
    >>> best = model.head(hidden).argmax(-1)
    >>> float(chunked_figures(model, hidden, best.at[0, 0].set(-100))[1])
    2.0
    """

    def figures(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, hidden, labels = chunk
        logits = model.head(hidden, key=None if key is None else jax.random.fold_in(key, index))
        right = (logits.argmax(-1) == labels) & (labels != IGNORED)
        return cross_entropy(logits, labels, reduction="sum"), right.sum().astype(jnp.float32)

    chunks = split_positions(model, hidden, labels, None)
    total, hits = jax.lax.map(figures, (jnp.arange(len(chunks[0])), *chunks))
    return total.sum(), hits.sum()


def split_positions(model: Any, hidden: jax.Array, labels: jax.Array, chunk: int | None) -> tuple[jax.Array, jax.Array]:
    """Return hidden states `[chunks, B, t, D]` and labels `[chunks, B, t]`, filled up with zeros and -100."""
    length = hidden.shape[1]
    if chunk is None:
        size = jax.eval_shape(lambda: model.head(hidden)).size
        chunk = max(1, length * _room(model) // size)
    number = -(-length // chunk)
    width = -(-length // number)

    def split(x: jax.Array, fill: int) -> jax.Array:
        spare = [(0, 0), (0, number * width - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, spare, constant_values=fill)
        return x.reshape(len(x), number, width, *x.shape[2:]).swapaxes(0, 1)

    return split(hidden, 0), split(labels, IGNORED)


def _room(model: Any) -> int:
    """Return how many logits a chunk may have, on all the devices of a model's mesh together."""
    mesh = _mesh(model)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return LOGITS.get(platform, ACCELERATOR) * (1 if mesh is None else mesh.size)


def _mesh(model: Any) -> Any:
    return getattr(getattr(model, "config", None), "mesh", None)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    loss: Any, spread: bool, head: dict[int, Any], key: jax.Array | None, hidden: jax.Array, labels: jax.Array
) -> jax.Array:
    """Add the losses of the chunks.

    Args:
        loss: Of one chunk.
        spread: Whether the rows lie on several devices: a trained head then takes all chunks as one, or the devices
            would add up its gradient, as large as the head, once a chunk.
        head: The leaves of the model that the head reads, by number.
        key: Dropout key.
        hidden: `[chunks, B, t, D]`.
        labels: `[chunks, B, t]`.
    """
    del spread  # the chunks make no difference to the value

    def add(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        return total + loss(head, key, *chunk), None

    return jax.lax.scan(add, jnp.float32(0), (jnp.arange(len(hidden)), hidden, labels))[0]


def _forward(loss: Any, spread: bool, head: dict[int, Any], *others: Any) -> tuple[jax.Array, Any]:
    """Differentiate each chunk by its hidden states and by the leaves of the head that are trained, and by no other."""
    trained = {i: leaf.value for i, leaf in head.items() if leaf.perturbed}
    values = {i: leaf.value for i, leaf in head.items()}
    key, hidden, labels = jax.tree.map(lambda x: x.value, others)
    number = len(hidden)
    if trained and spread:
        hidden, labels = (x.swapaxes(0, 1).reshape(1, x.shape[1], -1, *x.shape[3:]) for x in (hidden, labels))

    def one(trained: dict[int, jax.Array], hidden: jax.Array, index: jax.Array, labels: jax.Array) -> jax.Array:
        return loss({**values, **trained}, key, index, hidden, labels)

    def add(sums: Any, chunk: Any) -> tuple[Any, jax.Array]:
        index, hidden, labels = chunk
        value, (dhead, dhidden) = jax.value_and_grad(one, (0, 1))(trained, hidden, index, labels)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, (value, dhead)), dhidden

    zeros = jnp.float32(0), {i: jnp.zeros(x.shape, jnp.float32) for i, x in trained.items()}
    (total, dhead), dhidden = jax.lax.scan(add, zeros, (jnp.arange(len(hidden)), hidden, labels))
    if len(dhidden) < number:
        _, rows, length, width = dhidden.shape
        dhidden = dhidden.reshape(rows, number, length // number, width).swapaxes(0, 1)
    return total, ({i: dhead[i].astype(x.dtype) if i in dhead else None for i, x in values.items()}, dhidden)


def _backward(_: Any, __: bool, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    dhead, dhidden = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), saved)
    return dhead, None, dhidden, None


_total.defvjp(_forward, _backward, symbolic_zeros=True)
