"""Texts and images to vectors: pooled, in batches of like length, returned in the order in which they were given."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .data.columns import pad, tokens_of
from .data.formats import text_of
from .errors import DataError, refuse

Array = np.ndarray[Any, Any]


def embed(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    normalize: bool | None = None,
) -> Array:
    """Return one vector for each text.

    Args:
        model: Any model of ours; it pools as its `config.pooling` says (a sentence-transformers folder brings that).
        tokenizer: Its tokenizer.
        texts: The texts, none of them empty.
        batch_size: Texts at a time; it changes nothing but speed.
        max_length: Tokens of a text at most, the rest is cut off; None: what the model has positions for, or what its
            sentence-transformers folder says.
        normalize: Whether each vector gets length 1; None: as the folder says, else not.

    Returns:
        `[N, D]` float32.

    Raises:
        DataError: Texts that are empty or none, each with its number.

    >>> import jaxft
    >>> model, tokenizer = jaxft.testing.tiny_llama(), jaxft.testing.ToyTokenizer()
    >>> jaxft.embed(model, tokenizer, ["ab", "abc"], normalize=True).shape
    (2, 32)
    """
    check_texts(texts)
    length = longest(model) if max_length is None else max_length
    rows = [tokens_of(tokenizer, text, None, length)[0] for text in texts]
    return scaled(embed_rows(model, rows, batch_size), model, normalize)


def embed_rows(model: Any, rows: Sequence[Mapping[str, Array]], batch_size: int = 32) -> Array:
    """Return the pooled vectors `[N, D]` float32 of texts given as tokens, rows of like length together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    out: list[tuple[list[int], Any]] = []
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = pad([rows[i] for i in picked], batch_size, longest(model))
        out.append((picked, pooled(model, batch)))
    return _gathered(out, len(rows))


def embed_images(model: Any, images: Array, batch_size: int = 32) -> Array:
    """Return the pooled vectors `[N, D]` float32 of images `[N, C, H, W]`, prepared as the model wants them."""
    out: list[tuple[list[int], Any]] = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        full = np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), part.dtype)])
        out.append((list(range(start, start + len(part))), pooled(model, {"pixel_values": full})))
    return _gathered(out, len(images))


@jax.jit
def pooled(model: Any, inputs: Mapping[str, Any]) -> jax.Array:
    """Return a model's pooled vectors of a batch, compiled once for a structure and shape."""
    return model.pooled(**inputs)


def _gathered(batches: list[tuple[list[int], Any]], rows: int) -> Array:
    """Put the vectors of batches, which may still be computed, in their places."""
    if not batches:
        raise DataError("there is nothing to embed")
    out = np.empty((rows, batches[0][1].shape[-1]), np.float32)
    for places, vectors in batches:
        out[places] = np.asarray(vectors)[: len(places)]
    return out


def scaled(vectors: Array, model: Any, normalize: bool | None = None) -> Array:
    """Return vectors of length 1 where that is asked for, or is the model's way; one of zeros stays as it is."""
    if not (model.config.normalize if normalize is None else normalize):
        return vectors
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def longest(model: Any) -> int:
    """Return how many tokens a text may have: by its positions, and by its sentence-transformers folder."""
    limits = [model.positions_left(), model.config.max_seq_length]
    return min((limit for limit in limits if limit is not None), default=1 << 30)


def check_texts(texts: Sequence[str]) -> None:
    """Refuse texts that cannot be embedded, each with its number."""
    problems = []
    for n, text in enumerate(texts):
        try:
            text_of({"text": text}, "text")
        except DataError as error:
            problems.append(f"text {n}: {error}")
    refuse(DataError, "texts that cannot be embedded", problems)
