"""Texts and images to vectors: pooled, in batches of like length, returned in the order in which they were given."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .data.columns import pad, padded_width
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
        batch_size: Texts at a time, of those of 64 tokens and more; it changes nothing but speed.
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
    found = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]  # at once: in parallel, and quick
    return scaled(embed_rows(model, [{"input_ids": ids} for ids in found], batch_size), model, normalize)


def embed_rows(model: Any, rows: Sequence[Mapping[str, Any]], batch_size: int = BATCH_SIZE) -> Array:
    """Return the pooled vectors `[N, D]` float32 of texts given as tokens, rows of like length together.

    The longest come first: every batch is full but for the last, of the shortest, and each width has one program.
    `batch_size` is of rows of 64 tokens and more; of shorter ones as many stand together as make as many tokens.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    limit, start = longest(model), 0
    out: list[tuple[list[int], Any]] = []
    while start < len(order):
        width = padded_width(len(rows[order[start]]["input_ids"]), limit)
        count = rows_of(width, batch_size, len(order) - start)
        picked = order[start : start + count]
        out.append((picked, pooled(model, pad([rows[i] for i in picked], count, limit))))
        start += count
    return _gathered(out, len(rows))


def rows_of(width: int, batch_size: int, left: int) -> int:
    """Return the rows of a batch: as many tokens as `batch_size` rows of 64, and not twice what is left.

    >>> rows_of(16, 32, 1000), rows_of(16, 32, 5), rows_of(256, 32, 1000)
    (128, 8, 32)
    """
    return min(batch_size * max(1, 64 // width), 1 << (left - 1).bit_length())


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
