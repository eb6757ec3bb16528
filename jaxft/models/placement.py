"""Where the arrays of a model lie: on one device, or split over the mesh of its config."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from ..errors import MeshError, refuse
from ..parallel.rules import repeated, spec
from ..quant.leaf import is_quantized
from .config import ModelConfig
from .names import variables


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh that a model, or a part of one, lies on; None: one device."""
    config = getattr(tree, "config", None)
    return config.mesh if isinstance(config, ModelConfig) else None


def shardings(tree: Any, *, at_work: bool = False) -> dict[str, Any]:
    """Return the sharding of each leaf of a model, or of a part of one, by path; `{}` without a mesh.

    Of a quantised kernel it is a leaf of shardings.

    Args:
        tree: A model or a part; leaves may be shapes alone.
        at_work: As they lie while a step computes, and not as they are stored.

    Raises:
        MeshError: Axes of parameters do not divide over the mesh; each is named.

    >>> import jaxft
    >>> shardings(jaxft.testing.tiny_llama())
    {}
    """
    mesh = mesh_of(tree)
    if mesh is None:
        return {}
    units = {"heads": tree.config.num_attention_heads, "kv_heads": tree.config.num_key_value_heads}
    found, problems = {}, []
    for path, variable in variables(tree).items():
        value = variable.get_value()
        if value is None:
            continue
        axes = variable.get_metadata().get("axes") or ()
        try:
            whole = NamedSharding(mesh, spec(value.shape, axes, mesh, units, at_work=at_work))
            found[path] = value.split(whole) if is_quantized(value) else whole
        except ValueError as error:
            problems.append(f"{path} {list(value.shape)}: {error}")
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    refuse(MeshError, f"parameters that do not divide over the mesh {sizes}; give another mesh", problems)
    return found


def place(tree: Any) -> Any:
    """Return a model, or a part of one, with every leaf where its sharding says; without a mesh, as it is."""
    where = shardings(tree)
    if not where:
        return tree
    moved = jax.tree.map(lambda x: x, tree)
    for path, variable in variables(moved).items():
        if path in where:
            variable.set_value(jax.tree.map(move, variable.get_value(), where[path]))
    return moved


def move(x: Any, sharding: NamedSharding) -> Any:
    """Put an array, or the shape of one, where a sharding says; what lies there already stays the same object."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return x if getattr(x, "sharding", None) == sharding else jax.device_put(x, sharding)


def beside(value: jax.Array, other: Any) -> jax.Array:
    """Put an array of another shape where `other` lies, if that is a mesh: what is whole everywhere stays so."""
    lies = None if isinstance(other, jax.core.Tracer) else getattr(other, "sharding", None)
    mesh = getattr(lies, "mesh", None)
    return move(value, repeated(mesh)) if isinstance(mesh, Mesh) else value
