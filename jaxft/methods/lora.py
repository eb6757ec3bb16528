"""LoRA (Hu et al. 2021): a trained low-rank product beside frozen linear layers."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from ..errors import MethodError, SelectionError, refuse
from ..models.names import named_modules
from ..models.seams import number
from .copies import LEAVES, copy_leaves, has_leaves
from .linear import all_linear, is_linear, kernel_shape, logical_axes, make_seams, passes_context
from .low_rank import INITS, LowRank
from .matching import (
    Names,
    Target,
    anything,
    by_pattern,
    check_names,
    check_pattern,
    find,
    frozen_names,
    frozen_pattern,
    layer_index,
    log,
    named,
    pattern_error,
)
from .method import Method, hang

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """`y = W x + s B A dropout(x)` with `s = alpha / r`, trained A and B; B is zero at first, so nothing changes.

    Options mean what they mean in `peft.LoraConfig`, matched per layer in the same way; but whatever matches nothing
    is an error here, never a no-op.

    Attributes:
        r: Rank.
        alpha: Numerator of the scale.
        dropout: Rate on the input of A, in training.
        target_modules: Names of modules (`"q_proj"` means every module whose name ends so), a regular expression for
            the whole name, `"all-linear"` (every linear layer but the output head), or None: what the field uses
            for the family.
        exclude_modules: Names or a regular expression; wins over the targets.
        layers: Only layers of these indices (peft's `layers_to_transform`), where targets are names.
        layers_pattern: Name of the list that the index stands in, if not the first.
        rank_pattern: `{regular expression: r}` for the end of a module's name; the first that matches wins.
        alpha_pattern: The same for alpha.
        use_rslora: `s = alpha / sqrt(r)` (Kalajdzievski 2023).
        bias: `"none"`, `"all"` or `"lora_only"`: which of the base's biases the adapter has a trained copy of.
        modules_to_save: Ends of names of modules that the adapter has a whole trained copy of: heads, embeddings
            (`"norm"` means every module whose name ends so, `input_layernorm` too, as in peft).
        init: `"default"` (A uniform in +-1/sqrt(in), as the reference) or `"gaussian"`.

    Raises:
        MethodError: An option out of range, or a module that cannot hold what is asked.
        SelectionError: A name or pattern that matches nothing.

    >>> import jaxft
    >>> model = jaxft.testing.tiny_llama()
    >>> method = jaxft.LoRA(r=4, alpha=8, target_modules="all-linear", rank_pattern={"layers.0.mlp.up_proj": 2})
    >>> print(jaxft.parameter_report(model, method).trainable)
    3552
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    target_modules: Names = None
    exclude_modules: Names = None
    layers: Any = None
    layers_pattern: Names = None
    rank_pattern: Any = ()
    alpha_pattern: Any = ()
    use_rslora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    init: str = "default"

    def __post_init__(self) -> None:
        def set_(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        for field in ("target_modules", "exclude_modules", "layers_pattern"):
            set_(field, frozen_names(getattr(self, field)))
        for field in ("rank_pattern", "alpha_pattern"):
            set_(field, frozen_pattern(getattr(self, field)))
        saved = frozen_names(self.modules_to_save or ())
        set_("modules_to_save", (saved,) if isinstance(saved, str) else saved)
        if self.layers is not None:
            set_("layers", tuple(self.layers) if isinstance(self.layers, Iterable) else (self.layers,))
        refuse(MethodError, "LoRA: options that cannot be", self._problems())

    def _problems(self) -> Iterable[str]:
        ranks = [("r", self.r), *((f"rank_pattern[{key!r}]", r) for key, r in self.rank_pattern)]
        for option, r in ranks:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                yield f"{option}={r!r}: a rank is a whole number of at least 1"
        alphas = [("alpha", self.alpha), *((f"alpha_pattern[{key!r}]", a) for key, a in self.alpha_pattern)]
        for option, alpha in alphas:
            if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                yield f"{option}={alpha!r}: give a finite number"
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout!r}: give a rate of at least 0 and below 1"
        if self.bias not in BIASES:
            yield f"bias={self.bias!r}: choose one of {', '.join(map(repr, BIASES))}"
        if self.init not in INITS:
            yield f"init={self.init!r}: choose one of {', '.join(map(repr, INITS))}"
        for option in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            given = getattr(self, option)
            if not all(isinstance(name, str) and name for name in (given or ())):
                yield f"{option}={given!r}: give names, or one regular expression"
        patterns = [key for key, _ in (*self.rank_pattern, *self.alpha_pattern)]
        for key in [*patterns, *((self.layers_pattern,) if isinstance(self.layers_pattern, str) else ())]:
            if (error := pattern_error(key)) is not None:
                yield f"{key!r} is not a regular expression: {error}"
        if not all(isinstance(i, int) and i >= 0 for i in self.layers or ()):
            yield f"layers={self.layers!r}: give indices of layers"
        if self.target_modules == ():
            yield "target_modules=(): name at least one module"
        if self.layers is not None and (not self.layers or isinstance(self.target_modules, str)):
            yield f"layers={self.layers!r}: name at least one, and give target_modules as names"

    def targets(self, model: Any) -> list[Target]:
        """Return the modules that are adapted, each with the layers that are meant.

        Raises:
            SelectionError: A part of the selection matches nothing.
        """
        wanted = self.resolved_targets(model)
        check_names(model, "target_modules", wanted, is_linear, "linear layer")
        check_names(model, "exclude_modules", self.exclude_modules, anything, "module")
        found = find(model, lambda name: self._accepts(name, wanted), is_linear)
        if not found:
            limits = {
                "exclude_modules": self.exclude_modules,
                "layers": self.layers,
                "modules_to_save": self.modules_to_save,
            }
            said = ", ".join(f"{k}={v!r}" for k, v in limits.items() if v)
            raise SelectionError(f"LoRA: target_modules={wanted!r} with {said} leaves no module to adapt")
        if self.layers is not None:
            present = {layer_index(name, self.layers_pattern) or 0 for t in found for name in t.names}
            absent = sorted(set(self.layers) - present)
            if absent:
                raise SelectionError(f"LoRA: layers {absent} hold no target; the layers adapted are {sorted(present)}")
        names = [name for t in found for name in t.names]
        check_pattern("rank_pattern", self.rank_pattern, names)
        check_pattern("alpha_pattern", self.alpha_pattern, names)
        return found

    def resolved_targets(self, model: Any) -> Names:
        """Return `target_modules` as names or a regular expression, with defaults and "all-linear" worked out."""
        if self.target_modules is not None and self.target_modules != ALL_LINEAR:
            return self.target_modules
        default = getattr(model, "default_targets", None)
        if self.target_modules is None and default is not None:
            return tuple(default)
        names = {name for n in all_linear(model, named_modules(model)) for name in n.names}
        if not names:
            raise MethodError(f"LoRA: this {type(model).__name__} has no linear layer (nnx.Linear) to adapt")
        return tuple(sorted(names))

    def _accepts(self, name: str, wanted: Names) -> bool:
        if named(name, self.exclude_modules) or self._saves(name):
            return False
        return named(name, wanted) and (self.layers is None or layer_index(name, self.layers_pattern) in self.layers)

    def _saves(self, name: str) -> bool:
        return name.endswith(self.modules_to_save) if self.modules_to_save else False

    def scale(self, name: str) -> tuple[int, float]:
        """Return rank and scale of the module of this name."""
        r = by_pattern(name, self.rank_pattern, self.r)
        alpha = by_pattern(name, self.alpha_pattern, self.alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang a low-rank product at every target, and copies where biases or whole modules are trained."""
        targets = self.targets(model)
        make_seams(t.named.module for t in targets)
        for target in targets:
            hang(target.named.module, "delta", name, self._low_rank(target, name, key))
            log.info(
                "%s - LoRA %r, rank %s",
                target.named.path,
                name,
                dict(zip(target.names, self._ranks(target), strict=True)),
            )
        self._copy_biases(model, targets, name)
        self._copy_modules(model, name)

    def _ranks(self, target: Target) -> tuple[int, ...]:
        return tuple(self.scale(n)[0] for n in target.names)

    def _low_rank(self, target: Target, name: str, key: jax.Array) -> LowRank:
        module, path = target.named.module, target.named.path
        *stack, width, out = kernel_shape(module)
        lead = (len(target.picks),) if target.named.stacked else tuple(stack)
        ranks, scales = zip(*(self.scale(n) for n in target.names), strict=True)
        if max(ranks) > min(width, out):
            raise MethodError(
                f"LoRA: rank {max(ranks)} for {path}, whose kernel is {width} x {out}: at most {min(width, out)}"
            )
        if self.dropout and not passes_context(module):
            raise MethodError(
                f"LoRA: dropout={self.dropout} cannot reach {path}, a layer of your own model, which is called without "
                "a dropout key: use dropout=0"
            )
        key = jax.random.fold_in(key, number(path))
        return LowRank(
            (*lead, width, out),
            logical_axes(module),
            ranks=ranks,
            scales=scales,
            layers_held=target.layers_held,
            rate=self.dropout,
            number=number(f"{path}.{name}"),
            a=INITS[self.init](key, (*lead, width, max(ranks))),
        )

    def _copy_biases(self, model: Any, targets: list[Target], name: str) -> None:
        if self.bias == "none":
            return
        if self.bias == "all":
            targets = find(model, lambda n: not self._saves(n))
        having = [t for t in targets if getattr(t.named.module, "bias", None) is not None]
        if not having:
            raise MethodError(f"LoRA: bias={self.bias!r}, but no module that it means has a bias")
        for target in having:
            copy_leaves(target, ("bias",), name)

    def _copy_modules(self, model: Any, name: str) -> None:
        found = find(model, self._saves, has_leaves)
        for end in self.modules_to_save:
            if not any(n.endswith(end) for target in found for n in target.names):
                check_names(model, "modules_to_save", (end,), has_leaves, "module with parameters")
        for target in found:
            copy_leaves(target, LEAVES, name, tied=getattr(model, "tied_kernel", None))
