"""LoRA (Hu et al. 2021): a trained low-rank product beside frozen linear layers and embeddings."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from ..errors import MethodError, SelectionError, refuse
from ..models.layers import Embed
from ..models.seams import number
from .copies import copy_leaves, copy_modules, saves
from .dora import DoRA
from .embedding import LowRankEmbedding, initial
from .linear import is_linear, kernel_of, kernel_shape, logical_axes, make_seams, passes_context
from .low_rank import INITS, LowRank
from .matching import (
    Names,
    Target,
    anything,
    by_pattern,
    check_names,
    check_pattern,
    find,
    frozen_ends,
    frozen_names,
    frozen_pattern,
    layer_index,
    log,
    named,
    outside_heads,
    resolved,
)
from .method import Method, hang
from .options import PISSA, lora_problems
from .pissa import PiSSA
from .tokens import frozen_tokens, hang_tokens


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """`y = W x + s B A dropout(x)` with `s = alpha / r`, trained A and B; B is zero at first, so nothing changes.

    Options mean what they mean in `peft.LoraConfig`, matched per layer in the same way; but whatever matches nothing
    is an error here, never a no-op.

    Attributes:
        r: Rank.
        alpha: Numerator of the scale.
        dropout: Rate on the input of A, in training.
        target_modules: Names of modules (`"q_proj"` means every module whose name ends so; embeddings too), a regular
            expression for the whole name, `"all-linear"` (every linear layer but the output head), or None: what the
            field uses for the family. Never part of a classification head, of which an adapter has a whole copy.
        exclude_modules: Names or a regular expression; wins over the targets.
        layers: Only layers of these indices (peft's `layers_to_transform`), where targets are names.
        layers_pattern: Name of the list that the index stands in, if not the first.
        rank_pattern: `{regular expression: r}` for the end of a module's name; the first that matches wins.
        alpha_pattern: The same for alpha.
        use_rslora: `s = alpha / sqrt(r)` (Kalajdzievski 2023).
        use_dora: `y = m / |V| * V x + b` with `V = W + s A B` and a trained magnitude m for each output (Liu et al.
            2024). Linear layers only.
        bias: `"none"`, `"all"` or `"lora_only"`: which of the base's biases the adapter has a trained copy of.
        modules_to_save: Ends of names of modules that the adapter has a whole trained copy of: heads, embeddings
            (`"norm"` means every module whose name ends so, `input_layernorm` too, as in peft).
        trainable_tokens: Ids of tokens of which the adapter has vectors of its own, in a tied head too (peft's
            `trainable_token_indices`); `{name: ids}` for another embedding than the input's.
        init: `"default"` (A uniform in +-1/sqrt(in), as the reference), `"gaussian"`, or `"pissa"`: A B begins as the
            kernel's principal part, which is taken off again (Meng et al. 2024). Linear layers only.

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
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: Any = ()
    init: str = "default"

    def __post_init__(self) -> None:
        def set_(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        for field in ("target_modules", "exclude_modules", "layers_pattern"):
            set_(field, frozen_names(getattr(self, field)))
        for field in ("rank_pattern", "alpha_pattern"):
            set_(field, frozen_pattern(getattr(self, field)))
        set_("modules_to_save", frozen_ends(self.modules_to_save))
        set_("trainable_tokens", frozen_tokens(self.trainable_tokens))
        if self.layers is not None:
            set_("layers", tuple(self.layers) if isinstance(self.layers, Iterable) else (self.layers,))
        refuse(MethodError, "LoRA: options that cannot be", lora_problems(self))

    def targets(self, model: Any) -> list[Target]:
        """Return the modules that are adapted, each with the layers that are meant.

        Raises:
            SelectionError: A part of the selection matches nothing.
        """
        wanted, kinds = self.resolved_targets(model), outside_heads(model, takes_product)
        check_names(model, "target_modules", wanted, kinds, "linear layer or embedding")
        check_names(model, "exclude_modules", self.exclude_modules, anything, "module")
        found = find(model, lambda name: self._accepts(name, wanted), kinds)
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
        return resolved(model, self.target_modules, getattr(model, "default_targets", None), "LoRA")

    def _accepts(self, name: str, wanted: Names) -> bool:
        if named(name, self.exclude_modules) or saves(name, self.modules_to_save):
            return False
        return named(name, wanted) and (self.layers is None or layer_index(name, self.layers_pattern) in self.layers)

    def scale(self, name: str) -> tuple[int, float]:
        """Return rank and scale of the module of this name."""
        r = by_pattern(name, self.rank_pattern, self.r)
        alpha = by_pattern(name, self.alpha_pattern, self.alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang a low-rank product at every target, and copies where biases, modules or rows are trained."""
        targets = self.targets(model)
        make_seams(t.named.module for t in targets if is_linear(t.named.module))
        for target in targets:
            hang(target.named.module, "delta", name, self._low_rank(model, target, name, key))
            log.info(
                "%s - LoRA %r, rank %s",
                target.named.path,
                name,
                dict(zip(target.names, self._ranks(target), strict=True)),
            )
        self._copy_biases(model, targets, name)
        copy_modules(model, self.modules_to_save, name)
        self._hang_tokens(model, name)

    def _ranks(self, target: Target) -> tuple[int, ...]:
        return tuple(self.scale(n)[0] for n in target.names)

    def _low_rank(self, model: Any, target: Target, name: str, key: jax.Array) -> LowRank:
        module, path = target.named.module, target.named.path
        *stack, width, out = module.embedding.shape if isinstance(module, Embed) else kernel_shape(module)
        lead = (len(target.picks),) if target.named.stacked else tuple(stack)
        ranks, scales = zip(*(self.scale(n) for n in target.names), strict=True)
        if max(ranks) > min(width, out):
            raise MethodError(
                f"LoRA: rank {max(ranks)} for {path}, whose kernel is {width} x {out}: at most {min(width, out)}"
            )
        if self.dropout and is_linear(module) and not passes_context(module):
            raise MethodError(
                f"LoRA: dropout={self.dropout} cannot reach {path}, a layer of your own model, which is called without "
                "a dropout key: use dropout=0"
            )
        key = jax.random.fold_in(key, number(path))
        shape, axes = (*lead, width, out), logical_axes(module)
        options: dict[str, Any] = {
            "ranks": ranks,
            "scales": scales,
            "layers_held": target.layers_held,
            "rate": self.dropout,
            "number": number(f"{path}.{name}"),
        }
        if isinstance(module, Embed):
            if self.use_dora or self.init == PISSA:
                what = "use_dora=True" if self.use_dora else f"init={PISSA!r}"
                raise MethodError(
                    f"LoRA: {what} is for linear layers; {path} is an embedding, leave it out of the targets"
                )
            a, b = initial(key, width, out, max(ranks))
            return LowRankEmbedding(shape, axes, a=a, b=b, **options)
        if self.init == PISSA:
            return PiSSA(shape, axes, kernel=kernel_of(model, module, target.layers_held), **options)
        options["a"] = INITS[self.init](key, (*lead, width, max(ranks)))
        if self.use_dora:
            return DoRA(shape, axes, kernel=kernel_of(model, module, target.layers_held), **options)
        return LowRank(shape, axes, **options)

    def _hang_tokens(self, model: Any, name: str) -> None:
        if not self.trainable_tokens:
            return
        head: Any = getattr(model, "lm_head", None)
        if getattr(head, "kernel", head) is None and saves("lm_head", self.modules_to_save):
            raise MethodError(
                "LoRA: trainable_tokens changes the rows of the tied head too, and modules_to_save has a copy of it: "
                "leave one of the two out"
            )
        hang_tokens(model, self.trainable_tokens, name)

    def _copy_biases(self, model: Any, targets: list[Target], name: str) -> None:
        if self.bias == "none":
            return
        if self.bias == "all":
            targets = find(model, lambda n: not saves(n, self.modules_to_save))
        having = [t for t in targets if getattr(t.named.module, "bias", None) is not None]
        if not having:
            raise MethodError(f"LoRA: bias={self.bias!r}, but no module that it means has a bias")
        for target in having:
            copy_leaves(target, ("bias",), name)


def takes_product(module: Any) -> bool:
    """Tell whether a low-rank product can hang at a module: a linear layer, or an embedding of ours."""
    return is_linear(module) or isinstance(module, Embed)
