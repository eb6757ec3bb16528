"""Losses as pure functions: one formula each, float32 inside, masked, safe where a mask leaves nothing."""

from .cached import embed_in_chunks
from .chunked import chunked_cross_entropy
from .classification import classification_loss
from .contrastive import info_nce, nt_xent, supervised_contrastive
from .entropy import cross_entropy
from .graded import cosent, cosine_regression, pairwise_contrastive, triplet
from .language import next_token_figures, next_token_loss
from .masks import different_label_mask, different_text_mask
from .pairs import make_contrastive_loss

__all__ = [
    "chunked_cross_entropy",
    "classification_loss",
    "cosent",
    "cosine_regression",
    "cross_entropy",
    "different_label_mask",
    "different_text_mask",
    "embed_in_chunks",
    "info_nce",
    "make_contrastive_loss",
    "next_token_figures",
    "next_token_loss",
    "nt_xent",
    "pairwise_contrastive",
    "supervised_contrastive",
    "triplet",
]
