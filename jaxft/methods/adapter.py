"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2022) at the joins of the stream."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from ..errors import MethodError, SelectionError, nearest, refuse
from ..models.layers import ACTIVATIONS, Join
from ..models.seams import number
from .bottleneck import INITS, Bottleneck
from .checks import choice, rate, whole_number
from .matching import Target, anything, find, layer_index, log
from .method import Method, hang

SITES = {"pfeiffer": ("output",), "houlsby": ("attention", "output"), "parallel": ("output",)}
DEFAULTS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"reduction_factor": 16, "non_linearity": "relu", "scale": 1.0},
    "houlsby": {"reduction_factor": 16, "non_linearity": "swish", "scale": 1.0},
    "parallel": {"reduction_factor": 2, "non_linearity": "relu", "scale": 4.0},
}
PARALLEL_INPUTS = ("residual", "normed")


@dataclasses.dataclass(frozen=True)
class Adapter(Method):
    """A trained bottleneck where a part's output h meets the residual stream x: `x + h + s up(f(down(...)))`.

        pfeiffer    after the feed-forward:                  down reads h + x (in a post-norm block LN(h + x))
        houlsby     after attention and after feed-forward:  down reads h
        parallel    after the feed-forward:                  down reads x, or what the feed-forward reads

    In a post-norm block the block's own norm follows the sum, as it does without an adapter. Options mean what they
    mean in the adapters library (1.3.0) and have its defaults, with these differences: the up-projection is zero at
    first, so that nothing changes (the library draws both from N(0, 0.02^2) for pfeiffer and houlsby and calls it
    close to the identity; `init="bert"` does so too); new layer norms, gates and heads are not part of it. On a
    pre-norm block the library's parallel adapter reads the stream as it is, not normed; the authors' code is
    post-norm, so this is a choice: `parallel_input`. Over a bfloat16 base houlsby is the base to rounding alone, and
    in a post-norm block every kind is, since XLA may round the sum that it stands in otherwise than the base's.

    Attributes:
        kind: `"pfeiffer"`, `"houlsby"` or `"parallel"`.
        reduction_factor: The bottleneck is `D // reduction_factor` wide, at least 1; 16, for parallel 2.
        size: The width of the bottleneck itself, instead of `reduction_factor`.
        non_linearity: f, `"relu"`, for houlsby `"swish"`; any activation that the models have.
        scale: s, a number (1, for parallel 4), or `"learned"`, one for each bottleneck.
        init: `"default"` (down uniform in +-1/sqrt(D), up zero) or `"bert"`.
        parallel_input: `"residual"` or `"normed"`, for parallel.
        dropout: Rate on what the bottleneck adds, in training.
        layers: Only layers of these indices.

    Raises:
        MethodError: An option out of range, a bottleneck wider than the model, or a model without the seam.
        SelectionError: Layers that the model has not.

    >>> import jaxft
    >>> model = jaxft.testing.tiny_llama()
    >>> print(jaxft.parameter_report(model, jaxft.Adapter(kind="houlsby", size=4)))
    trainable params: 1,168 || all params: 20,784 || trainable%: 5.6197
      model.layers.attention_adapters              584
      model.layers.output_adapters                 584
    """

    kind: str = "pfeiffer"
    reduction_factor: float | None = None
    size: int | None = None
    non_linearity: str | None = None
    scale: float | str | None = None
    init: str = "default"
    parallel_input: str = "residual"
    dropout: float = 0.0
    layers: Any = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            given = tuple(self.layers) if isinstance(self.layers, Iterable) else (self.layers,)
            object.__setattr__(self, "layers", given)
        refuse(MethodError, "Adapter: options that cannot be", self._problems())
        for option, value in DEFAULTS[self.kind].items():
            if getattr(self, option) is None and not (option == "reduction_factor" and self.size is not None):
                object.__setattr__(self, option, value)

    def _problems(self) -> Iterable[str]:
        choices = {"kind": tuple(DEFAULTS), "init": tuple(INITS), "parallel_input": PARALLEL_INPUTS}
        for option, known in choices.items():
            yield from choice(known, **{option: getattr(self, option)})
        if self.non_linearity is not None and self.non_linearity not in tuple(ACTIVATIONS):
            yield f"non_linearity={self.non_linearity!r}: {nearest(str(self.non_linearity), ACTIVATIONS, n=9)}"
        if self.reduction_factor is not None and not (_finite(self.reduction_factor) and self.reduction_factor >= 1):
            yield f"reduction_factor={self.reduction_factor!r}: give a number of at least 1"
        if self.size is not None:
            yield from whole_number(size=self.size)
        if self.size is not None and self.reduction_factor is not None:
            yield f"size={self.size!r} with reduction_factor={self.reduction_factor!r}: give one of them"
        if self.scale is not None and self.scale != "learned" and not _finite(self.scale):
            yield f"scale={self.scale!r}: give a finite number, or 'learned'"
        if self.parallel_input == "normed" and self.kind != "parallel":
            yield f"parallel_input='normed' is for kind='parallel', this is {self.kind!r}"
        yield from rate(dropout=self.dropout)
        if self.layers == () or not all(isinstance(i, int) and i >= 0 for i in self.layers or ()):
            yield f"layers={self.layers!r}: give indices of layers, at least one"

    def targets(self, model: Any) -> list[Target]:
        """Return the joins that are adapted, each with the layers that are meant.

        Raises:
            MethodError: The model lacks the seam.
            SelectionError: It lacks some of the layers.
        """
        sites = SITES[self.kind]

        def meant(module: Any) -> bool:
            return isinstance(module, Join) and module.site in sites

        joins = find(model, anything, meant)
        lacking = sorted(set(sites) - {t.named.module.site for t in joins})
        if lacking:
            parts = " and ".join("feed-forward" if site == "output" else site for site in lacking)
            raise MethodError(
                f"Adapter(kind={self.kind!r}) hangs at the seam `join`, and this {type(model).__name__} has none for "
                f"the output of its {parts}: let its layers add with jaxft.models.layers.Join, as those of "
                "jaxft.models.llama do"
            )
        if self.layers is None:
            return joins
        present = {index for t in joins for name in t.names if (index := layer_index(name)) is not None}
        absent = sorted(set(self.layers) - present)
        if absent:
            raise SelectionError(f"Adapter: layers {absent} have no join; there are {sorted(present)}")
        return find(model, lambda name: layer_index(name) in self.layers, meant)

    def width(self, features: int) -> int:
        """Return the width of the bottleneck in a model of this width.

        >>> Adapter().width(768), Adapter().width(8), Adapter(size=5).width(8)
        (48, 1, 5)
        """
        if self.size is not None:
            return self.size
        assert self.reduction_factor is not None
        return max(1, int(features // self.reduction_factor))

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang a bottleneck at every join that is meant."""
        for target in self.targets(model):
            join, path = target.named.module, target.named.path
            size = self.width(join.features)
            if size > join.features:
                raise MethodError(
                    f"Adapter: size={size} for {path}, where the model is {join.features} wide: a bottleneck is at "
                    "most as wide"
                )
            lead = (len(target.picks),) if target.named.stacked else ()
            kernels = INITS[self.init](jax.random.fold_in(key, number(path)), lead, join.features, size)
            bottleneck = Bottleneck(
                kernels,
                kind=self.kind,
                non_linearity=str(self.non_linearity),
                scale=self.scale,
                parallel_input=self.parallel_input,
                layers_held=target.layers_held,
                rate=self.dropout,
                number=number(f"{path}.{name}"),
            )
            hang(join, "join", name, bottleneck)
            log.info("%s - Adapter %r (%s), size %d, in %s", path, name, self.kind, size, ", ".join(target.names))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
