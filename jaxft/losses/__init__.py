"""Losses as pure functions: one formula each, float32 inside, masked, safe where a mask leaves nothing."""

from .language import cross_entropy, next_token_loss

__all__ = ["cross_entropy", "next_token_loss"]
