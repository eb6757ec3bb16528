"""P-tuning (Liu et al. 2021): virtual tokens before the embedded sequence, made by a small network."""

import dataclasses
from typing import Any

import jax

from ..errors import MethodError, refuse
from .checks import choice, rate, whole_number
from .encoders import LSTM, MLP
from .method import Method
from .virtual import check_seam, hang_virtual

ENCODERS = ("mlp", "lstm", "none")


@dataclasses.dataclass(frozen=True)
class PTuning(Method):
    """P vectors through an MLP or an LSTM, then before the embedded sequence; the network is that of `peft`.

    Not the identity at step 0. A prompt of weight w counts in the softmax of the tokens behind it as w would, one of
    weight 0 is not there; several active ones stand one after the other. In training the virtual tokens are read once
    for a batch: they see nothing of the rows, so dropout of the base is drawn for them once too.

    The loss is over the tokens of the rows: the first of a row is not predicted from the last virtual token, as `peft`
    does where its label is not -100.

    Attributes:
        num_virtual_tokens: P.
        encoder: `"mlp"` (`Linear - ReLU - Linear - ReLU - Linear`), `"lstm"` (both directions, then
            `Linear - ReLU - Linear`), or `"none"`: what is left in a folder of peft's, which keeps no encoder.
        encoder_hidden_size: Width inside; None: the model's, as in peft.
        encoder_num_layers: Layers of the LSTM.
        encoder_dropout: Rate between the layers of the LSTM.

    Raises:
        MethodError: An option out of range, a model without the seam, or no position left for a token.

    >>> import jaxft
    >>> method = jaxft.PTuning(num_virtual_tokens=5, encoder_hidden_size=8)
    >>> jaxft.parameter_report(jaxft.testing.tiny_llama(), method).trainable
    784
    """

    num_virtual_tokens: int = 20
    encoder: str = "mlp"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        numbers = {"num_virtual_tokens": self.num_virtual_tokens, "encoder_num_layers": self.encoder_num_layers}
        if self.encoder_hidden_size is not None:
            numbers["encoder_hidden_size"] = self.encoder_hidden_size
        problems = [*whole_number(**numbers), *choice(ENCODERS, encoder=self.encoder)]
        refuse(MethodError, "PTuning: options that cannot be", [*problems, *rate(encoder_dropout=self.encoder_dropout)])

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang the vectors and their encoder at the model."""
        check_seam(self, model, "prompt", self.num_virtual_tokens)
        d = model.config.hidden_size
        hidden = self.encoder_hidden_size or d
        a, b = jax.random.split(key)
        encoder: Any = None
        if self.encoder == "mlp":
            encoder = MLP((d, hidden, hidden, d), "relu", b)
        elif self.encoder == "lstm":
            encoder = LSTM(d, hidden, self.encoder_num_layers, self.encoder_dropout, b)
        hang_virtual(model, "prompt", name, jax.random.normal(a, (self.num_virtual_tokens, d)), encoder)
