"""Losses as pure functions: one formula each, float32 inside, masked, safe where a mask leaves nothing."""

from .cached import embed_in_chunks
from .chunked import chunked_cross_entropy
from .classification import classification_loss
from .comparisons import make_dpo_loss, make_reward_loss, reference_log_probs
from .contrastive import info_nce, nt_xent, supervised_contrastive
from .entropy import cross_entropy
from .graded import cosent, cosine_regression, pairwise_contrastive, triplet
from .grpo import group_advantages, grpo_loss
from .language import next_token_figures, next_token_loss
from .log_probs import token_log_probs
from .masks import different_label_mask, different_text_mask
from .pairs import make_contrastive_loss
from .ppo import (
    approximate_kl,
    clip_fraction,
    explained_variance,
    generalized_advantage_estimation,
    kl_penalty,
    masked_mean,
    place_rewards,
    ppo_policy_loss,
    ppo_value_loss,
    whiten,
    with_place_after,
)
from .preference import dpo_loss, kto_loss, ranking_loss, reward_loss

__all__ = [
    "approximate_kl",
    "chunked_cross_entropy",
    "classification_loss",
    "clip_fraction",
    "cosent",
    "cosine_regression",
    "cross_entropy",
    "different_label_mask",
    "different_text_mask",
    "dpo_loss",
    "embed_in_chunks",
    "explained_variance",
    "generalized_advantage_estimation",
    "group_advantages",
    "grpo_loss",
    "info_nce",
    "kl_penalty",
    "kto_loss",
    "make_contrastive_loss",
    "make_dpo_loss",
    "make_reward_loss",
    "masked_mean",
    "next_token_figures",
    "next_token_loss",
    "nt_xent",
    "pairwise_contrastive",
    "place_rewards",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "reference_log_probs",
    "reward_loss",
    "supervised_contrastive",
    "token_log_probs",
    "triplet",
    "whiten",
    "with_place_after",
]
