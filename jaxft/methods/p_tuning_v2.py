"""P-tuning v2 (Liu et al. 2022): prompts in every layer, with dropout, and a choice of what makes them."""

import dataclasses
from typing import Any

import jax

from ..errors import MethodError, refuse
from .checks import choice, rate, whole_number
from .encoders import MLP, Transformer
from .method import Method
from .prefix_tuning import widths
from .virtual import check_seam, hang_virtual

ENCODERS = ("none", "mlp", "transformer")


@dataclasses.dataclass(frozen=True)
class PTuningV2(Method):
    """A prefix in every layer, dropped out in training as the authors do, made by nothing, an MLP or a Transformer.

    What stands before the sequence is what it is in `PrefixTuning`, and what is said there holds here. `peft` loads it
    as PREFIX_TUNING; the encoder is saved beside, so that training goes on here.

    Attributes:
        num_virtual_tokens: P.
        dropout: Rate on the keys and values, drawn for each row of a batch.
        encoder: `"none"`, the default of the authors' code; `"mlp"`, their `prefix_projection`; or `"transformer"`,
            blocks through which the virtual tokens see each other, and a linear layer.
        encoder_hidden_size: Width inside the encoder's MLPs; None: that of a layer's keys.
        encoder_num_layers: Blocks of the Transformer.
        position_offset: As in `PrefixTuning`.

    Raises:
        MethodError: An option out of range, a model without the seam, or no position left for a token.

    >>> import jaxft
    >>> method = jaxft.PTuningV2(num_virtual_tokens=5, encoder="transformer", encoder_num_layers=1)
    >>> jaxft.parameter_report(jaxft.testing.tiny_llama(), method).trainable
    2864
    """

    num_virtual_tokens: int = 20
    dropout: float = 0.1
    encoder: str = "none"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    position_offset: bool = True

    def __post_init__(self) -> None:
        numbers = {"num_virtual_tokens": self.num_virtual_tokens, "encoder_num_layers": self.encoder_num_layers}
        if self.encoder_hidden_size is not None:
            numbers["encoder_hidden_size"] = self.encoder_hidden_size
        problems = [*whole_number(**numbers), *rate(dropout=self.dropout), *choice(ENCODERS, encoder=self.encoder)]
        refuse(MethodError, "PTuningV2: options that cannot be", problems)

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang the prefix, or what makes it, at the model."""
        check_seam(self, model, "past", self.num_virtual_tokens if self.position_offset else 0)
        width, out = widths(model)
        a, b = jax.random.split(key)
        vectors = jax.random.normal(a, (self.num_virtual_tokens, out if self.encoder == "none" else width))
        hidden = self.encoder_hidden_size or width
        encoder: Any = None
        if self.encoder == "none":
            vectors = 0.02 * vectors
        elif self.encoder == "mlp":
            encoder = MLP((width, hidden, out), "tanh", b)
        else:
            heads = model.config.num_key_value_heads
            encoder = Transformer(width, heads, hidden, self.encoder_num_layers, out, b)
        options = {"position_offset": self.position_offset, "rate": self.dropout}
        hang_virtual(model, "past", name, vectors, encoder, **options)
