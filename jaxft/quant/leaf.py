"""What every quantised kernel is: a pytree that stands where a kernel's array stood, and can be made an array again."""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..errors import MethodError


@dataclasses.dataclass(frozen=True)
class Quantized(abc.ABC):
    """A kernel `(*layers, in, out)` in few bits. Leading axes are the components' own, so a scan slices it.

    A subclass is a frozen dataclass under `jax.tree_util.register_dataclass`, its fields arrays or static. It is no
    array: it has a `shape`, and `dequantize` makes an array of it.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that it stands for."""

    @abc.abstractmethod
    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the kernel as an array, computed in float32 and rounded to `dtype` once."""

    @abc.abstractmethod
    def axes_of(self, field: str) -> tuple[int | None, ...]:
        """Return, for each dimension of a component, the axis of the kernel that it runs along; None: along none."""

    def times(self, x: jax.Array) -> jax.Array:
        """Return `x kernel`, `[n, out]`, of `[n, in]` and a kernel without layers, in the dtype of `x`."""
        return x @ self.dequantize(x.dtype)

    def times_transposed(self, x: jax.Array) -> jax.Array:
        """Return `x kernel^T`, `[n, in]`, of `[n, out]` and a kernel without layers, in the dtype of `x`."""
        return x @ self.dequantize(x.dtype).T

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Parameters of the kernel."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the components; tables of constants are the program's."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def components(self) -> dict[str, Any]:
        """Return the arrays that it is made of, by field."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x for name, x in named.items() if hasattr(x, "dtype")}

    def split(self, whole: NamedSharding) -> Any:
        """Return how the components lie where a kernel lies as `whole` says: a tree of shardings.

        A component is split along the kernel's axes; where it is too short to divide, each device holds it whole.
        """
        mesh, places = whole.mesh, (*whole.spec, *(None,) * (self.ndim - len(whole.spec)))

        def lies(name: str, x: Any) -> NamedSharding:
            found: list[Any] = []
            for size, axis in zip(x.shape, self.axes_of(name), strict=True):
                place = None if axis is None else places[axis]
                parts = math.prod(mesh.shape[a] for a in ((place,) if isinstance(place, str) else place or ()))
                found.append(place if size % parts == 0 else None)
            while found and found[-1] is None:
                found.pop()
            return NamedSharding(mesh, PartitionSpec(*found))

        return dataclasses.replace(self, **{name: lies(name, x) for name, x in self.components().items()})


def is_quantized(x: Any) -> bool:
    """Tell whether a node of a tree is a quantised kernel, where a walk over values stops."""
    return isinstance(x, Quantized)


def has_quantized(tree: Any) -> bool:
    """Tell whether any leaf of a tree is a quantised kernel."""
    return any(map(is_quantized, jax.tree.leaves(tree, is_leaf=is_quantized)))


def as_array(kernel: Any, dtype: Any) -> Any:
    """Return a kernel that is an array as it is, a quantised one dequantised in a dtype."""
    return kernel.dequantize(dtype) if isinstance(kernel, Quantized) else kernel


def check_kernel(array: Any, function: str) -> None:
    """Refuse what is no kernel of floats."""
    if not hasattr(array, "shape") or len(array.shape) < 2 or 0 in array.shape:
        shape = list(getattr(array, "shape", ()))
        raise MethodError(f"{function}: give a kernel (in, out), or (layers, in, out); this is {shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise MethodError(f"{function}: a kernel of floats is expected, this is {array.dtype}")


def largest(x: jax.Array, axis: int) -> jax.Array:
    """Return the largest magnitude along an axis; NaN where there is one, which a CPU's maximum passes over."""
    return jnp.where(jnp.isnan(x).any(axis), jnp.nan, jnp.abs(x).max(axis))


def check_finite(most: jax.Array, array: Any, function: str) -> None:
    """Refuse a kernel with values that are NaN or infinite, told by the largest magnitude of each group of them.

    Inside another program there is nothing to look at, and nothing is checked.
    """
    if isinstance(most, jax.core.Tracer) or bool(jnp.isfinite(most).all()):
        return
    count = int((~jnp.isfinite(array)).sum())
    raise MethodError(
        f"{function}: {count} of {math.prod(array.shape):,} values of this kernel {list(array.shape)} are NaN or "
        "infinite: the checkpoint is damaged, or its dtype is too narrow"
    )
