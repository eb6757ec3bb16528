"""From the logical axes of an array to the axes of a mesh: the one table, and what may be repeated instead."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH = ("data", "fsdp")
RULES = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}  # others (layers, norm, positions, rank) are not split
REPEATED = ("kv_heads", "vocab")  # where these do not divide over `tensor`, each device holds the whole


def spec(
    shape: Sequence[int],
    axes: Sequence[str | None],
    mesh: Mesh,
    units: Mapping[str, int] | None = None,
    *,
    at_work: bool = False,
) -> PartitionSpec:
    """Return how a parameter is split.

    An axis goes where the table says, in whole units (heads are not cut). A narrow factor without an `embed` axis, as
    the second one of a low-rank pair often is, is split over `fsdp` along its other axis, if that divides. Vectors
    (biases, norms) are not split over `fsdp`.

    Args:
        shape: Of the array; more leading dimensions than `axes` are not split.
        axes: Logical axes.
        mesh: A mesh of `make_mesh`.
        units: Number of indivisible units of an axis, `{"kv_heads": 2}` say; else its length.
        at_work: How it lies while a step computes, not how it is stored: the narrow factors of a delta are gathered
            over `fsdp` once a step, and not layer by layer as kernels are.

    Raises:
        ValueError: An axis does not divide.

    >>> from .mesh import make_mesh
    >>> tuple(spec((2, 8, 6), ("layers", "embed", "mlp"), make_mesh(devices=jax.devices()[:1])))
    (None, 'fsdp', 'tensor')
    """
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    vector = sum(axis not in (None, "layers") for axis in axes) < 2
    narrow = "rank" in axes
    places: list[Any] = [RULES.get(axis or "") for axis in axes]
    if vector or (narrow and at_work):
        places = [None if place == "fsdp" else place for place in places]
    for i, (axis, place) in enumerate(zip(axes, places, strict=True)):
        whole = (units or {}).get(axis or "", shape[i])
        if place and (whole % mesh.shape[place] or shape[i] % mesh.shape[place]):
            if axis not in REPEATED:
                raise ValueError(f"axis {axis} of {whole} does not divide over {place}={mesh.shape[place]}")
            places[i] = None
    if narrow and not at_work and "fsdp" not in places:
        for i, axis in enumerate(axes):
            over = (places[i], "fsdp") if places[i] else ("fsdp",)
            if axis in RULES and shape[i] % math.prod(mesh.shape[place] for place in over) == 0:
                places[i] = over
                break
    while places and places[-1] is None:  # one way to write it, so that equal shardings compare as equal
        places.pop()
    return PartitionSpec(*places)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """Say how an activation is split inside a program; without a mesh, `x` as it is.

    Sharded weights alone are not FSDP: left to itself, XLA splits activations along `embed` and adds them up, instead
    of gathering kernels. So the residual stream is held to its rows.

    Args:
        x: An activation.
        mesh: The model's mesh.
        axes: Logical axes of all its dimensions; `"batch"` goes over `data` and `fsdp`, `"data"` over that alone; what
            does not divide is not split.
    """
    if mesh is None:
        return x
    rules: dict[str, Any] = {**RULES, "batch": BATCH, "data": "data"}
    places = [rules.get(axis or "") for axis in axes]
    sizes = [math.prod(mesh.shape[a] for a in ((p,) if isinstance(p, str) else p or ())) for p in places]
    fits = [place if n % size == 0 else None for place, n, size in zip(places, x.shape, sizes, strict=True)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fits)))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Return how the arrays of a batch lie on a mesh: their first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def repeated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_devices(mesh: Mesh | None) -> int:
    """Return how many parts the rows of a batch are split into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)
