"""How much is trained: counts by module, padding left out."""

import dataclasses
import math
from typing import Any

from flax import nnx

from ..errors import MethodError
from ..models.names import dotted, variables
from ..models.seams import SLOTS
from .low_rank import LowRank
from .method import Method
from .partition import partition


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """What is trained of a model; print it for a table.

    Attributes:
        trainable: Trained numbers.
        total: All parameters, the adapters' included.
        modules: Trained numbers by module, the layers of a stack together.
    """

    trainable: int
    total: int
    modules: dict[str, int]

    @property
    def percent(self) -> float:
        """Trained share, in percent."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        head = f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.percent:.4f}"
        width = max(map(len, self.modules), default=0)
        return "\n".join([head, *(f"  {path:{width}}  {count:>15,}" for path, count in self.modules.items())])


def parameter_report(model_or_state: Any, method: Method | None = None, *, name: str = "default") -> ParameterReport:
    """Count what is trained.

    Args:
        model_or_state: A `TrainState`; or a model, with arrays or with shapes alone.
        method: Needed with a model: what decides.
        name: The adapter's name.

    >>> import jaxft
    >>> print(jaxft.parameter_report(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2)))
    trainable params: 448 || all params: 20,064 || trainable%: 2.2329
      model.layers.self_attn.q_proj              256
      model.layers.self_attn.v_proj              192
    """
    if hasattr(model_or_state, "trainable"):
        trainable, frozen = model_or_state.trainable, model_or_state.frozen
    elif method is None:
        raise MethodError("parameter_report takes a TrainState, or a model and the method that trains it")
    else:
        trainable, frozen = partition(model_or_state, method, name=name)
    counts = _counts(trainable)
    modules: dict[str, int] = {}
    for path, count in counts.items():
        parts = path.split(".")
        slot = next((i for i, part in enumerate(parts) if part in SLOTS), len(parts) - 1)
        module = ".".join(parts[:slot]) or parts[0]
        modules[module] = modules.get(module, 0) + count
    trained = sum(counts.values())
    return ParameterReport(trained, trained + sum(_counts(frozen).values()), modules)


def _counts(part: Any) -> dict[str, int]:
    """Count the parameters of a part by path; the padding of a low-rank pair is taken off."""
    counts = {}
    for path, v in variables(part).items():
        value = v.get_value()
        if isinstance(v, nnx.Param) and value is not None:
            counts[path] = math.prod(value.shape)
    for place, module in nnx.iter_modules(part):
        if isinstance(module, LowRank) and module.a.get_value() is not None:
            at = dotted(place)
            counts[f"{at}.a"], counts[f"{at}.b"] = module.parameter_counts()
    return counts
