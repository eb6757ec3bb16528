"""Safetensors files of a folder, one file or many, read lazily and written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import CheckpointError

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
CONVERT = "AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON object, or a list where that is the kind, from a file that must be there."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent} holds no {file.name}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(raw, kind):
        what = "a JSON object" if kind is dict else f"a {kind.__name__}"
        raise CheckpointError(f"{file}: {what} is expected, this is a {type(raw).__name__}")
    return raw


class Tensors:
    """The tensors of a checkpoint, by name; nothing is read until asked for.

    Attributes:
        folder: Where they are.
        shapes: Shape of each, by name.
        kinds: Kind of number of each, as the file calls it.
        dtype: Dtype of most of the parameters.
        packed: What `packed.fold` has found of quantised kernels, by name.

    Raises:
        CheckpointError: No safetensors file, a file of the index that is missing, a file that is not whole.
    """

    def __init__(self, folder: Path, single: str = "model.safetensors", convert: str = CONVERT):
        self.folder, self._stack = folder, ExitStack()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}
        self.packed: dict[str, Any] = {}
        self._owner: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for file in weight_files(folder, single, convert):
            opened = self._open(file)
            for name in opened.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                piece = opened.get_slice(name)
                self.shapes[name], self._owner[name] = tuple(piece.get_shape()), opened
                kind = self.kinds[name] = piece.get_dtype()
                if kind in FLOATS:
                    sizes[kind] = sizes.get(kind, 0) + int(np.prod(piece.get_shape()))
        if not sizes:
            raise CheckpointError(f"{folder}: its safetensors file holds no weights")
        self.dtype = jnp.dtype(FLOATS[max(sizes, key=sizes.__getitem__)])

    def _open(self, file: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(file, framework="numpy"))
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size if file.is_file() else 0
            raise CheckpointError(
                f"{file}: not a whole safetensors file ({size:,} bytes; {error}). Download or export it again"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.clear()
        self._stack.close()

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray[Any, Any]:
        """Read one tensor, or the part of it that slices of its axes leave."""
        if index is None or all(part == slice(None) for part in index):
            return self._owner[name].get_tensor(name)
        return self._owner[name].get_slice(name)[index]

    def integer(self, name: str | None) -> bool:
        """Tell whether a tensor is there and holds no floats."""
        return name in self.kinds and self.kinds[name] not in FLOATS

    def non_finite(self, name: str) -> int:
        """Count the values of one tensor that are NaN or infinite."""
        return int((~np.isfinite(self.read(name).astype(np.float32))).sum())


def weight_files(folder: Path, single: str, convert: str) -> list[Path]:
    """Return the safetensors files of a folder: `single`, or those that its index names."""
    index = folder / f"{single}.index.json"
    if (folder / single).is_file():
        return [folder / single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: not an index of safetensors files (no weight_map of names)")
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f"{folder}: {index.name} names files that are missing: {', '.join(absent)}")
        return [folder / name for name in names]
    pickled = [f.name for pattern in PICKLED for f in folder.glob(pattern)]
    hint = (
        f"It has {pickled[0]}, a pickle, which can run code when it is opened and is not read here: convert it in "
        f"PyTorch with `{convert}`"
        if pickled
        else "Give a folder that transformers or peft has saved"
    )
    raise CheckpointError(f"{folder} holds no {single}. {hint}")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a scratch folder whose files are moved into `folder` at the end: all of them, or on an error none."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            os.replace(file, folder / file.name)


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write one safetensors file, marked as the PyTorch libraries expect."""
    save_file({name: np.asarray(t, order="C") for name, t in tensors.items()}, file, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)  # safetensors leaves a file that only its owner can read
