"""Full fine-tuning: attaches nothing, trains every parameter of the base."""

import dataclasses
from typing import Any

from flax import nnx

from ..models.seams import Delta
from .method import Method


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Train every parameter of the base; adapters that it carries stay as they are.

    >>> import jaxft
    >>> report = jaxft.parameter_report(jaxft.testing.tiny_llama(), jaxft.Full())
    >>> report.trainable == report.total
    True
    """

    def trains(self, path: str, variable: nnx.Variable[Any], name: str) -> bool:
        """Tell whether the leaf is a parameter of the base."""
        del path, name
        return isinstance(variable, nnx.Param) and not isinstance(variable, Delta)
