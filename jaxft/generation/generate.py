"""Text from a model: prompts padded left to a bucket, one prefill, one while-loop over a cache."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import GenerationError
from .sampling import sample

BUCKET = 32  # prompts and new tokens are rounded up to a power of two of at least this: few shapes, few compilations


def generate(
    model: Any,
    tokenizer: Any,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
) -> list[str]:
    """Continue texts. Greedily, each row is continued as it would be alone; drawn, row b draws with key b of the seed.

    Args:
        model: A causal language model; its active adapters take part.
        tokenizer: Its tokenizer; special tokens are added as it does by itself.
        prompts: Texts of any lengths.
        max_new_tokens: At most so many tokens are added.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_k: Draw from the k likeliest; 0: from all.
        top_p: Then from the smallest set of these that holds this probability.
        seed: Of the draws.
        stop_ids: Tokens that end a text; by default those of generation config, model config and tokenizer together.

    Returns:
        The continuations, without the prompts and without special tokens.

    Raises:
        GenerationError: No tokenizer, no prompt, an empty prompt, an option out of range, or more tokens than the
            model has positions.

    >>> import jaxft
    >>> jaxft.generate(jaxft.testing.tiny_llama(), jaxft.testing.ToyTokenizer(), ["abc", "a"], max_new_tokens=0)
    ['', '']
    """
    if tokenizer is None:
        raise GenerationError("generate turns text into tokens and back: give a tokenizer, or use jaxft.generate_ids")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    stop_ids = stops_of(model, tokenizer) if stop_ids is None else stop_ids
    new = generate_ids(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids,
    )
    return [_continuation(tokenizer, prompt, row) for prompt, row in zip(ids, new, strict=True)]


def stops_of(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: those of generation config, model config and tokenizer together."""
    return sorted({*model.config.stop_ids, *_ids(tokenizer.eos_token_id)})


def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue rows of token ids; arguments as of `generate`.

    Returns:
        The new ids of each row, up to and without the token that stopped it.

    >>> import jaxft
    >>> [len(row) for row in jaxft.generate_ids(jaxft.testing.tiny_llama(), [[1, 2, 3], [4]], max_new_tokens=5)]
    [5, 5]
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    stops = sorted(set(model.config.stop_ids if stop_ids is None else stop_ids))
    if max_new_tokens == 0:
        return [[] for _ in prompts]
    width, room, rows = _bucket(max(map(len, prompts))), _bucket(max_new_tokens), len(prompts)
    positions = model.positions_left()
    if positions is not None:
        width, room = min(width, positions), min(room, positions)
    ids, valid = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], valid[row, width - len(prompt) :] = prompt, True
    stopping = np.zeros(model.config.vocab_size, bool)
    stopping[[s for s in stops if 0 <= s < model.config.vocab_size]] = True
    draw = temperature > 0
    knobs = (jnp.float32(temperature if draw else 1), jnp.int32(top_k), jnp.float32(top_p), jax.random.key(seed))
    new, lengths = decode_loop(
        model, jnp.asarray(ids), jnp.asarray(valid), jnp.asarray(stopping), jnp.int32(max_new_tokens), knobs, room, draw
    )
    return [row[:n].tolist() for row, n in zip(np.asarray(new), np.asarray(lengths), strict=True)]


@partial(jax.jit, static_argnames=("room", "draw"))
def decode_loop(
    model: Any,
    ids: jax.Array,
    valid: jax.Array,
    stopping: jax.Array,
    limit: jax.Array,
    knobs: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    room: int,
    draw: bool,
) -> tuple[jax.Array, jax.Array]:
    """Read the prompts, then write one token a row until every row has stopped or `limit` is reached.

    Args:
        model: A causal language model.
        ids: `[B, T]` prompts, padded left.
        valid: `[B, T]` bool, False at padding.
        stopping: `[V]` bool: tokens that end a row.
        limit: New tokens at most, a value: it compiles nothing.
        knobs: Temperature, top_k, top_p and key of the draws, values too.
        room: New tokens that there is memory for.
        draw: Draw tokens, or take the likeliest.

    Returns:
        `[B, room]` new tokens, zeros after the one that stopped a row; and `[B]` how many there are before that one.
    """
    rows, width = ids.shape
    temperature, top_k, top_p, key = knobs
    lengths = valid.sum(1)
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    hidden, cache = model.decode(ids, valid, positions, model.empty_cache(rows, width + room))

    def choose(hidden: jax.Array, n: jax.Array) -> jax.Array:
        logits = model.head(hidden[:, -1:])[:, 0].astype(jnp.float32)
        if draw:
            return sample(logits, jax.random.fold_in(key, n), temperature, top_k, top_p).astype(jnp.int32)
        return logits.argmax(-1).astype(jnp.int32)

    def unfinished(carry: Any) -> jax.Array:
        n, _, _, _, stopped, _ = carry
        return (n < limit) & ~stopped.all()

    def write(carry: Any) -> Any:
        n, token, out, count, stopped, cache = carry
        out = jax.lax.dynamic_update_slice(out, jnp.where(stopped, 0, token)[:, None], (0, n))
        stopped = stopped | stopping[token]
        count = count + ~stopped
        real = jnp.ones((rows, 1), bool)
        hidden, cache = model.decode(token[:, None], real, (lengths + n)[:, None], cache)
        return n + 1, choose(hidden, n + 1), out, count, stopped, cache

    start = (
        jnp.int32(0),
        choose(hidden, jnp.int32(0)),
        jnp.zeros((rows, room), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
        cache,
    )
    _, _, out, count, _, _ = jax.lax.while_loop(unfinished, write, start)
    return out, count


def _check(model: Any, prompts: Any, new: int, temperature: float, top_k: int, top_p: float) -> None:
    if getattr(model, "task_type", None) == "SEQ_CLS":
        raise GenerationError(
            f"a {type(model).__name__} scores texts and writes none, as a reward model and a classifier do: give a "
            "language model or its SFT run"
        )
    if not hasattr(model, "decode"):
        raise GenerationError(f"a {type(model).__name__} cannot be decoded from; of a TrainState give state.model")
    if isinstance(new, bool) or not isinstance(new, int):
        raise GenerationError(f"max_new_tokens={new!r}: give a whole number")
    if len(prompts) == 0:
        raise GenerationError("no prompt was given")
    if not all(hasattr(p, "__len__") and all(isinstance(i, (int, np.integer)) for i in p) for p in prompts):
        raise GenerationError("prompts of ids are rows of whole numbers, [[1, 2, 3], [4]] say")
    empty = [row for row, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise GenerationError(f"prompts {empty} have no token; a model continues at least one (a begin token, say)")
    outside = sorted({i for prompt in prompts for i in prompt if not 0 <= i < model.config.vocab_size})
    if outside:
        raise GenerationError(f"token ids {outside[:5]} are outside the vocabulary of {model.config.vocab_size}")
    if new < 0:
        raise GenerationError(f"max_new_tokens={new}: give at least 0")
    if not 0 <= temperature < float("inf") or top_k < 0 or not 0 < top_p <= 1:
        raise GenerationError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: temperature and top_k are at least 0, "
            "top_p is above 0 and at most 1"
        )
    positions = model.positions_left()
    longest = max(map(len, prompts))
    if positions is not None and longest + new > positions:
        raise GenerationError(
            f"a prompt of {longest} tokens and {new} new ones: this model has {positions} positions"
            + (" beside those of its virtual tokens" if positions < model.config.n_positions else "")
        )


def _bucket(n: int) -> int:
    size = BUCKET
    while size < n:
        size *= 2
    return size


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Decode what was added, with the space before its first word, which a tokenizer drops at a text's beginning."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)
