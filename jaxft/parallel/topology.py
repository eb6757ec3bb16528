"""TPU slices by name, without a TPU: devices to compile for, and how much memory each has."""

import os
from typing import Any

import jax

from ..errors import MeshError, RunError

GIB = 2**30
CAPACITY = {  # GiB that a program may use of a device, as the compiler's own check says it
    "TPU v4": 30.75,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.73,
    "TPU v6 lite": 31.24,
}
QUIET = {  # else libtpu asks the network, and complains of what it does not find
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def topology_devices(name: str) -> list[Any]:
    """Return the devices of a TPU slice, one a chip, which programs can be compiled for, and not run on.

    XLA_FLAGS is taken out of the process's environment: the TPU compiler would end it over a flag that is not its own.

    Args:
        name: Kind and grid of chips: `"v5e:4x4"`, `"v6e:2x4"`, `"v5p:2x2x1"`, `"v4:2x2x1"`.

    Raises:
        MeshError: There is no such slice.
        RunError: The TPU compiler is not installed.
    """
    from jax.experimental import topologies

    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    jax.devices()  # reads XLA_FLAGS
    os.environ.pop("XLA_FLAGS", None)
    kind, _, grid = name.partition(":")
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if set(grid) <= set("1x") else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    try:
        devices: list[Any] = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (RuntimeError, ValueError) as error:  # what the compiler makes of a name, JaxRuntimeError among them
        if "not installed" in str(error):
            raise RunError("the TPU compiler is not installed: pip install 'jaxft[plan]'") from None
        raise _unknown(name, str(error).strip().splitlines()[0]) from None
    if devices[0].device_kind not in CAPACITY:
        raise _unknown(name, f"nothing is known of the memory of a {devices[0].device_kind}")
    return devices


def _unknown(name: str, reason: str) -> MeshError:
    return MeshError(
        f"topology {name!r}: no such TPU slice ({reason}). Give kind and grid of chips, v5e:4x4 say; kinds are v4 and "
        "v5p (grids as 2x2x1) and v5e and v6e (grids as 2x4)"
    )


def capacity(device: Any) -> int:
    """Return the bytes that programs may use of a device; of a CPU, its share of the host's memory."""
    if device.device_kind in CAPACITY:
        return int(CAPACITY[device.device_kind] * GIB)
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.device_count()
    return int(device.memory_stats()["bytes_limit"])
