"""The two codes of NF4: sixteen values for weights, and 256 for the scales of their blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Quantiles of the normal distribution with an exact zero (Dettmers et al. 2023, appendix E), as the reference has them.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
STEPS = 65535  # a scale is first rounded to one of so many steps over [-1, 1], as the reference does


def value_of(codes: jax.Array) -> jax.Array:
    """Return the value of each code in float32: selected bit by bit, since no processor is fast at looking up.

    >>> value_of(jnp.array([0, 7, 15], jnp.uint8))
    Array([-1.,  0.,  1.], dtype=float32)
    """
    level: list[Any] = [jnp.float32(value) for value in NF4_VALUES]
    for bit in (1, 2, 4, 8):
        on = (codes & bit) != 0
        level = [jnp.where(on, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def nf4_bounds() -> np.ndarray:
    """Return the 15 values halfway between neighbours of the code; a weight on one goes to the lower.

    >>> nf4_bounds()[7]
    np.float32(0.03979015)
    """
    values = np.array(NF4_VALUES, np.float32)
    return (values[:-1] + values[1:]) / np.float32(2)


def dynamic_map() -> np.ndarray:
    """Return the 256 values of the dynamic code (Dettmers 2015), sorted, float32: +-10^(i - 6) f, and 0 and 1.

    With i from 0 to 6, f runs through the middles of 2^i equal parts of [0.1, 1].

    >>> [round(float(x), 8) for x in dynamic_map()[[0, 127, 128, 255]]]
    [-0.99296874, 0.0, 5.5e-07, 1.0]
    """
    single, found = np.float32, [np.array([0, 1], np.float32)]
    for i in range(7):
        parts = 2**i
        step = np.float64((single(1) - single(0.1)) / single(parts))
        k = np.arange(parts + 1)
        # The edges as the reference's linspace rounds them: from the nearer end, each once.
        up, down = np.float64(single(0.1)) + step * k, 1 - step * (parts - k)
        edges = np.where(k < (parts + 1) // 2, up, down).astype(single)
        middles = single(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / single(2))
        found += [middles, -middles]
    return np.sort(np.concatenate(found))


def dynamic_codes() -> np.ndarray:
    """Return the code nearest to each of the steps over [-1, 1], `[65536]` uint8.

    >>> dynamic_codes()[[0, STEPS // 2, STEPS]]
    array([  0, 123, 255], dtype=uint8)
    """
    values = dynamic_map()
    steps = (2 * np.arange(STEPS + 1) / STEPS - 1).astype(np.float32)
    return np.searchsorted((values[:-1] + values[1:]) / np.float32(2), steps).astype(np.uint8)
