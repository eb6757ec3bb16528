"""What is wrong with the options of `LoRA`: everything at once."""

import math
from collections.abc import Iterable
from typing import Any

from .checks import choice, rate
from .low_rank import INITS
from .matching import pattern_error
from .tokens import token_problems

BIASES = ("none", "all", "lora_only")
PISSA = "pissa"


def lora_problems(lora: Any) -> Iterable[str]:
    """Yield the problems of a `LoRA`, each with its field, its value and what to give."""
    ranks = [("r", lora.r), *((f"rank_pattern[{key!r}]", r) for key, r in lora.rank_pattern)]
    for option, r in ranks:
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            yield f"{option}={r!r}: a rank is a whole number of at least 1"
    alphas = [("alpha", lora.alpha), *((f"alpha_pattern[{key!r}]", a) for key, a in lora.alpha_pattern)]
    for option, alpha in alphas:
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            yield f"{option}={alpha!r}: give a finite number"
        elif lora.init == PISSA and alpha <= 0:
            yield f"{option}={alpha!r}: init={PISSA!r} needs a scale above 0"
    yield from rate(dropout=lora.dropout)
    yield from choice(BIASES, bias=lora.bias)
    yield from choice((*INITS, PISSA), init=lora.init)
    if lora.use_dora and lora.init == PISSA:
        yield f"use_dora=True with init={PISSA!r}: choose one of the two"
    yield from selection_problems(lora)
    patterns = [key for key, _ in (*lora.rank_pattern, *lora.alpha_pattern)]
    for key in [*patterns, *((lora.layers_pattern,) if isinstance(lora.layers_pattern, str) else ())]:
        if (error := pattern_error(key)) is not None:
            yield f"{key!r} is not a regular expression: {error}"
    if not all(isinstance(i, int) and i >= 0 for i in lora.layers or ()):
        yield f"layers={lora.layers!r}: give indices of layers"
    if lora.layers is not None and (not lora.layers or isinstance(lora.target_modules, str)):
        yield f"layers={lora.layers!r}: name at least one, and give target_modules as names"
    yield from token_problems(lora.trainable_tokens)


def selection_problems(method: Any) -> Iterable[str]:
    """Yield what is wrong with the names that a method takes."""
    for option in ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules", "modules_to_save"):
        given = getattr(method, option, None)
        if not all(isinstance(name, str) and name for name in (given or ())):
            yield f"{option}={given!r}: give names, or one regular expression"
    if method.target_modules == ():
        yield "target_modules=(): name at least one module"
