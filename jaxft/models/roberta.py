"""RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): BERTs whose positions begin behind the pad id."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import CheckpointError
from .bert import CLASSIFIER, BertBackbone, BertConfig, BertModel
from .config import ModelConfig
from .encoder import TextClassifier
from .layers import Linear, dropout
from .seams import Context, number

BETWEEN = number("classifier.dropout.2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """The fields of a RoBERTa.

    >>> raw = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> config = RobertaConfig.from_raw({**raw, "intermediate_size": 16, "max_position_embeddings": 66})
    >>> config.first_position, config.n_positions
    (2, 64)
    """

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Read the keys of a RoBERTa's `config.json`."""
        first = (1 if raw.get("pad_token_id") is None else int(raw["pad_token_id"])) + 1
        rows = raw.get("max_position_embeddings", 512)
        if rows <= first:
            raise CheckpointError(f"config.json: max_position_embeddings {rows} leaves no position behind {first}")
        return {**super().parse(raw), "first_position": first, "n_positions": rows - first}


class RobertaModel(BertModel):
    """A RoBERTa without a head: its hidden states, and `pooled`.

    Positions are counted over the real tokens of the mask; transformers counts those whose id is not the pad's.
    """

    model_type = "roberta"
    stem = "roberta"
    config_class: ClassVar[type[ModelConfig]] = RobertaConfig


class RobertaClassificationHead(nnx.Module):
    """`out_proj(dropout(tanh(dense(dropout(x)))))`."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        d = config.hidden_size
        self.dense = Linear(d, d, axes=("embed", "width"), use_bias=True, rngs=rngs)
        self.out_proj = Linear(d, len(config.labels), axes=("embed", "labels"), use_bias=True, rngs=rngs)
        self.rate = config.classifier_dropout

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, 1, D]` to logits `[B, 1, C]`."""
        x = jnp.tanh(self.dense(dropout(x, self.rate, ctx.key_for(CLASSIFIER)), ctx))
        return self.out_proj(dropout(x, self.rate, ctx.key_for(BETWEEN)), ctx)


class RobertaForSequenceClassification(TextClassifier):
    """A RoBERTa that classifies, by a head of its own in place of the pooler."""

    model_type = "roberta"
    prefix = stem = "roberta"
    config_class: ClassVar[type[ModelConfig]] = RobertaConfig
    default_targets, default_ia3 = BertModel.default_targets, BertModel.default_ia3
    heads = ("classifier",)
    renames, disposable = BertModel.renames, BertModel.disposable + r"|roberta\.pooler\..*"

    def __init__(self, config: RobertaConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        self.roberta = BertBackbone(config, pooler=False, rngs=rngs)
        self.classifier = RobertaClassificationHead(config, rngs=rngs)

    def classify(self, first: jax.Array, ctx: Context) -> jax.Array:
        """Map the hidden states of first tokens `[B, 1, D]` to logits `[B, 1, C]`."""
        return self.classifier(first, ctx)


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLMRobertaConfig(RobertaConfig):
    """The fields of an XLM-RoBERTa, which are a RoBERTa's."""


class XLMRobertaModel(RobertaModel):
    """An XLM-RoBERTa without a head."""

    model_type = "xlm-roberta"
    config_class = XLMRobertaConfig


class XLMRobertaForSequenceClassification(RobertaForSequenceClassification):
    """An XLM-RoBERTa that classifies."""

    model_type = "xlm-roberta"
    config_class = XLMRobertaConfig
