"""Fold adapters into the base, and take them out again."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import MethodError, refuse
from ..models.causal import CausalLM
from ..models.names import Named, named_modules
from ..models.placement import place
from ..models.seams import SLOTS, Context, mix
from ..models.stack import spread
from .linear import put, unseam
from .method import adapters, copy_tree, forget_adapters


def merge(model: Any) -> Any:
    """Return a plain model that computes what the base with its active adapters computes; the adapters are gone.

    `kernel + sum_n w_n delta_n`, in float32, then in the base's dtype. A tied head that an adapter changed gets a
    kernel of its own, and the embedding stays.

    Args:
        model: A model with adapters, weighted by an array `[n]`.

    Raises:
        MethodError: The model carries no adapter, each row of a batch has its own weights, or an adapter puts keys,
            values or vectors before the sequence, which no kernel can hold.

    >>> import jaxft
    >>> model = jaxft.attach(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2))
    >>> jaxft.adapters(jaxft.merge(model))
    {}
    """
    fresh, ctx = _prepared(model)
    _refuse_bottlenecks(fresh)
    tied = fresh.tied_kernel() if isinstance(fresh, CausalLM) else None
    for n in _adapted(fresh):
        _merge_copies(n, ctx, tied)
        change = _kernel_change(n, ctx)
        if change is not None:
            _add_to_kernel(n.module, change, tied)
        for slot in SLOTS:
            if hasattr(n.module, slot):
                setattr(n.module, slot, nnx.data(None))
        if tied is not None and n.module is fresh.backbone.input_embedding() and fresh.lm_head.kernel is None:
            put(fresh.lm_head, "kernel", tied)  # an adapter's copy of the table is for looking up, not for the head
    for _, module in list(nnx.iter_modules(fresh)):
        unseam(module)
    forget_adapters(fresh)
    if isinstance(fresh, CausalLM):
        fresh.config = fresh.config.replace(**fresh.config_keys())
    return place(fresh)


def unmerge(model: Any) -> Any:
    """Take the active adapters out of a base that they were merged into: the inverse of `merge`, to rounding.

    Args:
        model: A merged model with the same adapters attached and weighted as they were merged.

    Returns:
        The base as it was, with the adapters still attached and active.

    Raises:
        MethodError: An adapter has copies of whole leaves (`modules_to_save`, `bias`): what stood there is gone.

    >>> import jax, jaxft
    >>> base = jaxft.testing.tiny_llama()
    >>> merged = jaxft.merge(jaxft.attach(base, jaxft.LoRA(r=2)))
    >>> again = jaxft.unmerge(jaxft.attach(merged, jaxft.LoRA(r=2)))
    >>> bool((jaxft.set_adapter(again, None)([[1, 2]]) == base([[1, 2]])).all())
    True
    """
    fresh, ctx = _prepared(model)
    _refuse_bottlenecks(fresh)
    for n in _adapted(fresh):
        if getattr(n.module, "saved", None) is not None:
            raise MethodError(f"{n.path} was replaced by the adapter's copy: the base's own values cannot be had back")
        change = _kernel_change(n, ctx)
        if change is not None:
            _add_to_kernel(n.module, -change, fresh.tied_kernel() if isinstance(fresh, CausalLM) else None)
    return place(fresh)


def _prepared(model: Any) -> tuple[Any, Context]:
    copy_tree(model)
    if not adapters(model):
        raise MethodError("this model carries no adapter to merge")
    weights = model.adapter_weights.get_value()
    if weights.ndim > 1:
        raise MethodError("each row has adapter weights of its own; choose one set first, with jaxft.set_adapter")
    ctx = Context(weights=weights, names=tuple(adapters(model)))
    hung = {name for slot in ("past", "prompt") for name in (getattr(model, slot, None) or {})}
    refuse(
        MethodError,
        "what stands before the sequence cannot be folded into weights: keep the adapter, or detach it first",
        [f"{name!r} is {type(method).__name__}" for name, method in adapters(model).items() if name in hung],
    )
    return copy_tree(model), ctx


def _adapted(model: Any) -> list[Named]:
    return [n for n in named_modules(model) if any(getattr(n.module, slot, None) is not None for slot in SLOTS)]


def _refuse_bottlenecks(model: Any) -> None:
    """Refuse what hangs at a join: its non-linearity is in no kernel."""
    refuse(
        MethodError,
        "a bottleneck adapter cannot be folded into kernels; keep it, or take it off first with jaxft.detach",
        [f"{n.path} has that of {name!r}" for n in _adapted(model) for name in getattr(n.module, "join", None) or {}],
    )


def _kernel_change(n: Named, ctx: Context) -> jax.Array | None:
    """Return the weighted sum of what the deltas add to a kernel, `(*lead, in, out)`; None where there are none."""
    change = None
    for name, delta in (getattr(n.module, "delta", None) or {}).items():
        one = ctx.weight(name) * spread(delta, len(n.names)).kernel_change()
        change = one if change is None else change + one
    return change


def _add_to_kernel(module: Any, change: jax.Array, tied: jax.Array | None) -> None:
    kernel: Any = tied if module.kernel is None else module.kernel.get_value()
    put(module, "kernel", (kernel.astype(jnp.float32) + change).astype(kernel.dtype))


def _merge_copies(n: Named, ctx: Context, tied: jax.Array | None) -> None:
    for name, held in (getattr(n.module, "saved", None) or {}).items():
        copies = spread(held, len(n.names))
        for leaf, copy in vars(copies).items():
            if isinstance(copy, nnx.Param):
                own: Any = getattr(n.module, leaf, None)
                value, gate = copy.get_value(), copies.gate.get_value()
                base = own.get_value() if own is not None else tied if leaf == "kernel" else None
                weight = ctx.weight(name) * gate.reshape(*gate.shape, *(1,) * (value.ndim - gate.ndim))
                put(n.module, leaf, mix(base, value, weight).astype(value.dtype if base is None else base.dtype))
