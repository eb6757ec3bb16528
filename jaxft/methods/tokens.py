"""Trainable token rows: an adapter's own vectors for a few tokens, new ones say."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import MethodError, SelectionError
from ..models.layers import Embed
from ..models.names import named_modules
from ..models.seams import Context, Delta
from ..parallel.rules import constrain
from .low_rank import narrow_product, per_row
from .matching import check_names, named
from .method import hang


class TokenRows(nnx.Module):
    """Own rows of a table `[V, D]` for the tokens given; a tied output head has them too, as in peft.

    Args:
        tokens: Ids of the tokens.
        table: The base's table; its rows are the initial ones.
    """

    reversible = False  # merged, the base's own rows are gone
    reads = "embedding"  # whose rows it replaces
    layers_held = None

    def __init__(self, tokens: tuple[int, ...], table: jax.Array):
        self.tokens = tokens
        self.rows = Delta(table[np.array(tokens),].astype(jnp.float32), axes=(None, "embed"))

    def changes(self, table: jax.Array) -> jax.Array:
        """Return how much the rows differ from the base's, `[n, D]` in float32."""
        return self.rows.get_value() - table[np.array(self.tokens),].astype(jnp.float32)

    def __call__(self, embed: Any, x: jax.Array, y: jax.Array, ctx: Context, weight: jax.Array) -> jax.Array:
        """Return what the rows add to the vectors `[B, T, D]` of the ids `[B, T]`."""
        order = np.argsort(self.tokens)
        known = jnp.asarray(np.array(self.tokens)[order])
        place = jnp.minimum(jnp.searchsorted(known, x), len(order) - 1)
        changes = constrain(self.changes(embed.embedding.get_value()), ctx.mesh, None, None)  # few: each device has all
        added = constrain(changes[order,][place], ctx.mesh, "batch", None, None)
        return per_row(weight, y) * jnp.where((known[place] == x)[..., None], added, 0)

    def at_head(self, embed: Any, x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
        """Return the logits `[B, T, V]` of a tied head that reads `[B, T, D]`, with those of the tokens changed."""
        added = narrow_product(x, self.changes(embed.embedding.get_value()).T)
        return y.at[..., np.array(self.tokens)].add((per_row(weight, y) * added).astype(y.dtype))

    def kernel_change(self, kernel: jax.Array) -> jax.Array:
        """Return what the rows add to the table, `[V, D]` in float32."""
        return jnp.zeros(kernel.shape).at[np.array(self.tokens),].set(self.changes(kernel))


Tokens = tuple[int, ...] | tuple[tuple[str, tuple[int, ...]], ...]


def frozen_tokens(value: Any) -> Any:
    """Return `trainable_tokens` as it is kept in a (hashable) method: ids, or pairs of a module's name and ids."""
    given = frozen_ids(value.items() if isinstance(value, Mapping) else () if value is None else value)
    return tuple((module, frozen_ids(ids)) for module, ids in given) if _are_pairs(given) else given


def frozen_ids(value: Any) -> Any:
    """Return ids as a tuple of Python's own numbers; what is no row of values as it is, to be refused."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Iterable) or isinstance(value, (str, Mapping)):
        return value
    return tuple(one.tolist() if hasattr(one, "tolist") else one for one in value)


def are_ids(value: Any) -> bool:
    """Tell whether a value that `frozen_ids` returned is ids of tokens, none perhaps."""
    return isinstance(value, tuple) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


def _are_pairs(value: Any) -> bool:
    def pair(one: Any) -> bool:
        return isinstance(one, (tuple, list)) and len(one) == 2 and isinstance(one[0], str)

    return isinstance(value, tuple) and all(map(pair, value))


def by_name(value: Any) -> dict[str | None, tuple[int, ...]]:
    """Return the ids by module, None standing for the input embedding."""
    return dict(value) if _are_pairs(value) else {None: value}


def token_problems(value: Any) -> Iterable[str]:
    """Yield what is wrong with `trainable_tokens`."""
    for ids in by_name(value).values():
        if not ids or not are_ids(ids):
            yield f"trainable_tokens={value!r}: give ids of tokens, or {{name of an embedding: ids}}"
        elif len(set(ids)) < len(ids):
            yield f"trainable_tokens: {sorted(i for i in set(ids) if ids.count(i) > 1)} stand there more than once"


def hang_tokens(model: Any, value: Tokens, name: str) -> None:
    """Hang own rows at every embedding that is meant.

    Raises:
        MethodError: A token that the table does not have, or a model without an input embedding.
        SelectionError: A name that is no embedding of the model.
    """
    tables = [n for n in named_modules(model) if isinstance(n.module, Embed)]
    for end, ids in by_name(value).items():
        if end is not None:
            check_names(model, "trainable_tokens", (end,), lambda m: isinstance(m, Embed), "embedding")
            meant = [n.module for n in tables if named(n.path, (end,))]
        elif hasattr(model, "backbone"):
            meant = [model.backbone.input_embedding()]
        else:
            raise SelectionError(f"trainable_tokens: this {type(model).__name__} names no input embedding")
        for module in meant:
            table = module.embedding.get_value()
            beyond = [i for i in ids if i >= table.shape[0]]
            if beyond:
                raise MethodError(f"trainable_tokens={beyond}: the table has {table.shape[0]} rows, from 0 on")
            hang(module, "delta", name, TokenRows(ids, table))
