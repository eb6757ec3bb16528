"""What makes virtual tokens: their vectors, and the small networks that vectors may go through on their way.

Each network is called as `encoder(x, ctx)` on `[P, in]` and gives `[P, out]`. Their first values are drawn as PyTorch
draws those of the layers that the references are made of. Shapes: P virtual tokens, H hidden width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..models.layers import dropout
from ..models.seams import Context, Delta, lift

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


class Virtual(nnx.Module):
    """`dropout(encoder(vectors))`: what P virtual tokens are, or the keys and values that stand for them.

    Args:
        vectors: `[P, in]`, trained.
        encoder: Network from `in` to `out`; None: the vectors are it themselves.
        position_offset: Whether the positions of the tokens behind are shifted by P.
        rate: Dropout on what comes out, drawn for each row of a batch.
        number: Static number that the dropout key is folded with.
    """

    def __init__(
        self,
        vectors: jax.Array,
        encoder: nnx.Module | None = None,
        *,
        position_offset: bool = True,
        rate: float = 0.0,
        number: int = 0,
    ):
        self.vectors = Delta(vectors, axes=("virtual", "width"))
        self.encoder: Any = nnx.data(None) if encoder is None else encoder
        self.num_virtual_tokens, self.position_offset = len(vectors), position_offset
        self.rate, self.number = rate, number
        self.layers_held, self.computes = None, (position_offset,)  # what another method must agree on to take it up

    def __call__(self, ctx: Context, rows: int) -> jax.Array:
        """Return `[1, P, out]`, or `[B, P, out]` for the B `rows` of a batch where something is dropped."""
        key = ctx.key_for(self.number)
        if key is not None:
            ctx = ctx.replace(key=key)
        x = self.vectors.get_value()
        x = (x if self.encoder is None else self.encoder(x, ctx))[None]
        if key is None or self.rate == 0:
            return x
        return dropout(jnp.broadcast_to(x, (rows, *x.shape[1:])), self.rate, key)


class Dense(nnx.Module):
    """`x kernel + bias`, both drawn from U(-b, b), by default with `b = 1 / sqrt(in)`."""

    def __init__(self, width: int, out: int, key: jax.Array, bound: float | None = None):
        bound = width**-0.5 if bound is None else bound
        a, b = jax.random.split(key)
        self.kernel = Delta(jax.random.uniform(a, (width, out), minval=-bound, maxval=bound), axes=("width", "width"))
        self.bias = Delta(jax.random.uniform(b, (out,), minval=-bound, maxval=bound), axes=("width",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[P, in]` to `[P, out]`."""
        y = jnp.matmul(x, self.kernel.get_value(), precision="highest")
        return y + lift(self.bias.get_value(), y)


class MLP(nnx.Module):
    """Linear layers with an activation between them.

    Args:
        widths: Of the input, of what is between, of the output.
        activation: `"tanh"` or `"relu"`.
        key: Source of initial values.
    """

    def __init__(self, widths: Sequence[int], activation: str, key: jax.Array):
        pairs = enumerate(pairwise(widths))
        self.layers = nnx.List([Dense(*pair, jax.random.fold_in(key, i)) for i, pair in pairs])
        self.activation = activation

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[P, in]` to `[P, out]`."""
        del ctx
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](layer(x))
        return self.layers[-1](x)


class Direction(nnx.Module):
    """An LSTM that reads P vectors in one direction (Hochreiter and Schmidhuber 1997), with PyTorch's two biases."""

    def __init__(self, width: int, hidden: int, key: jax.Array):
        a, b = jax.random.split(key)
        self.input, self.recurrent = (Dense(n, 4 * hidden, k, hidden**-0.5) for n, k in ((width, a), (hidden, b)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[P, in]` to `[P, H]`."""

        def step(carry: tuple[jax.Array, jax.Array], driven: jax.Array) -> Any:
            h, c = carry
            gates = driven + self.recurrent(h)
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        driven = self.input(x)
        start = jnp.zeros((driven.shape[-1] // 4,), driven.dtype)
        return jax.lax.scan(step, (start, start), driven)[1]


class LSTM(nnx.Module):
    """LSTM layers that read in both directions, then `Linear - ReLU - Linear`: the encoder of P-tuning.

    Args:
        width: Of input and output.
        hidden: H, of each direction.
        layers: How many stand above each other.
        rate: Dropout between them.
        key: Source of initial values.
    """

    def __init__(self, width: int, hidden: int, layers: int, rate: float, key: jax.Array):
        inputs = [width, *[2 * hidden] * (layers - 1)]
        keys = jax.random.split(key, 2 * layers + 1)
        self.forward = nnx.List([Direction(n, hidden, keys[2 * i]) for i, n in enumerate(inputs)])
        self.backward = nnx.List([Direction(n, hidden, keys[2 * i + 1]) for i, n in enumerate(inputs)])
        self.head = MLP((2 * hidden, 2 * hidden, width), "relu", keys[-1])
        self.rate = rate

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[P, D]` to `[P, D]`."""
        for i, (forward, backward) in enumerate(zip(self.forward, self.backward, strict=True)):
            x = dropout(x, self.rate if i else 0.0, ctx.key_for(i))
            x = jnp.concatenate([forward(x), backward(x[::-1])[::-1]], -1)
        return self.head(x, ctx)


class Norm(nnx.Module):
    """Layer norm of P vectors."""

    def __init__(self, width: int):
        self.scale, self.bias = Delta(jnp.ones(width), axes=("width",)), Delta(jnp.zeros(width), axes=("width",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[P, in]` to `[P, in]`."""
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
        return x * lift(self.scale.get_value(), x) + lift(self.bias.get_value(), x)


class Block(nnx.Module):
    """Self-attention among the virtual tokens, all of which see each other, then an MLP; each normed before."""

    def __init__(self, width: int, heads: int, hidden: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.norm1, self.norm2, self.heads = Norm(width), Norm(width), heads
        self.qkv, self.out = Dense(width, 3 * width, keys[0]), Dense(width, width, keys[1])
        self.mlp = MLP((width, hidden, width), "relu", keys[2])

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[P, in]` to `[P, in]`."""
        parts = jnp.split(self.qkv(self.norm1(x)), 3, -1)
        q, k, v = (part.reshape(len(x), self.heads, -1).swapaxes(0, 1) for part in parts)
        scores = jnp.matmul(q, k.swapaxes(1, 2), precision="highest") * q.shape[-1] ** -0.5
        mixed = jnp.matmul(jax.nn.softmax(scores, -1), v, precision="highest")
        x = x + self.out(mixed.swapaxes(0, 1).reshape(x.shape))
        return x + self.mlp(self.norm2(x), ctx)


class Transformer(nnx.Module):
    """Blocks, then a linear layer to the output.

    Args:
        width: Of the input, and of the blocks.
        heads: Of each block's attention.
        hidden: Width of each block's MLP.
        layers: How many blocks.
        out: Width of the output.
        key: Source of initial values.
    """

    def __init__(self, width: int, heads: int, hidden: int, layers: int, out: int, key: jax.Array):
        keys = jax.random.split(key, layers + 1)
        self.blocks = nnx.List([Block(width, heads, hidden, k) for k in keys[:-1]])
        self.last = Dense(width, out, keys[-1])

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[P, in]` to `[P, out]`."""
        for block in self.blocks:
            x = block(x, ctx)
        return self.last(x)
