"""A contrastive loss's temperature as a trained number, beside what the model trains (CLIP, Radford et al. 2021)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import BatchError, MethodError
from ..models.seams import Delta, mix
from .method import Method, hang


class Temperature(nnx.Module):
    """What hangs in a model's slot `temperature`.

    Args:
        initial: The temperature at first.
    """

    def __init__(self, initial: float):
        self.log_scale = Delta(jnp.float32(-math.log(initial)), axes=())


@dataclasses.dataclass(frozen=True)
class LearnedTemperature(Method):
    """Train the temperature t of a contrastive loss, as `log(1 / t)`: `jaxft.LoRA() | LearnedTemperature()`.

    The losses of `jaxft.losses.make_contrastive_loss` read it instead of their own `temperature`, the more so the more
    the adapter counts: at weight w it is `exp(w log t + (1 - w) log temperature)`. As in `transformers`' CLIP it has no
    bound. What the model itself computes does not change, and a merged model has none.

    Attributes:
        initial: t at first.

    Raises:
        MethodError: `initial` is no number above 0, or the model has no slot for it.

    >>> import jaxft
    >>> method = jaxft.LoRA(r=2) | LearnedTemperature()
    >>> trained = jaxft.leaves(jaxft.partition(jaxft.testing.tiny_llama(), method)[0])
    >>> round(float(trained["temperature.default.log_scale"]), 4)
    2.6593
    """

    initial: float = 0.07

    def __post_init__(self) -> None:
        number = isinstance(self.initial, (int, float)) and not isinstance(self.initial, bool)
        if not number or not 0 < self.initial < math.inf:
            raise MethodError(f"LearnedTemperature: initial={self.initial!r}: give a number above 0")

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang the number at the model."""
        del key
        if not hasattr(model, "temperature"):
            raise MethodError(
                f"LearnedTemperature: this {type(model).__name__} has no `temperature` slot; the models that "
                "jaxft.load makes have it"
            )
        hang(model, "temperature", name, Temperature(self.initial))


def temperature_of(model: Any, fixed: Any) -> Any:
    """Return the temperature that a model has learned, or `fixed` where it carries none.

    Args:
        model: A model.
        fixed: The temperature without an adapter.

    Raises:
        BatchError: Rows have adapter weights of their own, and so temperatures of their own.
    """
    hung = getattr(model, "temperature", None)
    if not isinstance(hung, nnx.Dict):
        return fixed
    if model.adapter_weights.get_value().ndim > 1:
        raise BatchError("a learned temperature is one for the batch, and here each row has adapter weights of its own")
    ctx = model.context(1)
    fixed, change = jnp.float32(fixed), jnp.float32(0)  # of log(1 / t): exactly `fixed` where no adapter counts
    for name, module in hung.items():
        change = mix(change, module.log_scale.get_value() + jnp.log(fixed), ctx.weight(name))
    return fixed * jnp.exp(-change)
