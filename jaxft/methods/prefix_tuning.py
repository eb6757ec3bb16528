"""Prefix tuning (Li and Liang 2021): trained keys and values before the sequence, in every layer."""

import dataclasses
from typing import Any

import jax

from ..errors import MethodError, refuse
from .checks import choice, whole_number
from .encoders import MLP
from .method import Method
from .virtual import check_seam, hang_virtual

INITS = {"default": 0.02, "random": 1.0}  # standard deviation of the flat prefix


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Method):
    """P keys and values before those of the sequence: themselves trained, or `W2 tanh(W1 e + b1) + b2` of P vectors e.

    Not the identity at step 0: whatever the prefix holds takes part in the softmax. A prefix of weight w counts in it
    as w prefixes would, one of weight 0 not at all; several active ones stand one after the other. The keys are not
    rotated, and in a layer with a sliding window each place counts as a token's does, all as in `peft`. The network of
    `prefix_projection` is saved beside the prefix that it makes, which is all that `peft` reads (and all it keeps).

    Attributes:
        num_virtual_tokens: P.
        prefix_projection: Train vectors and a network that makes the prefix from them (the authors' way).
        encoder_hidden_size: Width between its two layers; None: that of a layer's keys, as in peft.
        position_offset: Count the sequence's positions from P on, as `peft` does; False: from 0, as `adapters` does.
        init: Of a prefix without projection: `"default"` N(0, 0.02^2), or `"random"` N(0, 1) as in peft. With it, the
            vectors are N(0, 1) and the network is drawn as PyTorch's, as in peft.

    Raises:
        MethodError: An option out of range, a model without the seam, or no position left for a token.

    >>> import jaxft
    >>> print(jaxft.parameter_report(jaxft.testing.tiny_llama(), jaxft.PrefixTuning(num_virtual_tokens=5)).modules)
    {'past': 320}
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    position_offset: bool = True
    init: str = "default"

    def __post_init__(self) -> None:
        numbers: dict[str, Any] = {"num_virtual_tokens": self.num_virtual_tokens}
        if self.encoder_hidden_size is not None:
            numbers["encoder_hidden_size"] = self.encoder_hidden_size
        problems = [*whole_number(**numbers), *choice(INITS, init=self.init)]
        refuse(MethodError, "PrefixTuning: options that cannot be", problems)

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang the prefix, or what makes it, at the model."""
        check_seam(self, model, "past", self.num_virtual_tokens if self.position_offset else 0)
        width, out = widths(model)
        p = self.num_virtual_tokens
        a, b = jax.random.split(key)
        vectors, encoder = jax.random.normal(a, (p, width if self.prefix_projection else out)), None
        if self.prefix_projection:
            encoder = MLP((width, self.encoder_hidden_size or width, out), "tanh", b)
        else:
            vectors = INITS[self.init] * vectors
        hang_virtual(model, "past", name, vectors, encoder, position_offset=self.position_offset)


def widths(model: Any) -> tuple[int, int]:
    """Return how wide the keys of one layer are, which is not `hidden / heads` everywhere, and a place of a prefix."""
    c = model.config
    width = c.num_key_value_heads * c.head_dim
    return width, 2 * c.num_hidden_layers * width
