"""Which modules are linear layers, ours or a person's own `nnx.Linear`, and how the latter get their seams."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from ..errors import MethodError
from ..models.layers import Linear
from ..models.names import Named
from ..models.seams import Context, add_deltas, read, scale_input
from ..quant.leaf import as_array


def is_linear(module: Any) -> bool:
    """Tell whether a module is a linear layer that a delta can hang at."""
    return isinstance(module, (Linear, nnx.Linear))


def kernel_shape(module: Any) -> tuple[int, ...]:
    """Return `(*stack, in, out)`, also of a head that has no kernel of its own."""
    if module.kernel is None:
        return (module.in_features, module.out_features)
    return tuple(module.kernel.get_value().shape)


def kernel_of(model: Any, module: Any, layers: tuple[int, ...] | None) -> jax.Array:
    """Return the kernel `(*lead, in, out)` that a linear layer multiplies by, the tied one of a head that has none.

    A quantised one is dequantised, in the dtype in which the model computes.

    Args:
        model: The model.
        module: One of its linear layers.
        layers: The layers of the stack that are wanted; None for all, or outside a stack.
    """
    value = model.tied_kernel() if module.kernel is None else module.kernel.get_value()
    value = value if layers is None else jax.tree.map(lambda x: x[list(layers),], value)
    return as_array(value, getattr(model, "dtype", None))


def logical_axes(module: Any) -> tuple[Any, Any]:
    """Return the logical axes of a kernel's input and output; (None, None) for a person's own layer."""
    return getattr(module, "axes", (None, None))


def all_linear(model: Any, named: Iterable[Named]) -> list[Named]:
    """Return the linear layers, the heads on the backbone apart: what peft calls "all-linear"."""
    return [n for n in named if is_linear(n.module) and not of_head(model, n, "lm_head")]


def of_head(model: Any, n: Named, *more: str) -> bool:
    """Tell whether a module is of a head on the backbone, or of one inside it that is new: an adapter copies it whole.

    Args:
        model: The model.
        n: The module.
        more: Paths of further heads.
    """
    inside = f"{getattr(model, 'prefix', '')}."
    heads = tuple(f"{path}." for path in (*more, *getattr(model, "heads", ())) if not path.startswith(inside))
    return is_new(n.module) or f"{n.path}.".startswith(heads)


def is_new(module: Any) -> bool:
    """Tell whether a module is of a head that the checkpoint did not have."""
    return any(isinstance(v, nnx.Param) and v.get_metadata("new", False) for v in vars(module).values())


def passes_context(module: Any) -> bool:
    """Tell whether a layer is called with a context; a person's own is not."""
    return isinstance(module, Linear)


def make_seams(modules: Iterable[Any]) -> None:
    """Turn a person's own linear layers into ones with the slots of ours: their class becomes a subclass."""
    for module in modules:
        if not passes_context(module) and not hasattr(module, "adapter_weights"):
            cls: Any = type(module)
            object.__setattr__(module, "__class__", seamed(cls))  # set by nnx, it would be an attribute
            module.delta, module.saved, module.adapter_weights = nnx.data(None), nnx.data(None), nnx.data(None)
            module.lead = kernel_shape(module)[:-2]


def unseam(module: Any) -> None:
    """Make a person's own layer again what it was."""
    if hasattr(module, "lead"):
        for slot in ("delta", "saved", "adapter_weights", "lead"):
            delattr(module, slot)
        object.__setattr__(module, "__class__", type(module).__mro__[1])


@functools.cache
def seamed(cls: Any) -> Any:
    """Return the subclass of a person's linear class that has the seams `delta` and `saved`.

    Its layers hold the adapter weights themselves, since nobody passes them a context.
    """

    def __call__(self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        names = tuple(name for name, _ in self.adapter_weights.get_metadata("adapters"))
        ctx = Context(weights=self.adapter_weights.get_value(), names=names)
        if self.saved is not None and self.adapter_weights.get_value().ndim > 1:
            raise MethodError("adapters with copies of modules or biases cannot differ by row in a model of your own")
        own = self if self.saved is None else with_copies(self, ctx)
        y = cls.__call__(own, scale_input(self, x, ctx), *args, **kwargs)
        return add_deltas(self, x, y, ctx)

    return type(f"Seamed{cls.__name__}", (cls,), {"__call__": __call__, "__module__": cls.__module__})


def with_copies(module: Any, ctx: Context) -> Any:
    """Return the layer with the adapters' copies of its leaves in place of its own."""
    fresh = jax.tree.map(lambda x: x, module)
    for leaf in ("kernel", "bias"):
        value = read(module, leaf, ctx)
        if value is not None:
            put(fresh, leaf, value)
    return fresh


def put(module: Any, leaf: str, value: jax.Array) -> None:
    """Put a value into a leaf of a linear layer, which may have had none."""
    own = getattr(module, leaf)
    if own is not None:
        setattr(module, leaf, own.replace(value))
        return
    axes = logical_axes(module)
    if leaf == "kernel":
        module.kernel = nnx.Param(value, axes=axes, transposed=module.transposed)
        return
    module.bias = nnx.Param(value, axes=(*("layers",) * (value.ndim - 1), axes[1]))
    if isinstance(module, nnx.Linear):
        module.use_bias = True
