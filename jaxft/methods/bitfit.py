"""BitFit (Ben Zaken et al. 2022): attaches nothing, trains the biases."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import MethodError
from ..models.names import named_modules, parameters
from ..models.seams import Copies, Delta
from .linear import all_linear, kernel_shape, logical_axes, make_seams
from .method import Method, hang, owner


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """Train the biases of the base, those of its norms included, as the authors' code does.

    Attributes:
        create: Give every linear layer that has no bias one of its own, zero at first (the output head apart): for
            a model that has none, such as Llama. They are held beside the base, under the adapter's name.

    Raises:
        MethodError: The model has no biases and `create` is False, or has them all and `create` is True.

    >>> import jaxft
    >>> model = jaxft.testing.tiny_gpt2()
    >>> trainable, _ = jaxft.partition(model, jaxft.BitFit())
    >>> sorted({path.rsplit(".", 1)[-1] for path in jaxft.leaves(trainable)})
    ['bias']
    """

    create: bool = False

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang zero biases where there are none, if asked to; refuse a model that has nothing to train."""
        del key
        lacking = [n for n in all_linear(model, named_modules(model)) if getattr(n.module, "bias", None) is None]
        if not self.create:
            if not any(leaf == "bias" for _, leaf, _ in parameters(model)):
                raise MethodError(
                    f"BitFit trains biases, and this {type(model).__name__} has none. BitFit(create=True) gives "
                    f"each of its {sum(len(n.names) for n in lacking)} linear layers one, zero at first"
                )
            return
        if not lacking:
            raise MethodError("BitFit(create=True): every linear layer of this model has a bias; use BitFit()")
        make_seams(n.module for n in lacking)
        for n in lacking:
            *lead, _, out = kernel_shape(n.module)
            bias = Delta(jnp.zeros((*lead, out)), axes=(*("layers",) * len(lead), logical_axes(n.module)[1]))
            hang(n.module, "saved", name, Copies({"bias": bias}, None, tuple(lead)))

    def trains(self, path: str, variable: nnx.Variable[Any], name: str) -> bool:
        """Tell whether the leaf is a bias, of the base or created under the adapter's name."""
        is_bias = path.rsplit(".", 1)[-1] == "bias" and isinstance(variable, nnx.Param)
        return is_bias and owner(path) in (None, name)
