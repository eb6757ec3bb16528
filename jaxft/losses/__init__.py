"""Losses as pure functions: one formula each, float32 inside, masked, safe where a mask leaves nothing."""

from .chunked import chunked_cross_entropy
from .entropy import cross_entropy
from .language import next_token_figures, next_token_loss

__all__ = ["chunked_cross_entropy", "cross_entropy", "next_token_figures", "next_token_loss"]
