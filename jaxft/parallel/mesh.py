"""Devices in a grid of three axes: `data`, `fsdp`, `tensor`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from ..errors import MeshError

AXES = ("data", "fsdp", "tensor")


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices as a mesh; `jaxft.load(..., mesh=mesh)` puts a model on it.

    The rows of a batch are split over `data` and `fsdp`. Parameters, and what the optimiser keeps of them, are split
    over `fsdp` and gathered one layer at a time (Zhao et al. 2023; ZeRO, Rajbhandari et al. 2020), and within a layer
    over `tensor` by heads and by the width of the MLP (Shoeybi et al. 2019). Over `data` they are repeated.

    Args:
        data: Copies of the model; -1: what is left of the devices. At most one of the three is -1.
        fsdp: Parts that the parameters are split into for storage.
        tensor: Parts that a layer's work is split into.
        devices: The devices; by default all there are.

    Returns:
        A mesh of the shape `(data, fsdp, tensor)`.

    Raises:
        MeshError: The product is not the number of devices.

    >>> dict(make_mesh(data=2, fsdp=-1, devices=jax.devices()[:1] * 2).shape)
    {'data': 2, 'fsdp': 1, 'tensor': 1}
    """
    given = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.devices() if devices is None else list(devices)
    said = ", ".join(f"{axis}={size}" for axis, size in given.items())
    if any(not isinstance(n, int) or isinstance(n, bool) or n == 0 or n < -1 for n in given.values()):
        raise MeshError(f"mesh {said}: each is a whole number of at least 1, or -1 for what is left")
    if sum(n == -1 for n in given.values()) > 1:
        raise MeshError(f"mesh {said}: only one axis can be -1, what is left of the {len(devices)} devices")
    fixed = math.prod(n for n in given.values() if n != -1)
    sizes = [len(devices) // fixed if n == -1 else n for n in given.values()]
    if math.prod(sizes) != len(devices):
        there = f"are {len(devices)} devices" if len(devices) > 1 else "is one device"
        product = math.prod(sizes) or fixed
        raise MeshError(f"mesh {said}: its axes multiply to {product}, and there {there}; one may be -1, what is left")
    grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)  # any shape, near neighbours where it can
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
