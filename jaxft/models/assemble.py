"""From the tensors of a checkpoint to the arrays of a model: read one after the other, and quantised on the way."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..quant import NF4, Int8, Quantized, is_quantized, quantize_int8, quantize_nf4
from .names import Named
from .packed import unpack
from .tensors import Tensors

ALIGNMENT = 64


def disk_shape(named: Named, leaf: str, variable: nnx.Param[Any], packed: bool = False) -> tuple[int, ...]:
    """Return the shape that a leaf's tensor has in a checkpoint: no layer axis, kernels `(out, in)` as a rule.

    `packed`: it is quantised there, in the order `(out, in)` whatever the family.
    """
    shape = variable.get_value().shape[1:] if named.stacked else variable.get_value().shape
    turned = leaf == "kernel" and (packed or variable.get_metadata("transposed"))
    return tuple(shape[::-1]) if turned else tuple(shape)


def assemble(tensors: Tensors, sources: list[str], variable: nnx.Param[Any], dtype: Any) -> Any:
    """Read the tensors of one leaf, one after the other, into one of its shape, dtype and sharding.

    On a mesh each part of an array is read and put on its devices by itself, so no more than one part is in the host's
    memory; of a quantised kernel, no more than one layer's values.

    Args:
        tensors: The checkpoint.
        sources: Names of the tensors: one, or one a layer.
        variable: The leaf, as shapes.
        dtype: Of the model; values are rounded to it before they are quantised, as if they were loaded so.

    Raises:
        MethodError: Values that cannot be quantised, since they are NaN or infinite.
    """
    there = variable.get_value()
    transposed = variable.get_metadata("transposed", False)
    if is_quantized(there):
        return _quantized(tensors, sources, there, transposed, dtype)
    if there.sharding is None:
        return jnp.asarray(_part(tensors, sources, there, (slice(None),) * len(there.shape), transposed))
    groups: dict[str, list[Any]] = {}  # the devices that hold the same part
    for device, index in there.sharding.addressable_devices_indices_map(there.shape).items():
        groups.setdefault(str(index), [index]).append(device)
    arrays = []
    for index, *devices in groups.values():
        part = _part(tensors, sources, there, index, transposed)
        arrays += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(there.shape, there.sharding, arrays)


def _quantized(tensors: Tensors, sources: list[str], there: Quantized, transposed: bool, dtype: Any) -> Any:
    """Read, or make, the components of a quantised kernel, layer by layer."""
    like, structure = jax.tree.flatten(there)
    stacked = there.ndim > 2
    buffers = [_aligned(list(x.shape), x.dtype) for x in like]
    for i, source in enumerate(sources):
        if source in tensors.packed:
            made = unpack(tensors, source, tensors.packed[source])
        else:
            made = quantize_kernel(tensors.read(source), there, transposed, dtype)
        for buffer, x in zip(buffers, jax.tree.leaves(made), strict=True):
            buffer[i if stacked else ...] = np.asarray(x)
    put = [to_devices(b, x.sharding) for b, x in zip(buffers, like, strict=True)]
    return jax.tree.unflatten(structure, put)


def to_devices(buffer: np.ndarray[Any, Any], sharding: Any) -> jax.Array:
    """Put an array of the host where a sharding says; None: it becomes one of JAX as it is."""
    return jnp.asarray(buffer) if sharding is None else jax.device_put(buffer, sharding)


def quantize_kernel(tensor: np.ndarray[Any, Any], like: Quantized, transposed: bool, dtype: Any) -> NF4 | Int8:
    """Quantise one tensor of a checkpoint, in the order of its bytes there, as another leaf is."""
    with np.errstate(over="ignore"):
        tensor = tensor.astype(dtype, copy=False)
    if isinstance(like, NF4):
        turned = like.transposed != transposed
        made = quantize_nf4(tensor.T if turned else tensor, block=like.block, double=like.double)
        return dataclasses.replace(made, matrix=like.matrix, transposed=like.transposed)
    return quantize_int8(tensor.T if transposed else tensor)


def _part(
    tensors: Tensors, sources: list[str], there: Any, index: tuple[slice, ...], transposed: bool
) -> np.ndarray[Any, Any]:
    """Read a part of a leaf, given by a slice of each of its axes; of a stack, each layer has a source of its own."""
    shape = [len(range(*s.indices(n))) for s, n in zip(index, there.shape, strict=True)]
    buffer = _aligned(shape, there.dtype)
    inner = index[-len(tensors.shapes[sources[0]]) :]
    chosen = sources[index[0]] if len(inner) < len(index) else sources
    for slot, source in zip(buffer.reshape(len(chosen), *shape[-len(inner) :]), chosen, strict=True):
        tensor = tensors.read(source, inner[::-1] if transposed else inner)
        with np.errstate(over="ignore"):  # what a narrower dtype cannot hold is found, and named, afterwards
            slot[...] = tensor.T if transposed else tensor
    return buffer


def _aligned(shape: list[int], dtype: Any) -> np.ndarray[Any, Any]:
    """Return an empty array that begins where JAX on a CPU takes it over as it is, and so is never there twice."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)
