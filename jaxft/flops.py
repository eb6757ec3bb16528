"""Floating-point operations of a program, counted in its jaxpr: what a compiler's own count leaves out is in it.

XLA counts the body of a loop once, however often it runs, and nothing in a custom kernel.
"""

import math
from typing import Any

import jax


def count_flops(jaxpr: Any) -> int:
    """Return the operations of the matrix products in a jaxpr, two for each multiplication and addition.

    A scan counts as often as it runs, a branch as its dearest, a while loop once (its length is a value). What
    rematerialisation computes again is counted again.

    Args:
        jaxpr: Of `jax.make_jaxpr(f)(x)`, or the `jaxpr` of a traced program.

    >>> import jax.numpy as jnp
    >>> count_flops(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2))))
    16
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn: Any) -> int:
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if eqn.primitive.name == "cond":
        return max(count_flops(branch) for branch in eqn.params["branches"])
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    return int(times * sum(map(count_flops, _inner(eqn.params))))


def _inner(params: dict[str, Any]) -> list[Any]:
    def is_jaxpr(x: Any) -> bool:
        return hasattr(x, "eqns") or hasattr(x, "jaxpr")

    return [x for x in jax.tree.leaves(list(params.values()), is_leaf=is_jaxpr) if is_jaxpr(x)]
