"""Quantised kernels in a checkpoint: NF4 as bitsandbytes writes it to the hub, int8 in a layout of our own.

NF4: `q_proj.weight` uint8 `[bytes, 1]`, two weights of the row-major `(out, in)` to a byte, and beside it

    q_proj.weight.absmax                           uint8 [blocks]; float32 without double quantisation
    q_proj.weight.quant_map                        float32 [16], what the codes stand for
    q_proj.weight.nested_absmax                    float32 [blocks / 256]
    q_proj.weight.nested_quant_map                 float32 [256], what the codes of absmax stand for
    q_proj.weight.quant_state.bitsandbytes__nf4    bytes of JSON: shape, dtype, block sizes, mean of absmax

int8: `q_proj.weight` int8 `(out, in)`, and `q_proj.weight.scale` float32 `[out]`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError, refuse
from ..quant import NF4, Int8, quantize_nf4
from ..quant.nf4 import NESTED
from ..quant.tables import NF4_VALUES, dynamic_map
from .tensors import FLOATS, Tensors

BLOCK = 64
STATE = ".quant_state.bitsandbytes__"
SCALE = ".scale"
OURS = "jaxft_int8"
SKIPPED = "llm_int8_skip_modules"
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
INSTEAD = "load the checkpoint that is not quantised, with quantize='nf4' or 'int8'"


@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantised kernel in a checkpoint, by the name of its codes.

    Attributes:
        kind: `"nf4"` or `"int8"`.
        shape: `(out, in)`.
        offset: Of NF4 with double quantisation, the mean of its scales; else None.
    """

    kind: str
    shape: tuple[int, int]
    offset: float | None = None


def fold(tensors: Tensors, kind: str | None) -> dict[str, Packed]:
    """Find the quantised kernels of a checkpoint, and let each count as one tensor of floats `(out, in)`.

    Args:
        tensors: The checkpoint; its shapes, kinds and dtype are changed.
        kind: `"nf4"` or `"int8"` where its `config.json` says that it is quantised so.

    Returns:
        The kernels by name.

    Raises:
        CheckpointError: Another code, other block sizes, or parts that are missing or damaged: each is named.
    """
    states = {name: name.partition(STATE) for name in tensors.shapes if STATE in name}
    found, dtypes, problems = {}, {}, []
    for state, (name, _, code) in states.items():
        try:
            found[name], dtypes[name] = _read_state(tensors, name, state, code)
        except ValueError as error:
            problems.append(f"{name} {error}")
    scales = [name for name in tensors.shapes if kind == "int8" and name.endswith(f".weight{SCALE}")]
    for scale in scales:
        name = scale.removesuffix(SCALE)
        shape = tensors.shapes.get(name, ())
        if tensors.kinds.get(name) != "I8" or len(shape) != 2 or tensors.shapes[scale] != shape[:1]:
            problems.append(f"{scale} is {tensors.shapes[scale]}, {name} {tensors.kinds.get(name, 'missing')} {shape}")
        else:
            found[name] = Packed("int8", (shape[0], shape[1]))
            if count := tensors.non_finite(scale):
                problems.append(f"{scale} has {count} values that are NaN or infinite")
    refuse(CheckpointError, f"{tensors.folder}: quantised kernels that cannot be read", problems)
    for name, packed in found.items():
        for part in [part for part in tensors.shapes if part.startswith(f"{name}.")]:
            del tensors.shapes[part]
        tensors.shapes[name] = packed.shape
        tensors.kinds[name] = dtypes.get(name, "F32")
    if dtypes:
        most = max(set(dtypes.values()), key=list(dtypes.values()).count)
        tensors.dtype = jnp.dtype(FLOATS[most])
    return found


def _read_state(tensors: Tensors, name: str, state: str, code: str) -> tuple[Packed, str]:
    """Read what the JSON of an NF4 kernel says, and hold its parts against it.

    Raises:
        ValueError: In words that follow the name.
    """
    try:
        said = json.loads(tensors.read(state).tobytes())
        kind, shape, dtype = said["quant_type"], tuple(map(int, said["shape"])), KINDS[said["dtype"]]
        block, offset = said["blocksize"], said.get("nested_offset")
        n = shape[0] * shape[1]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"has a quant_state that cannot be read ({type(error).__name__}: {error})") from None
    if kind != "nf4" or code != "nf4":
        raise ValueError(f"is {kind if kind != 'nf4' else code}; of the codes of four bits NF4 is read: {INSTEAD}")
    nested = said.get("nested_blocksize", NESTED)
    for key, value, ours in (("blocksize", block, BLOCK), ("nested_blocksize", nested, NESTED)):
        if value != ours:
            raise ValueError(f"has {key} {value}, and {ours} is read: {INSTEAD}")
    blocks = -(-n // BLOCK)
    wanted = {"absmax": (blocks,), "quant_map": (16,)}
    if offset is not None:
        wanted |= {"nested_absmax": (-(-blocks // NESTED),), "nested_quant_map": (256,)}
    for part, size in wanted.items():
        there = tensors.shapes.get(f"{name}.{part}")
        if there != size:
            raise ValueError(f"lacks a part: {name}.{part} is {'missing' if there is None else there}, {size} expected")
    bytes_there = tensors.read(name).nbytes if name in tensors.shapes else 0
    if bytes_there != (n + 1) // 2:
        raise ValueError(f"has {bytes_there} bytes, {(n + 1) // 2} expected")
    tables = {"quant_map": np.array(NF4_VALUES, np.float32)}
    tables |= {"nested_quant_map": dynamic_map()} if offset is not None else {}
    for part, table in tables.items():
        if not np.array_equal(tensors.read(f"{name}.{part}"), table):
            raise ValueError(f"has codes of its own ({name}.{part}), and those of bitsandbytes are read: {INSTEAD}")
    part = "absmax" if offset is None else "nested_absmax"
    if count := tensors.non_finite(f"{name}.{part}"):
        raise ValueError(f"is damaged: {name}.{part} has {count} values that are NaN or infinite")
    return Packed("nf4", (shape[0], shape[1]), offset), dtype


def unpack(tensors: Tensors, name: str, packed: Packed) -> Any:
    """Return a quantised kernel of a checkpoint as a leaf, of NumPy's arrays, without a layer axis."""
    if packed.kind == "int8":
        codes: Any = tensors.read(name).T
        scale: Any = tensors.read(f"{name}{SCALE}")
        return Int8(codes, scale)
    like: Any = nf4_shapes(packed)
    codes = tensors.read(name).reshape(-1).view(np.uint8).reshape(like.codes.shape)
    absmax = tensors.read(f"{name}.absmax").reshape(like.absmax.shape)
    if packed.offset is None:
        return dataclasses.replace(like, codes=codes, absmax=absmax)
    nested, offset = tensors.read(f"{name}.nested_absmax"), np.float32(packed.offset)
    return dataclasses.replace(like, codes=codes, absmax=absmax, nested=nested, offset=offset)


def nf4_shapes(packed: Packed) -> NF4:
    """Return the leaf of an NF4 kernel as shapes, without a layer axis."""
    shape = jax.ShapeDtypeStruct(packed.shape[::-1], jnp.float32)
    return quantize_nf4(shape, block=BLOCK, double=packed.offset is not None, transposed=True)


def expresses(leaf: NF4) -> bool:
    """Tell whether the layout can hold an NF4 kernel: its block, and its order `(out, in)`."""
    return leaf.block == BLOCK and leaf.transposed


def pack(name: str, leaf: NF4 | Int8, dtype: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a checkpoint that hold a quantised kernel.

    Args:
        name: Of the codes.
        leaf: Without a layer axis; of NF4, in the order `(out, in)`.
        dtype: What a reader is told to compute in.
    """
    if isinstance(leaf, Int8):
        return {name: np.asarray(leaf.codes).T, f"{name}{SCALE}": np.asarray(leaf.scale)}
    said = {"quant_type": "nf4", "blocksize": leaf.block, "dtype": np.dtype(dtype).name, "shape": leaf.matrix[::-1]}
    parts = {
        name: np.asarray(leaf.codes).reshape(-1, 1),
        f"{name}.absmax": np.asarray(leaf.absmax).reshape(-1),
        f"{name}.quant_map": np.array(NF4_VALUES, np.float32),
    }
    if leaf.nested is not None and leaf.offset is not None:
        parts |= {f"{name}.nested_absmax": np.asarray(leaf.nested), f"{name}.nested_quant_map": dynamic_map()}
        said |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(leaf.offset)}
    parts[f"{name}{STATE}nf4"] = np.frombuffer(json.dumps(said).encode(), np.uint8)
    return parts


def declared(raw: Mapping[str, Any]) -> str | None:
    """Return how the kernels of a checkpoint are quantised by its `config.json`; None: they are not.

    Raises:
        CheckpointError: In a way that is not read.

    >>> declared({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True,
    ...                                   "bnb_4bit_quant_type": "nf4"}})
    'nf4'
    """
    said = raw.get("quantization_config")
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method == OURS:
        return "int8"
    what = f"quant_method {method!r}" if isinstance(said, dict) else repr(said)
    if method == "bitsandbytes":
        code = said.get("bnb_4bit_quant_type", "fp4")
        if said.get("load_in_4bit") and code == "nf4":
            return "nf4"
        what = f"bitsandbytes with {f'codes of 4 bits {code!r}' if said.get('load_in_4bit') else '8 bits'}"
    raise CheckpointError(
        f"config.json: quantization_config: {what} is not read; NF4 of bitsandbytes is, and what jaxft.save_model "
        f"writes: {INSTEAD}"
    )


def declaration(kind: str, dtype: Any, double: bool, whole: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a folder: of NF4, what transformers takes as bitsandbytes' own.

    Args:
        kind: `"nf4"` or `"int8"`.
        dtype: Of computation.
        double: Whether the scales of NF4 are quantised too.
        whole: Linear layers that are not quantised.
    """
    if kind == "int8":
        return {"quant_method": OURS, SKIPPED: list(whole)}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": np.dtype(dtype).name,
        "bnb_4bit_quant_storage": "uint8",
        SKIPPED: list(whole),
    }
