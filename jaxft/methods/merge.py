"""Fold adapters into the base, and take them out again."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import MethodError, refuse
from ..models.base import Model
from ..models.causal import CausalLM
from ..models.names import Named, named_modules
from ..models.placement import place
from ..models.seams import SLOTS, Context, mix
from ..models.stack import spread
from ..quant.leaf import has_quantized
from ..quant.model import dequantize
from .linear import put, unseam
from .lost import Lost
from .low_rank import LowRank
from .method import adapters, copy_tree, forget_adapters
from .stacking import refuse_clashes

LEAVES = ("kernel", "embedding", "bias")


def merge(model: Any, *, quantize: str | None = None) -> Any:
    """Return a plain model that computes what the base with its active adapters computes; the adapters are gone.

    `kernel + sum_n w_n delta_n`, in float32, then in the base's dtype, and biases likewise. A tied head that an
    adapter changed gets a kernel of its own, and the embedding stays; one whose embedding alone was changed keeps what
    it called (token rows are the head's too).

    Quantised kernels become arrays in the model's dtype, of what they stand for: the adapter was trained beside that,
    and not beside the checkpoint that was quantised. How much of what it adds that dtype loses is logged.

    Args:
        model: A model with adapters, weighted by an array `[n]`.
        quantize: None. Few bits cannot hold what the adapter adds, and a model in them is not the one trained.

    Raises:
        MethodError: A quantised model is asked for, the model carries no adapter, each row of a batch has its own
            weights, or an adapter puts keys, values or vectors before the sequence, which no kernel can hold.

    >>> import jaxft
    >>> model = jaxft.attach(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2))
    >>> jaxft.adapters(jaxft.merge(model))
    {}
    """
    if quantize is not None:
        raise MethodError(
            f"merge: quantize={quantize!r}: merged kernels would be rounded to a few bits once more, which can take "
            "away all that the adapter adds: keep it beside the quantised base, or merge to arrays and see what "
            f"jaxft.quant.quantize(merged, {quantize!r}) costs"
        )
    fresh, ctx = _prepared(model)
    lost = Lost() if has_quantized(fresh) else None
    fresh = dequantize(fresh)
    tied = fresh.tied_kernel() if isinstance(fresh, CausalLM) else None
    for n in _adapted(fresh):
        _merge_copies(n, ctx, tied)
        for leaf, value in _leaves(n.module, tied):
            change = _change(n, leaf, value, ctx)
            if change is not None:
                merged = (value.astype(jnp.float32) + change).astype(value.dtype)
                put(n.module, leaf, merged)
                if lost is not None:
                    lost.add(f"{n.path}.{leaf}", value, change, merged)
        if tied is not None and n.module is fresh.backbone.input_embedding():
            _untie(fresh, n, tied, ctx)
        for slot in SLOTS:
            if hasattr(n.module, slot):
                setattr(n.module, slot, nnx.data(None))
    for _, module in list(nnx.iter_modules(fresh)):
        unseam(module)
    forget_adapters(fresh)
    if lost is not None:
        lost.say(fresh.dtype)
    if isinstance(fresh, Model):
        fresh.config = fresh.config.replace(**fresh.config_keys())
    return place(fresh)


def unmerge(model: Any) -> Any:
    """Take the adapters out of a base that they were merged into, as they count: the inverse of `merge`, to rounding.

    Args:
        model: A merged model with the same adapters attached and weighted as they were merged.

    Returns:
        The base as it was, with the adapters still attached and active.

    Raises:
        MethodError: An adapter put something in the place of the base's values, which are gone: copies of whole
            leaves (`modules_to_save`, `bias`), token rows, DoRA's magnitudes, an IA3 vector with a zero; or it began
            as a part of the base's own kernel (PiSSA). Or the base is quantised.

    >>> import jax, jaxft
    >>> base = jaxft.testing.tiny_llama()
    >>> merged = jaxft.merge(jaxft.attach(base, jaxft.LoRA(r=2)))
    >>> again = jaxft.unmerge(jaxft.attach(merged, jaxft.LoRA(r=2)))
    >>> bool((jaxft.set_adapter(again, None)([[1, 2]]) == base([[1, 2]])).all())
    True
    """
    fresh, ctx = _prepared(model)
    if has_quantized(fresh):
        raise MethodError("unmerge: this base is quantised, and a merged one is not: nothing was merged into it")
    for n in _adapted(fresh):
        if getattr(n.module, "saved", None) is not None:
            raise MethodError(f"{n.path} was replaced by the adapter's copy: the base's own values cannot be had back")
        for delta in (getattr(n.module, "delta", None) or {}).values():
            if not delta.reversible:
                raise MethodError(f"{n.path}: what a {type(delta).__name__} was merged into cannot be had back")
        for leaf, value in _leaves(n.module, fresh.tied_kernel() if isinstance(fresh, CausalLM) else None):
            # What is added is `slope * value + rest`, number by number.
            rest = _change(n, leaf, jnp.zeros(value.shape), ctx)
            if rest is not None:
                slope = _change(n, leaf, jnp.ones(value.shape), ctx) - rest
                if bool((slope == -1).any()):
                    raise MethodError(f"{n.path} was scaled by 0: the base's own values cannot be had back")
                put(n.module, leaf, ((value.astype(jnp.float32) - rest) / (1 + slope)).astype(value.dtype))
    return place(fresh)


def _prepared(model: Any) -> tuple[Any, Context]:
    copy_tree(model)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        raise MethodError("the model has shapes for arrays, so there is nothing to merge")
    if not adapters(model):
        raise MethodError("this model carries no adapter to merge")
    weights = model.adapter_weights.get_value()
    if weights.ndim > 1:
        raise MethodError("each row has adapter weights of its own; choose one set first, with jaxft.set_adapter")
    ctx = Context(weights=weights, names=tuple(adapters(model)))
    refuse_clashes(model, list(adapters(model)), weights)
    _refuse_products(model, {name for name, weight in zip(adapters(model), weights.tolist(), strict=True) if weight})
    before = "it stands before the sequence"
    kept = {"join": "a non-linearity is in no kernel", "past": before, "prompt": before}
    refuse(
        MethodError,
        "not all can be folded into weights: keep the adapter, or take it off first with jaxft.detach",
        [
            f"{n.path or 'the model'} has the {type(hung).__name__} of {name!r}: {why}"
            for slot, why in kept.items()
            for n in _adapted(model)
            for name, hung in (getattr(n.module, slot, None) or {}).items()
        ],
    )
    return copy_tree(model), ctx


def _refuse_products(model: Any, names: set[str]) -> None:
    """Refuse, at one module, a scale of its input beside what depends on its output: each would change the other."""
    hung = {
        n.path: {k: d for k, d in (getattr(n.module, "delta", None) or {}).items() if k in names}
        for n in _adapted(model)
    }
    refuse(
        MethodError,
        "one scales what the other reads, and their changes of a kernel do not add up: merge one after the other",
        [
            f"{path} has {', '.join(f'the {type(d).__name__} of {name!r}' for name, d in deltas.items())}"
            for path, deltas in hung.items()
            if any(hasattr(d, "of_input") for d in deltas.values())
            and not all(hasattr(d, "of_input") or type(d) is LowRank for d in deltas.values())
        ],
    )


def _adapted(model: Any) -> list[Named]:
    return [n for n in named_modules(model) if any(getattr(n.module, slot, None) is not None for slot in SLOTS)]


def _leaves(module: Any, tied: jax.Array | None) -> list[tuple[str, Any]]:
    """Return the leaves of a module that deltas may change, as (name, value); the tied kernel is a head's."""
    values = {leaf: own.get_value() for leaf in LEAVES if (own := getattr(module, leaf, None)) is not None}
    if tied is not None and getattr(module, "kernel", tied) is None:
        values["kernel"] = tied
    return list(values.items())


def _change(n: Named, leaf: str, value: jax.Array, ctx: Context) -> Any:
    """Return the weighted sum of what the deltas add to a leaf, in float32; None where they leave it as it is."""
    total = None
    for name, delta in (getattr(n.module, "delta", None) or {}).items():
        whole = spread(delta, len(n.names))
        what = "bias_change" if leaf == "bias" else "kernel_change"
        if hasattr(whole, what):
            one = ctx.weight(name) * _compiled(what, whole, value)
            total = one if total is None else total + one
    return total


@partial(jax.jit, static_argnums=0)
def _compiled(what: str, delta: Any, value: jax.Array) -> jax.Array:
    return getattr(delta, what)(value)


def _untie(model: Any, n: Named, tied: jax.Array, ctx: Context) -> None:
    """Give a head a kernel of its own where its embedding is no longer the table that it calls.

    Copies of the table, and low-rank products beside it, are for looking up alone; token rows are for both.
    """
    if model.lm_head is None:
        return
    deltas = n.module.delta or {}
    both = {name: delta for name, delta in deltas.items() if hasattr(delta, "at_head")}
    if n.module.saved is None and len(both) == len(deltas) and model.lm_head.kernel is None:
        return
    kernel = tied if model.lm_head.kernel is None else model.lm_head.kernel.get_value()
    change = sum(ctx.weight(name) * delta.kernel_change(tied.T).T for name, delta in both.items())
    put(model.lm_head, "kernel", (kernel.astype(jnp.float32) + change).astype(kernel.dtype))


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
                if copy.get_metadata("head", False) and bool((weight != 0).any()):
                    getattr(n.module, leaf).set_metadata(new=False)  # it has been trained
