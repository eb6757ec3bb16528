"""What the losses over embeddings have in common: unit vectors, cosines, means over the rows that count."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import BatchError, MethodError, refuse

FLAT = ("labels", "scores", "mask")  # one number for each row
LOWEST = float(np.finfo(np.float32).min)  # the score of what is not in a softmax: finite, and its exp is 0


def unit(x: jax.Array) -> jax.Array:
    """Return `x / |x|` along the last axis, float32; a zero vector stays zero and has no gradient.

    >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    square = (x * x).sum(-1, keepdims=True)
    some = square > 0
    return jnp.where(some, x / jnp.sqrt(jnp.where(some, square, 1)), 0)


def cosines(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return the cosine of each row with its counterpart, 0 where one is a zero vector.

    Args:
        left: `[B, D]`.
        right: `[B, D]`.
    """
    return (unit(left) * unit(right)).sum(-1)


def products(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return the products of all rows of two arrays, `[b, D]` and `[N, D]`, in true float32: `[b, N]`."""
    return jnp.matmul(left, right.T, precision="highest")


def reduced(losses: jax.Array, counted: jax.Array, reduction: str) -> jax.Array:
    """Return losses `[B]` with zeros where a row does not count, or their mean over the rows that do (0 if none)."""
    losses = jnp.where(counted, losses, 0)
    return losses if reduction == "none" else losses.sum() / jnp.maximum(counted.sum(), 1)


def counted_rows(mask: jax.Array | None, *columns: jax.Array) -> tuple[jax.Array, ...]:
    """Return which rows count as bool `[B]`, and columns `[B, ...]` with zeros in those that do not.

    Args:
        mask: `[B]`, nonzero where a row counts; None: all do.
        columns: Arrays of B rows.
    """
    counted = jnp.ones(len(columns[0]), bool) if mask is None else mask != 0
    return counted, *(jnp.where(counted.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in columns)


def check_options(loss: str, *, reduction: str = "mean", temperature: Any = 1, margin: Any = 0) -> None:
    """Refuse options that cannot be; of a traced temperature only the shape is looked at."""
    problems = []
    if isinstance(temperature, (jax.Array, np.ndarray)):
        if temperature.ndim:
            problems.append(f"temperature is {list(temperature.shape)}: give a number or a scalar array")
    elif not _is_number(temperature) or not temperature > 0:
        problems.append(f"temperature={temperature!r}: give a number above 0")
    if not _is_number(margin) or not margin >= 0:
        problems.append(f"margin={margin!r}: give a number of at least 0")
    if reduction not in ("mean", "none"):
        problems.append(f"reduction={reduction!r}: choose 'mean' or 'none'")
    refuse(MethodError, f"{loss}: options that cannot be", problems)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, np.number)) and not isinstance(x, bool)


def check_vectors(loss: str, **arrays: jax.Array) -> None:
    """Refuse embeddings that are not `[rows, D]` of one D."""
    shapes = ", ".join(f"{name} is {list(x.shape)}" for name, x in arrays.items())
    if any(x.ndim != 2 for x in arrays.values()) or len({x.shape[-1] for x in arrays.values()}) > 1:
        raise BatchError(f"{loss} takes embeddings [rows, D] of one width D; {shapes}")


def check_rows(loss: str, rows: int, **arrays: jax.Array | None) -> None:
    """Refuse arrays that should have one number or vector for each of the rows, and have not."""
    refuse(
        BatchError,
        f"{loss}: {rows} rows of embeddings, but",
        [
            f"{name} is {list(x.shape)}"
            for name, x in arrays.items()
            if x is not None and (x.ndim == 0 or len(x) != rows or (name in FLAT and x.ndim > 1))
        ],
    )
