"""IA3 (Liu et al. 2022): trained vectors that scale keys, values and what the last layer of an MLP reads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import MethodError, SelectionError, refuse
from ..models.seams import Const, Context, Delta, lift
from .copies import copy_modules, saves
from .linear import is_linear, kernel_shape, logical_axes, make_seams
from .low_rank import per_row
from .matching import (
    Names,
    Target,
    anything,
    check_names,
    find,
    frozen_ends,
    frozen_names,
    log,
    named,
    outside_heads,
    resolved,
)
from .method import Method, hang
from .options import selection_problems


class Scale(nnx.Module):
    """`y = (W x + b) * l`, l one at first.

    Args:
        shape: `(*lead, out)`; the leading axes are the layers held.
        axis: Logical axis of the output.
        layers_held: Indices of the layers in their stack; None for all, or outside a stack.
    """

    reversible = True

    def __init__(self, shape: tuple[int, ...], axis: Any, layers_held: tuple[int, ...] | None):
        lead = shape[:-1]
        self.scale = Delta(jnp.ones(shape), axes=(*("layers",) * len(lead), axis))
        self.gate = Const(jnp.ones((*lead, 1)))  # scattered with l, it says in which layers that counts
        self.layers_held = layers_held

    def __call__(self, linear: Any, x: jax.Array, y: jax.Array, ctx: Context, weight: jax.Array) -> jax.Array:
        """Return what the adapter adds to the output `[..., out]`: `w (l - 1) y`."""
        del linear, x, ctx
        return (per_row(weight, y) * lift(self.change(), y) * y.astype(jnp.float32)).astype(y.dtype)

    def change(self) -> jax.Array:
        """Return `l - 1`, `(*lead, out)`; zero in layers that it is not for."""
        return self.gate.get_value() * (self.scale.get_value() - 1)

    def kernel_change(self, kernel: jax.Array) -> jax.Array:
        """Return what the adapter adds to a kernel, `(*lead, in, out)` in float32."""
        return kernel.astype(jnp.float32) * self.change()[..., None, :]

    def bias_change(self, bias: jax.Array) -> jax.Array:
        """Return what the adapter adds to a bias, `(*lead, out)` in float32."""
        return bias.astype(jnp.float32) * self.change()


class InputScale(Scale):
    """`y = W (x * l) + b`, l one at first: what the layer reads is scaled, so that one product with W is enough."""

    def __call__(self, linear: Any, x: jax.Array, y: jax.Array, ctx: Context, weight: jax.Array) -> jax.Array:
        """Add nothing to the output."""
        del linear, x, ctx, weight
        return jnp.zeros((), y.dtype)

    def of_input(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Return `w (l - 1)`, which is added to the 1 that the input `[..., in]` is scaled by."""
        return per_row(weight, x) * lift(self.change(), x)

    def kernel_change(self, kernel: jax.Array) -> jax.Array:
        """Return what the adapter adds to a kernel, `(*lead, in, out)` in float32."""
        return kernel.astype(jnp.float32) * self.change()[..., None]

    def bias_change(self, bias: jax.Array) -> jax.Array:
        """Return what the adapter adds to a bias: nothing."""
        return jnp.zeros(bias.shape)


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """`y = (W x + b) * l`, and in feed-forward modules `y = W (x * l) + b`, trained l; it is one at first.

    Of several IA3 adapters at one module the changes `l - 1` add up, weighted; peft multiplies the l.

    Attributes:
        target_modules: Names of linear layers (`"k_proj"` means every one whose name ends so), a regular expression
            for the whole name, `"all-linear"`, or None: what peft scales in the family.
        feedforward_modules: Which of them are scaled at their input; None: what peft takes in the family.
        exclude_modules: Names or a regular expression; wins over the targets.
        modules_to_save: Ends of names of modules that the adapter has a whole trained copy of.

    Raises:
        MethodError: An option that cannot be, or a model of which no default is known.
        SelectionError: A name or pattern that matches nothing.

    >>> import jaxft
    >>> print(jaxft.parameter_report(jaxft.testing.tiny_llama(), jaxft.IA3()))
    trainable params: 160 || all params: 19,776 || trainable%: 0.8091
      model.layers.mlp.down_proj                  96
      model.layers.self_attn.k_proj               32
      model.layers.self_attn.v_proj               32
    """

    target_modules: Names = None
    feedforward_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("target_modules", "feedforward_modules", "exclude_modules"):
            object.__setattr__(self, field, frozen_names(getattr(self, field)))
        object.__setattr__(self, "modules_to_save", frozen_ends(self.modules_to_save))
        refuse(MethodError, "IA3: options that cannot be", selection_problems(self))

    def resolved_targets(self, model: Any) -> tuple[Names, Names]:
        """Return targets and feed-forward modules as names or regular expressions, the defaults worked out.

        Raises:
            MethodError: A default is needed that this model does not have.
        """
        defaults = getattr(model, "default_ia3", (None, None))
        pair = (self.target_modules, self.feedforward_modules)
        for field, given, default in zip(("target_modules", "feedforward_modules"), pair, defaults, strict=True):
            if given is None and default is None:
                raise MethodError(f"IA3: no default {field} is known for a {type(model).__name__}: name them")
        wanted, inputs = pair
        return resolved(model, wanted, defaults[0], "IA3"), defaults[1] if inputs is None else inputs

    def targets(self, model: Any) -> list[tuple[Target, bool]]:
        """Return the modules that are scaled, each with the layers that are meant, and whether at their input.

        Raises:
            SelectionError: A part of the selection matches nothing.
        """
        (wanted, inputs), kinds = self.resolved_targets(model), outside_heads(model, is_linear)
        check_names(model, "target_modules", wanted, kinds, "linear layer")
        check_names(model, "feedforward_modules", self.feedforward_modules, kinds, "linear layer")
        check_names(model, "exclude_modules", self.exclude_modules, anything, "module")

        def accepts(name: str) -> bool:
            apart = named(name, self.exclude_modules) or saves(name, self.modules_to_save)
            return named(name, wanted) and not apart

        found = find(model, accepts, kinds)
        if not found:
            raise SelectionError(f"IA3: target_modules={wanted!r} without the excluded ones leaves no module to scale")
        names = [name for target in found for name in target.names]
        given = self.feedforward_modules
        for one in [given] if isinstance(given, str) else [(end,) for end in given or ()]:
            if not any(named(name, one) for name in names):
                raise SelectionError(f"IA3: feedforward_modules={one!r} is none of the target modules {wanted!r}")
        mixed = [t.named.path for t in found if len({named(name, inputs) for name in t.names}) > 1]
        refuse(MethodError, "IA3: scaled at the input in some layers, at the output in others", mixed)
        return [(target, named(target.names[0], inputs)) for target in found]

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang a vector at every target, and copies where whole modules are trained."""
        del key
        targets = self.targets(model)
        make_seams(target.named.module for target, _ in targets)
        for target, at_input in targets:
            module = target.named.module
            *stack, width, out = kernel_shape(module)
            lead = (len(target.picks),) if target.named.stacked else tuple(stack)
            axes = logical_axes(module)
            scale = (
                InputScale((*lead, width), axes[0], target.layers_held)
                if at_input
                else Scale((*lead, out), axes[1], target.layers_held)
            )
            hang(module, "delta", name, scale)
            log.info("%s - IA3 %r, its %s", target.named.path, name, "input" if at_input else "output")
        copy_modules(model, self.modules_to_save, name)
