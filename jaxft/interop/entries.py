"""The tensors of an adapter by the names that peft gives them, as places in a model's tree."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import CheckpointError, MethodError
from ..methods.bottleneck import Bottleneck
from ..methods.dora import DoRA
from ..methods.embedding import LowRankEmbedding
from ..methods.encoders import Virtual
from ..methods.ia3 import InputScale, Scale
from ..methods.linear import is_linear
from ..methods.low_rank import LowRank
from ..methods.pissa import PiSSA
from ..methods.temperature import Temperature
from ..methods.tokens import TokenRows
from ..models.names import LEAF_NAMES, Named, named_modules, variables
from ..models.seams import SLOTS, Context, Copies

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: where it stands in the tree, and how it is turned.

    Attributes:
        variable: The leaf.
        index: Place on the leaf's layer axis, None where it has none.
        transposed: Whether the file holds it the other way round.
        live: What of the leaf counts (the rest is padding of a smaller rank).
        axes: How many axes, the last ones, are turned where it is transposed.
    """

    variable: nnx.Variable[Any]
    index: int | None = None
    transposed: bool = False
    live: tuple[Any, ...] = ()
    axes: int = 2

    def read(self) -> np.ndarray[Any, Any]:
        """Return the tensor as the file holds it, in float32."""
        value = np.asarray(self._place(self.variable.get_value()), np.float32)
        return np.asarray(self._turned(value), order="C")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        place = self._place(np.empty(self.variable.get_value().shape, bool))
        return self._turned(place).shape

    def write(self, buffer: np.ndarray[Any, Any], tensor: np.ndarray[Any, Any]) -> None:
        """Put a tensor of the file into a buffer of the leaf."""
        self._place(buffer)[...] = self._turned(tensor)

    def _turned(self, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if not self.transposed:
            return value
        places = range(value.ndim)
        return value.transpose(*places[: -self.axes], *places[-self.axes :][::-1])

    def _place(self, value: Any) -> Any:
        value = value if self.index is None else value[self.index]
        return value[self.live] if self.live else value


@dataclasses.dataclass(frozen=True)
class Made(Entry):
    """A tensor that a module makes from its leaves: written for peft, checked and not needed where it is read.

    Attributes:
        make: Returns its value.
    """

    make: Callable[[], jax.Array] = dataclasses.field(kw_only=True)

    def read(self) -> np.ndarray[Any, Any]:
        """Return the tensor as the file holds it."""
        return np.asarray(self.make(), np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return jax.eval_shape(self.make).shape


Tensors = Iterator[tuple[str, Entry]]


def entries(model: Any, name: str, trains: Callable[[str, nnx.Variable[Any]], bool]) -> dict[str, Entry]:
    """Return the tensors of one adapter, by their names in a file.

    Args:
        model: The model that carries it.
        name: The adapter's name, which stands in no tensor's name.
        trains: Tells of a base leaf's path whether the adapter's method trains it.

    Raises:
        MethodError: What hangs somewhere is of a type that has no names in a file.
    """
    out: dict[str, Entry] = {}
    for n in named_modules(model):
        for slot in SLOTS:
            hung = (getattr(n.module, slot, None) or {}).get(name)
            if hung is not None and type(hung) not in TENSORS:
                raise MethodError(
                    f"{n.path or 'the model'} has a {type(hung).__name__} in its slot `{slot}`, a type without an "
                    "entry in jaxft.interop.entries.TENSORS, so no file can hold it"
                )
            if hung is not None:
                out.update(TENSORS[type(hung)](n, hung, name))
        for leaf, variable in sorted(vars(n.module).items()):
            if isinstance(variable, nnx.Param) and trains(f"{n.path}.{leaf}".lstrip("."), variable):
                out.update(_leaf(n, leaf, variable, range(len(n.names))))
    return out


def fill_entries(places: dict[str, Entry], read: Callable[[str], np.ndarray[Any, Any]]) -> None:
    """Read every tensor into its place, leaf by leaf.

    Raises:
        CheckpointError: A tensor is not what the module makes of the others.
    """
    by_leaf: dict[int, list[tuple[str, Entry]]] = {}
    made = {key: entry for key, entry in places.items() if isinstance(entry, Made)}
    for key, entry in places.items():
        if key in made:
            continue
        by_leaf.setdefault(id(entry.variable), []).append((key, entry))
    for group in by_leaf.values():
        variable = group[0][1].variable
        buffer = np.array(variable.get_value(), np.float32)  # trained leaves are, whatever the base is
        for key, entry in group:
            entry.write(buffer, read(key))
        variable.set_value(jnp.asarray(buffer))
    for key, entry in made.items():
        file, here = read(key).astype(np.float32), entry.read()
        if not np.allclose(file, here, rtol=1e-3, atol=1e-3 * np.abs(here).max()):
            raise CheckpointError(f"{key} is not what the encoder in the same file makes: one of them was changed")


def _held(n: Named, module: Any) -> range | tuple[int, ...]:
    return range(len(n.names)) if module.layers_held is None else module.layers_held


def _low_rank(n: Named, delta: LowRank, name: str) -> Tensors:
    """A is `(r, in)` and B `(out, r)` in a file, whatever the orientation of the base's kernel."""
    del name
    for i, layer in enumerate(_held(n, delta)):
        index = i if n.stacked else None
        live = slice(delta.ranks[i])
        yield f"{PREFIX}{n.names[layer]}.lora_A.weight", Entry(delta.a, index, True, (..., live))
        yield f"{PREFIX}{n.names[layer]}.lora_B.weight", Entry(delta.b, index, True, (..., live, slice(None)))


def _bottleneck(n: Named, hung: Bottleneck, name: str) -> Tensors:
    """As the adapters library calls them, without the adapter's name."""
    del name
    leaves = {
        "adapter_down.0.weight": (hung.down.kernel, True),
        "adapter_down.0.bias": (hung.down.bias, False),
        "adapter_up.weight": (hung.up.kernel, True),
        "adapter_up.bias": (hung.up.bias, False),
        **({} if hung.scale is None else {"scaling": (hung.scale, False)}),
    }
    for i, layer in enumerate(_held(n, hung)):
        for leaf, (variable, transposed) in leaves.items():
            yield f"{PREFIX}{n.names[layer]}.{leaf}", Entry(variable, i if n.stacked else None, transposed)


def _dora(n: Named, delta: DoRA, name: str) -> Tensors:
    """Beside A and B the magnitudes `(out,)`."""
    yield from _low_rank(n, delta, name)
    for i, layer in enumerate(_held(n, delta)):
        yield f"{PREFIX}{n.names[layer]}.lora_magnitude_vector", Entry(delta.magnitude, i if n.stacked else None)


def _embedding(n: Named, delta: LowRankEmbedding, name: str) -> Tensors:
    """A is `(r, V)` and B `(D, r)`, named otherwise than a linear layer's."""
    for key, entry in _low_rank(n, delta, name):
        yield re.sub(r"lora_([AB])\.weight$", r"lora_embedding_\1", key), entry


def _tokens(n: Named, delta: TokenRows, name: str) -> Tensors:
    """The rows themselves, whatever the tensor's name says."""
    del name
    yield f"{PREFIX}{n.names[0]}.token_adapter.trainable_tokens_delta", Entry(delta.rows)


def _scale(n: Named, delta: Scale, name: str) -> Tensors:
    """A vector of an output is `(out, 1)` in a file, of an input `(1, in)`."""
    del name
    live = (None, ...) if isinstance(delta, InputScale) else (..., None)
    for i, layer in enumerate(_held(n, delta)):
        yield f"{PREFIX}{n.names[layer]}.ia3_l", Entry(delta.scale, i if n.stacked else None, live=live)


def _copies(n: Named, copies: Copies, name: str) -> Tensors:
    """A bias beside a delta is called `base_layer.bias`, since peft wraps the layer that it adapts."""
    delta = (getattr(n.module, "delta", None) or {}).get(name)
    adapted = set() if delta is None else {n.names[layer] for layer in _held(n, delta)}
    for leaf, variable in sorted(vars(copies).items()):
        if isinstance(variable, nnx.Param):
            for key, entry in _leaf(n, leaf, variable, _held(n, copies)):
                module, kind = key.rsplit(".", 1)
                wrapped = kind == "bias" and module.removeprefix(PREFIX) in adapted
                yield f"{module}.base_layer.bias" if wrapped else key, entry


def _leaf(n: Named, leaf: str, variable: Any, held: Any) -> Tensors:
    transposed = leaf == "kernel" and getattr(n.module, "transposed", True)
    axes = 2 if is_linear(n.module) else variable.get_value().ndim - n.stacked  # all of a convolution's
    for i, layer in enumerate(held):
        entry = Entry(variable, i if n.stacked else None, transposed, axes=axes)
        yield f"{PREFIX}{n.names[layer]}.{LEAF_NAMES[leaf]}", entry


def _virtual(n: Named, virtual: Virtual, name: str) -> Tensors:
    """What peft knows is `prompt_embeddings`, of one kind at a time; an encoder's leaves have names of our own."""
    held = [slot for slot in ("past", "prompt") if name in (getattr(n.module, slot) or {})]
    slot = next(slot for slot in held if getattr(n.module, slot)[name] is virtual)
    at = f"{slot}." if len(held) > 1 else ""
    if virtual.encoder is None:
        yield f"{at}prompt_embeddings", Entry(virtual.vectors)
        return
    yield f"{at}prompt_embeddings", Made(virtual.vectors, make=lambda: virtual(Context(), 1)[0])
    for path, variable in variables(virtual).items():
        yield f"{at}encoder.{path.removeprefix('encoder.')}", Entry(variable)


def _temperature(n: Named, hung: Temperature, name: str) -> Tensors:
    del n, name
    yield "temperature.log_scale", Entry(hung.log_scale, live=(None,))  # `(1,)` in a file


# What hangs in a slot, by its type: (module, what hangs, adapter's name) -> its tensors.
TENSORS: dict[type, Callable[[Named, Any, str], Tensors]] = {
    LowRank: _low_rank,
    Bottleneck: _bottleneck,
    Virtual: _virtual,
    PiSSA: _low_rank,
    DoRA: _dora,
    LowRankEmbedding: _embedding,
    TokenRows: _tokens,
    Scale: _scale,
    InputScale: _scale,
    Copies: _copies,
    Temperature: _temperature,
}
