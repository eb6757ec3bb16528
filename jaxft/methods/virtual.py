"""What the methods that put virtual tokens before the sequence have in common."""

from typing import Any

from ..errors import MethodError
from ..models.seams import number
from .encoders import Virtual
from .method import Method, hang

WHAT = {"past": "keys and values are put before the sequence", "prompt": "vectors are put before the embedded sequence"}


def check_seam(method: Method, model: Any, slot: str, places: int) -> None:
    """Refuse a model that lacks the seam, or whose table of positions has no room left.

    Args:
        method: Named in the message.
        model: The model.
        slot: `"past"` or `"prompt"`.
        places: Positions that the method takes.
    """
    what = type(method).__name__
    if not hasattr(model, slot):
        raise MethodError(
            f"{what}: this {type(model).__name__} has no `{slot}` seam, where {WHAT[slot]}; the models that jaxft.load "
            "makes have it"
        )
    left = model.positions_left()
    if left is not None and places >= left:
        raise MethodError(
            f"{what}: num_virtual_tokens={places} leaves no room for a token: of this model's "
            f"{model.config.n_positions} positions {left} are free, so give at most {left - 1}"
        )


def hang_virtual(model: Any, slot: str, name: str, *parts: Any, **options: Any) -> None:
    """Hang virtual tokens at the model, under the adapter's name."""
    hang(model, slot, name, Virtual(*parts, **options, number=number(f"{slot}.{name}")))
