"""A file of texts or images to a file of vectors, one a row."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..data import load_images
from ..data.formats import text_of
from ..data.rows import BadRow, Row, read_rows
from ..data.source import renamed
from ..embedding import Array, embed, embed_images, longest, scaled
from ..errors import CheckpointError, DataError, RunError, refuse
from ..interop.folder import load_adapter
from ..loading import load
from ..methods.method import adapters
from ..methods.switch import set_adapter


def embed_file(
    path: str,
    file: str | Path,
    output: str | Path,
    *,
    adapter: str | None = None,
    column: str | None = None,
    split: str = "train",
    batch_size: int = 32,
    max_length: int | None = None,
    normalize: bool | None = None,
) -> tuple[int, int]:
    """Write one vector for each row of a source, in its order.

    Args:
        path: A run, a model folder or a hub id.
        file: Rows with `text`, as of `read_rows`; for a model of images a source of `load_images`.
        output: `.npy`: `[N, D]` float32; `.parquet`: the columns `place` (file and line), of texts `text`, `vector`.
        adapter: A folder with an adapter to load over it, peft's or ours.
        column: What the column is called in a table, if not `text` or `image`.
        split: The split, of a hub data set or npz file.
        batch_size: Rows at a time.
        max_length: Tokens of a text at most; by default those of `embed`. Images have none.
        normalize: As of `embed`.

    Returns:
        N and D. On an error nothing is written, and what was there stays.

    Raises:
        RunError: An output that is no such file.
        DataError: Rows that cannot be used, each with its place and reason.
        CheckpointError: The model has no tokenizer, or does not fit.
    """
    output = Path(output)
    if output.suffix not in WRITERS:
        raise RunError(f"{output}: give a file that ends in {' or '.join(WRITERS)} as --output")
    if output.is_dir() or not output.parent.is_dir():
        raise RunError(f"{output}: {'it is a folder' if output.is_dir() else f'there is no folder {output.parent}'}")
    model, tokenizer = load(path)
    if adapter is not None:
        model = load_adapter(model, adapter, name="given")
        model = set_adapter(model, dict.fromkeys(adapters(model), 1.0))
    if "pixel_values" in model.inputs:
        if max_length is not None:
            raise DataError(f"--max-length {max_length}: the model reads images, which have no tokens; leave it out")
        given = {} if column is None else {"image": column}
        images = load_images(file, tokenizer, split=split, columns=given, labels=False)
        columns = {"place": list(images.places)}
        vectors = scaled(embed_images(model, images, batch_size), model, normalize)
    else:
        if tokenizer is None:
            raise CheckpointError(f"{path}: it holds no tokenizer (tokenizer.json), which turns text into tokens")
        _check_length(model, max_length)
        columns = _texts(file, column, split)
        options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "normalize": normalize}
        vectors = embed(model, tokenizer, columns["text"], **options)
    _check_finite(vectors, columns["place"])
    _write(output, columns, vectors)
    return vectors.shape[0], vectors.shape[1]


def _texts(file: str | Path, column: str | None, split: str) -> dict[str, list[str]]:
    """Return place and text of each row."""

    def one(row: Row | BadRow) -> tuple[str, str] | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            return row.place, text_of(renamed(row, {} if column is None else {"text": column}), "text")
        except DataError as error:
            return BadRow(row.place, str(error))

    made = [one(row) for row in read_rows(file, split=split)]
    bad = [row for row in made if isinstance(row, BadRow)]
    refuse(DataError, f"{file}: {len(bad)} of {len(made)} rows cannot be embedded", map(str, bad))
    good = [row for row in made if not isinstance(row, BadRow)]
    return {"place": [place for place, _ in good], "text": [text for _, text in good]}


def _check_length(model: Any, max_length: int | None) -> None:
    if max_length is not None and max_length > longest(model):
        raise DataError(f"--max-length {max_length}: the model reads {longest(model)} tokens at most")


def _check_finite(vectors: Array, places: list[str]) -> None:
    bad = [places[i] for i in np.flatnonzero(~np.isfinite(vectors).all(1))]
    refuse(DataError, "vectors that are not finite", [f"{place}: its vector holds NaN or infinity" for place in bad])


def _write(output: Path, columns: dict[str, list[str]], vectors: Array) -> None:
    """Write the file beside its place, then put it there."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".writing-") as scratch:
        made = Path(scratch) / output.name
        WRITERS[output.suffix](made, columns, vectors)
        os.replace(made, output)


def _npy(file: Path, columns: dict[str, list[str]], vectors: Array) -> None:
    del columns
    np.save(file, vectors)


def _parquet(file: Path, columns: dict[str, list[str]], vectors: Array) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({**columns, "vector": flat}), file)


WRITERS = {".npy": _npy, ".parquet": _parquet}
