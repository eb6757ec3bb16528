"""From a model to the one with quantised kernels: the linear layers inside its stack, and nothing else."""

import logging
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from ..errors import MethodError, SelectionError, nearest, refuse
from .int8 import quantize_int8
from .leaf import Quantized, is_quantized
from .nf4 import quantize_nf4

log = logging.getLogger("jaxft")

# Checkpoints hold (out, in), and so does what bitsandbytes quantises, of GPT-2's layers too.
KINDS: dict[str, Callable[[Any], Quantized]] = {"nf4": partial(quantize_nf4, transposed=True), "int8": quantize_int8}


def quantize(model: Any, kind: str = "nf4", *, skip: Sequence[str] = ()) -> Any:
    """Return a new model with the kernels of its layers in few bits; what else it has is shared with the given one.

    Embeddings, output head, classification heads, norms and biases stay as they are. Adapters attached to the new
    model are trained beside what the quantised kernels stand for (QLoRA, Dettmers et al. 2023).

    Args:
        model: A model of ours without adapters; with shapes for arrays it gets leaves of shapes.
        kind: `"nf4"`: 4.127 bits a weight, as bitsandbytes with double quantisation; `"int8"`: 8, by output.
        skip: Modules that stay as they are: ends of their names, `"down_proj"` say, or globs for these or for the
            whole path, `"*.mlp.*"`. A stack is one module: it is skipped in all layers.

    Raises:
        MethodError: An unknown kind, a model that has no layers of ours, adapters, quantised kernels already, or
            values that are NaN or infinite; each module is named.
        SelectionError: A pattern of `skip` that matches nothing.

    >>> import jaxft
    >>> small = quantize(jaxft.testing.tiny_llama())
    >>> small.model.layers.mlp.up_proj.kernel.get_value().codes.shape, small([[3, 4]]).shape
    ((2, 768), (1, 2, 64))
    """
    if kind not in KINDS:
        raise MethodError(f"quantize: kind {kind!r}; {nearest(str(kind), KINDS)}")
    if not isinstance(model, nnx.Module):
        raise MethodError(f"quantize: a model is expected, this is a {type(model).__name__} (of a state: state.model)")
    if getattr(model, "adapter_weights", None) is not None:
        raise MethodError("quantize: this model carries adapters, made for its kernels: quantise first, then attach")
    fresh = jax.tree.map(lambda x: x, model)
    found = dict(stacked_kernels(fresh))
    if not found:
        raise MethodError(f"quantize: this {type(model).__name__} has no linear layers in a stack of ours")
    there = [path for path, variable in found.items() if is_quantized(variable.get_value())]
    refuse(MethodError, "quantize: kernels that are quantised already", there)
    left = skipped(list(found), skip)
    if set(found) == left:
        raise SelectionError(f"quantize: skip={tuple(skip)!r} leaves no kernel to quantise")
    problems = []
    for path, variable in found.items():
        if path in left:
            log.info("%s.kernel stays as it is: skipped", path)
            continue
        try:
            variable.set_value(quantized(variable.get_value(), kind))
        except MethodError as error:
            problems.append(f"{path}.kernel: {error}")
    refuse(MethodError, "quantize: kernels that cannot be quantised", problems)
    return fresh


def dequantize(model: Any) -> Any:
    """Return a new model with arrays for its quantised kernels, in its dtype: it computes the same, to rounding.

    >>> import jaxft
    >>> small = quantize(jaxft.testing.tiny_llama(), "int8")
    >>> dequantize(small).model.layers.mlp.up_proj.kernel.get_value().dtype
    dtype('float32')
    """

    def whole(x: Any) -> Any:
        if not is_quantized(x):
            return x
        if any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(x)):
            return jax.eval_shape(lambda leaf: leaf.dequantize(model.dtype), x)
        return x.dequantize(model.dtype)

    return jax.tree.map(whole, model, is_leaf=is_quantized)


def quantized(kernel: Any, kind: str) -> Quantized:
    """Return a kernel in few bits, on the devices on which it lies, or the shapes of it."""
    leaf, where = KINDS[kind](kernel), getattr(kernel, "sharding", None)
    if not isinstance(where, NamedSharding):
        return leaf
    lies: Any = leaf.split(where)
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), leaf, lies)
    return jax.device_put(leaf, lies)


def stacked_kernels(model: Any) -> Iterator[tuple[str, nnx.Variable[Any]]]:
    """Yield the linear kernels inside a stack of layers, `(layers, in, out)`, each with the path of its module."""
    stacks = [path for path, module in nnx.iter_modules(model) if isinstance(getattr(module, "stack_depth", None), int)]
    for path, module in sorted(nnx.iter_modules(model), key=lambda pair: list(map(str, pair[0]))):
        kernel = getattr(module, "kernel", None)
        inside = any(path[: len(stack)] == stack for stack in stacks)
        if inside and isinstance(kernel, nnx.Param) and len(getattr(kernel.get_value(), "shape", ())) == 3:
            yield ".".join(map(str, path)), kernel


def skipped(paths: Sequence[str], skip: Sequence[str]) -> set[str]:
    """Return the paths that patterns mean; refuse a pattern that means none."""
    if isinstance(skip, str):
        raise SelectionError(f"quantize: skip={skip!r} is one string: give a list of names or globs, [{skip!r}]")
    left: set[str] = set()
    for pattern in skip:
        means = {path for path in paths if fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")}
        if not means:
            parts = {part for path in paths for part in path.split(".")}
            raise SelectionError(
                f"quantize: skip={pattern!r} matches no linear layer of the stack (all its layers are one, and have "
                f"no index); {nearest(pattern.rsplit('.', 1)[-1], parts)}"
            )
        left |= means
    return left
