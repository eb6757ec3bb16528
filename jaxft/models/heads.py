"""Classification heads on the causal families: `score`, without a bias, of a row's last real token."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .base import arrays, called, refuse_packed
from .causal import CausalLM, Decoder
from .gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from .gpt2 import GPT2LMHeadModel
from .layers import Linear
from .llama import LlamaForCausalLM
from .mistral import MistralForCausalLM
from .pooling import pool
from .qwen import Qwen2ForCausalLM, Qwen3ForCausalLM

COPIED = ("model_type", "prefix", "stem", "config_class", "default_targets", "default_ia3")


class LastTokenClassifier(Decoder):
    """A causal backbone with a classification head, named as in transformers.

    The last real token is that of the attention mask, never of a pad id, which may be a token's own. (transformers
    goes by the id; beside a mask that tells the same it is the same.)
    """

    task_type = "SEQ_CLS"
    reads = "last"
    heads = ("score",)
    family: type[CausalLM]

    def __init_subclass__(cls, family: type[CausalLM], **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.family = family
        for name in COPIED:
            setattr(cls, name, getattr(family, name))
        cls.disposable = "|".join(filter(None, (family.disposable, r"lm_head\.weight")))

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        super().__init__(config)
        setattr(self, self.prefix, self.family.make_backbone(config, rngs))
        self.score = Linear(config.hidden_size, len(config.labels), axes=("embed", "labels"), rngs=rngs)

    def answer(self, inputs: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """Return logits `[B, C]`, in the model's dtype."""
        refuse_packed(inputs)
        hidden = self.hidden(**inputs, key=key)
        mode = self.head_pooling or self.reads
        last = pool(hidden, inputs.get("attention_mask"), mode).astype(self.dtype)
        return self.score(last[:, None], self.context(len(last), key))[:, 0]

    def scores(self, inputs: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """Return what the head says at every token `[B, T, C]`, float32: the values of a critic."""
        refuse_packed(inputs)
        hidden = self.hidden(**inputs, key=key)
        return self.score(hidden, self.context(len(hidden), key)).astype(jnp.float32)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits of every row.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, zero at padding, which may stand left or right.
            position_ids: `[B, T]`; by default counted over the real tokens of the row.
            key: Dropout key. None: no dropout.

        Returns:
            `[B, C]`, in the model's dtype.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return called(self, arrays(given), key)

    def config_keys(self) -> dict[str, Any]:
        """Return the keys of `config.json` that follow from which leaves there are."""
        return self.family.backbone_keys(self.backbone)


class LlamaForSequenceClassification(LastTokenClassifier, family=LlamaForCausalLM):
    """A Llama that classifies."""


class MistralForSequenceClassification(LastTokenClassifier, family=MistralForCausalLM):
    """A Mistral that classifies."""


class Qwen2ForSequenceClassification(LastTokenClassifier, family=Qwen2ForCausalLM):
    """A Qwen2 or 2.5 that classifies."""


class Qwen3ForSequenceClassification(LastTokenClassifier, family=Qwen3ForCausalLM):
    """A Qwen3 that classifies."""


class Gemma2ForSequenceClassification(LastTokenClassifier, family=Gemma2ForCausalLM):
    """A Gemma 2 that classifies."""


class Gemma3TextForSequenceClassification(LastTokenClassifier, family=Gemma3ForCausalLM):
    """The text model of a Gemma 3 that classifies."""


class GPT2ForSequenceClassification(LastTokenClassifier, family=GPT2LMHeadModel):
    """A GPT-2 that classifies."""
