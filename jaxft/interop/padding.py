"""The pad token of a classifier on a causal model: transformers finds a row's last token by it, and not by the mask."""

import copy
import json
import re
from typing import Any

from ..models.config import ModelConfig

PADS = re.compile("pad|reserved", re.IGNORECASE)


def padding_of(tokenizer: Any, config: ModelConfig) -> int | None:
    """Return a token that no text ends with, so that what stands before the padding is a row's last token.

    transformers reads the last token of a row whose id is not `pad_token_id`. Where that is the end token, as many
    causal models have it, it would read the token before the end.

    Args:
        tokenizer: The model's tokenizer; None: there is none.
        config: What the model's `config.json` says.

    Returns:
        The tokenizer's own pad token, or else that of `config.json`, another special token that is made for padding,
        the unknown or the begin token, whichever is the first that is not the end token. None: there is none, as for
        GPT-2; transformers then refuses batches of several rows, and reads one row right.

    >>> import jaxft
    >>> from types import SimpleNamespace
    >>> tokenizer = SimpleNamespace(pad_token_id=2, eos_token_id=2, unk_token_id=0)
    >>> padding_of(tokenizer, jaxft.testing.tiny_llama(pad_token_id=2).config)
    0
    """
    declared = json.loads(config.raw).get("pad_token_id")
    own = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "unk", "bos")}
    special = getattr(tokenizer, "added_tokens_decoder", {}).items()
    made = [i for i, token in sorted(special) if token.special and PADS.search(token.content)]
    known = (own["pad"], declared, *made, own["unk"], own["bos"])
    ends = config.stop_ids if tokenizer is None else (own["eos"],)
    return next((i for i in known if i is not None and i not in ends and 0 <= i < config.vocab_size), None)


def padding_with(tokenizer: Any, pad: int | None) -> Any:
    """Return the tokenizer that pads with a token of its own."""
    if tokenizer is None or pad is None or tokenizer.pad_token_id == pad:
        return tokenizer
    made = copy.deepcopy(tokenizer)
    made.pad_token = made.convert_ids_to_tokens(pad)
    return made
