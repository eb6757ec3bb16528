"""Texts and images to vectors: pooled, in batches of like length, returned in the order in which they were given."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .data.columns import check_room, pad, text_width
from .data.formats import text_of
from .data.images import ImageDataset
from .errors import DataError, refuse

Array = np.ndarray[Any, Any]
BATCH_SIZE = 32


def embed(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    normalize: bool | None = None,
) -> Array:
    """Return one vector for each text.

    Args:
        model: Any model of ours; it pools as its `config.pooling` says (a sentence-transformers folder brings that).
        tokenizer: Its tokenizer.
        texts: The texts, none of them empty.
        batch_size: Texts of 64 tokens at a time; of longer ones fewer, of shorter ones up to twice as many. It changes
            nothing but speed.
        max_length: Tokens of a text at most, the rest is cut off; None: what the model has positions for, or what its
            sentence-transformers folder says.
        normalize: Whether each vector gets length 1; None: as the folder says, else not.

    Returns:
        `[N, D]` float32.

    Raises:
        DataError: Texts that are empty or none, each with its number; or a `max_length` without room for a text.

    >>> import jaxft
    >>> model, tokenizer = jaxft.testing.tiny_llama(), jaxft.testing.ToyTokenizer()
    >>> jaxft.embed(model, tokenizer, ["ab", "abc"], normalize=True).shape
    (2, 32)
    """
    check_texts(texts)
    length = longest(model) if max_length is None else max_length
    check_room(tokenizer, length)
    found = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]  # at once: in parallel, and quick
    return scaled(embed_rows(model, [{"input_ids": ids} for ids in found], batch_size), model, normalize)


def embed_rows(model: Any, rows: Sequence[Mapping[str, Any]], batch_size: int = BATCH_SIZE) -> Array:
    """Return the pooled vectors `[N, D]` float32 of texts given as tokens, rows of like length together.

    The longest come first: every batch is full but for the last, of the shortest, and each width has one program.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    limit, start = longest(model), 0
    out: list[tuple[list[int], Any]] = []
    while start < len(order):
        width, count = shape_of(len(rows[order[start]]["input_ids"]), batch_size, len(order) - start)
        picked = order[start : start + count]
        out.append((picked, pooled(model, pad([rows[i] for i in picked], count, limit, width))))
        start += count
    return _gathered(out, len(rows))


def shape_of(length: int, batch_size: int, left: int) -> tuple[int, int]:
    """Return width and rows of a batch whose longest text has `length` tokens.

    As many tokens as `batch_size` rows of 64: with more, a CPU waits for the memory of attention; but not over twice
    `batch_size` rows, since those of like length are few, and never twice as many as are left.

    >>> shape_of(14, 32, 1000), shape_of(14, 32, 5), shape_of(250, 32, 1000)
    ((16, 64), (16, 8), (256, 8))
    """
    width = text_width(length)
    rows = min(max(1, batch_size * 64 // width), 2 * batch_size)
    return width, min(rows, 1 << (left - 1).bit_length())


def embed_images(model: Any, images: Array | ImageDataset, batch_size: int = BATCH_SIZE) -> Array:
    """Return the pooled vectors `[N, D]` float32 of images `[N, C, H, W]`, prepared as the model wants them.

    Those of a data set are prepared a batch at a time.
    """
    out: list[tuple[list[int], Any]] = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        part = images.batch(rows)["pixel_values"] if isinstance(images, ImageDataset) else images[rows]
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
