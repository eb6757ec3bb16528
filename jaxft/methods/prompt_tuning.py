"""Prompt tuning (Lester et al. 2021): trained vectors before the embedded sequence."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from ..errors import MethodError, refuse
from ..models.names import variables
from ..models.seams import Context
from .checks import choice, whole_number
from .method import Method, owner
from .tokens import are_ids, frozen_ids
from .virtual import check_seam, hang_virtual

INITS = ("vocab", "random", "text")


@dataclasses.dataclass(frozen=True)
class PromptTuning(Method):
    """P trained vectors before the embedded sequence, which see nothing of it and are seen by all of it.

    Not the identity at step 0. What is said in `PTuning` of weights, of several prompts, and of how they are read
    holds here. Where a family scales its embeddings (Gemma), the vectors are not scaled, as in `peft`.

    Attributes:
        num_virtual_tokens: P.
        init: `"vocab"`, the vectors of words drawn from the model's vocabulary (peft's SAMPLE_VOCAB); `"random"`,
            N(0, 1) as in peft, far from the scale of most models' words (of a model that reads pictures, the only
            one); or `"text"`, the words of a text, repeated or cut to P tokens.
        init_text: The text.
        init_ids: Its token ids, instead of it.
        tokenizer_name_or_path: Folder of the tokenizer for `init_text`; None: the folder that the model came from.

    Raises:
        MethodError: An option out of range, a model without the seam, no position left for a token, or a text that
            cannot be tokenised.

    >>> import jaxft
    >>> model = jaxft.testing.tiny_llama()
    >>> method = jaxft.PromptTuning(num_virtual_tokens=5, init="text", init_ids=(7, 8))
    >>> jaxft.leaves(jaxft.partition(model, method)[0])["prompt.default.vectors"].shape
    (5, 32)
    """

    num_virtual_tokens: int = 20
    init: str = "vocab"
    init_text: str | None = None
    init_ids: tuple[int, ...] = ()
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_ids", frozen_ids(self.init_ids))
        problems = [*whole_number(num_virtual_tokens=self.num_virtual_tokens), *choice(INITS, init=self.init)]
        if not are_ids(self.init_ids):
            problems.append(f"init_ids={self.init_ids!r}: give ids of tokens")
        if (self.init == "text") is not ((self.init_text is None) is bool(self.init_ids)):
            problems.append(f'init={self.init!r}: init="text" needs init_text or init_ids, one of them, no other init')
        if self.tokenizer_name_or_path is not None and self.init_text is None:
            problems.append("tokenizer_name_or_path is for init_text")
        refuse(MethodError, "PromptTuning: options that cannot be", problems)

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang the vectors at the model."""
        check_seam(self, model, "prompt", self.num_virtual_tokens)
        c, p = model.config, self.num_virtual_tokens
        reads_words = "input_ids" in getattr(model, "inputs", ("input_ids",))
        if self.init == "text" and not reads_words:
            raise MethodError('PromptTuning: init="text" takes tokens, and this model reads none: init="random"')
        if self.init == "random" or not reads_words:
            vectors = jax.random.normal(key, (p, c.hidden_size))
        else:
            drawn = jax.random.randint(key, (1, p), 0, c.vocab_size)
            ids = drawn if self.init == "vocab" else jnp.resize(jnp.array(self._ids(c)), (1, p))
            others = tuple(dict.fromkeys(o for path in variables(model) if (o := owner(path)) is not None))
            off = Context(weights=jnp.zeros(len(others)), names=others, mesh=c.mesh)
            words = model.backbone.embed(ids, off)
            vectors = words[0].astype(jnp.float32)
        hang_virtual(model, "prompt", name, vectors)

    def loaded(self) -> Self:
        """Return the method as it stands where the vectors are read from a file: no text is needed to begin with."""
        return dataclasses.replace(self, init="random", init_text=None, init_ids=(), tokenizer_name_or_path=None)

    def _ids(self, config: Any) -> list[int]:
        """Return the token ids of the text."""
        ids = list(self.init_ids)
        if self.init_text is not None:
            from transformers import AutoTokenizer

            source = self.tokenizer_name_or_path or config.source
            try:
                ids = AutoTokenizer.from_pretrained(source)(self.init_text)["input_ids"]
            except Exception as error:  # whatever a missing or damaged folder makes of it
                raise MethodError(
                    f"PromptTuning: init_text needs a tokenizer, and {source!r} gives none ({type(error).__name__}); "
                    "name its folder in tokenizer_name_or_path, or give init_ids"
                ) from None
        outside = [i for i in ids if not isinstance(i, int) or not 0 <= i < config.vocab_size]
        if outside or not ids:
            raise MethodError(
                f"PromptTuning: {outside or 'no ids'} of the text, in a vocabulary of {config.vocab_size}"
            )
        return ids
