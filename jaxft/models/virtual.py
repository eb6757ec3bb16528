"""What adapters put before the sequence: prefixes (the slot `past`) and virtual tokens (the slot `prompt`).

Both become one `Past`: the keys and values that every layer's attention finds before those of the sequence. A virtual
token sees nothing of the rows that it stands before, so all of them are read through the layers once for a batch, and
again for each row only where rows have adapter weights of their own. A packed row shows them to each of its segments.
(In an encoder it sees the whole row, and is read with it: `encoder.Encoder`.)

A prefix is called as `module(ctx, rows) -> [R, P, 2 L K E]`, numbers in peft's order (layer l's keys, then its
values); a prompt likewise gives `[1, P, D]`, vectors that stand beside embedded tokens. Both have `num_virtual_tokens`,
and prefixes `position_offset`, whether they shift the positions of the tokens behind them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..parallel.rules import constrain
from .cache import Kept
from .seams import Context, Past, number

VIRTUAL = number("virtual tokens")


def begin(model: Any, rows: int, key: jax.Array | None) -> Past | None:
    """Return what stands before the sequences of a batch: the prefixes, then the prompts, in the order of their names.

    Args:
        model: A causal language model.
        rows: B, the rows of the batch.
        key: Dropout key; None: no dropout.

    Returns:
        Prefixes and virtual tokens, as weighted by the adapters' weights (below 0 counts as 0); None where no adapter
        has any.
    """
    key = None if key is None else jax.random.fold_in(key, VIRTUAL)
    past = None if model.past is None else prefixes(model, model.context(rows, key), rows)
    return past if model.prompt is None else after(past, read(model, model.context(rows, key, past=past)))


def behind(past: Past | None, ctx: Context, positions: jax.Array) -> Context:
    """Return the context of tokens that stand behind virtual ones, given their positions `[B, T]` without these."""
    return ctx.replace(past=past, positions=positions if past is None else positions + past.offset)


def room(model: Any) -> int:
    """Return how many positions the prefixes and prompts that a model carries can take, all of them active."""
    prefixes = [module for module in (model.past or {}).values() if module.position_offset]
    return sum(module.num_virtual_tokens for module in (*prefixes, *(model.prompt or {}).values()))


def weights(slot: Any, ctx: Context) -> jax.Array:
    """Return `[R, 1, P]`, the weight of every place that a slot's modules make."""
    each = [(ctx.weight(name), module.num_virtual_tokens) for name, module in slot.items()]
    spread = [jnp.broadcast_to(w.reshape(-1, 1, 1), (w.size, 1, places)) for w, places in each]
    return jnp.maximum(jnp.concatenate(spread, -1).astype(jnp.float32), 0)


def prefixes(model: Any, ctx: Context, rows: int) -> Past:
    """Return the prefixes of a model's slot `past`."""
    c, made, shifts = model.config, [], []
    for module in model.past.values():
        numbers = module(ctx, rows).astype(c.dtype)
        shape = (len(numbers), -1, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
        made.append(numbers.reshape(shape).transpose(3, 2, 0, 4, 1, 5))
        shifts += [module.position_offset] * module.num_virtual_tokens
    k, v = constrain(_beside(made, 4), ctx.mesh, None, None, "batch", "kv_heads", None, None)
    weight = weights(model.past, ctx)
    offset = ((weight > 0) & jnp.array(shifts)[None, None]).sum(-1, dtype=jnp.int32)
    return Past(k, v, weight, offset, sum(shifts))


def read(model: Any, ctx: Context) -> Past:
    """Return the keys and values of the virtual tokens of a model's slot `prompt`, read behind `ctx.past`."""
    vectors = jnp.concatenate([module(ctx, 1) for module in model.prompt.values()], 1).astype(model.dtype)
    weight = weights(model.prompt, ctx)
    there = weight > 0
    causal = jnp.tril(jnp.ones((weight.shape[-1],) * 2, bool))
    ctx = behind(ctx.past, ctx, jnp.maximum(jnp.cumsum(there[:, 0], -1, dtype=jnp.int32) - 1, 0))
    ctx = ctx.replace(mask=(causal[None] & there)[:, None])
    x = jnp.broadcast_to(vectors, (len(weight), *vectors.shape[1:]))
    _, kept = model.backbone(x, ctx, Kept())
    return Past(kept.k, kept.v, weight, there.sum(-1, dtype=jnp.int32), weight.shape[-1])


def apart(k: jax.Array, v: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array, Past | None]:
    """Return one layer's keys and values without those of an encoder's virtual tokens, and what stands before them.

    Args:
        k: `[B, K, T + P, E]`, the virtual tokens at the end.
        v: `[B, K, T + P, E]`.
        ctx: The context.
    """
    if ctx.virtual is None:
        return k, v, ctx.past
    length, zero = k.shape[2] - ctx.virtual.shape[-1], jnp.zeros((1, 1), jnp.int32)
    virtual = Past(k[:, :, length:], v[:, :, length:], ctx.virtual, zero, 0)
    return k[:, :, :length], v[:, :, :length], after(ctx.past, virtual)


def after(first: Past | None, second: Past) -> Past:
    """Return the places of both, one after the other."""
    if first is None:
        return second
    k, v = (_beside([a, b], a.ndim - 2) for a, b in ((first.k, second.k), (first.v, second.v)))
    weight = _beside([first.weight, second.weight], 2)
    return Past(k, v, weight, first.offset + second.offset, first.room + second.room)


def _beside(parts: list[jax.Array], axis: int) -> jax.Array:
    """Join arrays along an axis; along the others one of length 1 is repeated."""
    lengths = jnp.broadcast_shapes(*((*p.shape[:axis], 1, *p.shape[axis + 1 :]) for p in parts))
    return jnp.concatenate(
        [jnp.broadcast_to(p, (*lengths[:axis], p.shape[axis], *lengths[axis + 1 :])) for p in parts], axis
    )
