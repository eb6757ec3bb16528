"""A method is two things: what it attaches to the model, and which leaves of the pytree it trains."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import MethodError, refuse
from ..models.base import Model
from ..models.names import variables
from ..models.placement import place
from ..models.seams import SLOTS, AdapterWeights, Delta
from .heads import copy_heads
from .linear import unseam
from .stacking import refuse_clashes


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of every method: a frozen record of options.

    A method of your own overrides one or both of `fill` and `trains`; `jaxft.testing.check_method` holds it to the
    laws that ours keep. `a | b` is the method that attaches both and trains the union.

    >>> class NormsOnly(Method):
    ...     def trains(self, path, variable, name):
    ...         return path.endswith(".scale")
    >>> import jaxft
    >>> jaxft.parameter_report(jaxft.testing.tiny_llama(), NormsOnly()).trainable
    160
    """

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Hang this method's modules into the slots of `model`, a fresh copy that may be changed; by default nothing.

        Args:
            model: The copy.
            name: The adapter's name, the key in every slot.
            key: Source of initial values.
        """
        del model, name, key

    def trains(self, path: str, variable: nnx.Variable[Any], name: str) -> bool:
        """Tell whether a leaf is trained: by default, what hangs in a slot under the adapter's name.

        Args:
            path: Dotted path of the leaf.
            variable: The leaf.
            name: The adapter's name.
        """
        return isinstance(variable, Delta) and owner(path) == name

    def loaded(self) -> "Method":
        """Return the method as it attaches where its values are read from a file: by default as it is."""
        return self

    def __or__(self, other: "Method") -> "Method":
        """Return the method that attaches one after the other and trains what either trains."""
        if not isinstance(other, Method):
            return NotImplemented
        return Union((*parts_of(self), *parts_of(other)))


@dataclasses.dataclass(frozen=True)
class Union(Method):
    """Several methods as one, under one adapter name.

    Attributes:
        parts: The methods, in the order in which they attach.
    """

    parts: tuple[Method, ...]

    def fill(self, model: Any, name: str, key: jax.Array) -> None:
        """Attach each part in turn."""
        for i, part in enumerate(self.parts):
            part.fill(model, name, jax.random.fold_in(key, i) if i else key)

    def trains(self, path: str, variable: nnx.Variable[Any], name: str) -> bool:
        """Tell whether any part trains the leaf."""
        return any(part.trains(path, variable, name) for part in self.parts)

    def loaded(self) -> Method:
        """Return the parts as they attach where their values are read from a file."""
        return Union(tuple(part.loaded() for part in self.parts))


def parts_of(method: Method) -> tuple[Method, ...]:
    """Return the methods that a union is made of; a method that is none is its own only part."""
    return method.parts if isinstance(method, Union) else (method,)


def owner(path: str) -> str | None:
    """Return the name of the adapter that a leaf belongs to, None for the base's own.

    >>> owner("model.layers.self_attn.q_proj.delta.default.a"), owner("model.norm.scale")
    ('default', None)
    """
    parts = path.split(".")
    return next((parts[i + 1] for i, part in enumerate(parts[:-1]) if part in SLOTS), None)


def adapters(model: Any) -> dict[str, Method]:
    """Return the adapters that a model carries, by name.

    >>> import jaxft
    >>> jaxft.adapters(jaxft.attach(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2)))["default"].r
    2
    """
    weights = getattr(model, "adapter_weights", None)
    return {} if weights is None else dict(weights.get_metadata("adapters"))


def copy_tree(model: Any) -> Any:
    """Return a new tree of modules that shares the model's arrays, and may be changed."""
    if not isinstance(model, nnx.Module):
        hint = "give state.model" if hasattr(model, "trainable") else "give an nnx.Module"
        raise MethodError(f"a model is expected, this is a {type(model).__name__}: {hint}")
    shared = nnx.find_duplicates(model)
    if shared:
        pairs = "; ".join(" = ".join(".".join(map(str, path)) for path in paths) for paths in shared)
        raise MethodError(f"the model holds one thing in two places ({pairs}); let one module call the other instead")
    return jax.tree.map(lambda x: x, model)


def attach(model: Any, method: Method, *, name: str = "default", seed: int = 0) -> Any:
    """Return a new model with an adapter attached: it shares the base's arrays, and the given one stays as it is.

    The new adapter counts 1, the others as before. A method that attaches nothing (full, BitFit) adds nothing. Of a
    head that is new (`jaxft.load(..., labels=...)`) the adapter gets a copy of its own, which is trained whatever the
    method; `Full` trains the head itself.

    Args:
        model: A model of ours, or a person's own `nnx.Module` that has `nnx.Linear` layers.
        method: What to attach.
        name: The adapter's name.
        seed: Of its initial values.

    Returns:
        The new model.

    Raises:
        MethodError: The name is taken, the method does not fit the model, or it does not stack with an adapter that
            counts.
        SelectionError: Part of the method's selection matches nothing.

    >>> import jaxft
    >>> model = jaxft.testing.tiny_llama()
    >>> adapted = jaxft.attach(model, jaxft.LoRA(r=2), name="french")
    >>> sorted(jaxft.adapters(adapted)), sorted(jaxft.adapters(model))
    (['french'], [])
    """
    if not isinstance(method, Method):
        raise MethodError(f"{method!r} is no method; give jaxft.LoRA(...), jaxft.BitFit(), jaxft.Full() or your own")
    if not name.isidentifier() or name.startswith("_") or hasattr(nnx.Dict, name):
        raise MethodError(f"adapter name {name!r}: begin with a letter, use letters, digits and _; no method of a dict")
    if name in adapters(model):
        raise MethodError(f"the model already has an adapter {name!r}; it has {', '.join(map(repr, adapters(model)))}")

    def build(fresh: Any) -> Any:
        method.fill(fresh, name, jax.random.key(seed))
        copy_heads(fresh, method, name)
        register(fresh, name, method)
        return fresh

    fresh = copy_tree(model)
    _refuse_reserved(fresh)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(fresh)):
        return place(jax.eval_shape(lambda m: build(copy_tree(m)), fresh))
    fresh = build(fresh)
    if adapters(fresh):
        refuse_clashes(fresh, list(adapters(fresh)), fresh.adapter_weights.get_value())
    return place(fresh)


def _refuse_reserved(model: Any) -> None:
    """Refuse a model of which a module has the name of a slot: it would be taken for what an adapter has hung there."""
    taken = [path for path, m in nnx.iter_modules(model) if path and path[-1] in SLOTS and not isinstance(m, nnx.Dict)]
    refuse(
        MethodError,
        f"modules with a name that is kept for adapters ({', '.join(SLOTS)})",
        [f"{'.'.join(map(str, path))}: give it another name" for path in taken],
    )


def register(model: Any, name: str, method: Method) -> None:
    """Give a model the weight of a new adapter, if something was attached under its name."""
    if not any(owner(path) == name for path in variables(model)):
        return
    root: Any = getattr(model, "adapter_weights", None)
    known, weights = ((), jnp.zeros(0)) if root is None else (root.get_metadata("adapters"), root.get_value())
    weights = jnp.concatenate([weights, jnp.ones((*weights.shape[:-1], 1))], -1)
    inner: list[Any] = [m for _, m in nnx.iter_modules(model) if m is not model and hasattr(m, "adapter_weights")]
    for holder in [model, *inner]:  # a layer that has just got its seams learns of the adapters before this one too
        value = jnp.broadcast_to(weights, (*getattr(holder, "lead", ()), *weights.shape))
        holder.adapter_weights = nnx.data(AdapterWeights(value, adapters=(*known, (name, method))))


def detach(model: Any, name: str) -> Any:
    """Return a new model without one of its adapters.

    Raises:
        MethodError: There is no adapter of this name.

    >>> import jaxft
    >>> model = jaxft.attach(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2), name="french")
    >>> jaxft.adapters(jaxft.detach(model, "french"))
    {}
    """
    if name not in adapters(model):
        raise MethodError(f"no adapter {name!r}; the model has {sorted(adapters(model)) or 'none'}")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        return place(jax.eval_shape(lambda m: detach(m, name), model))
    fresh = copy_tree(model)
    modules: list[Any] = [module for _, module in nnx.iter_modules(fresh)]
    for module in modules:
        for slot in SLOTS:
            hung = getattr(module, slot, None)
            if isinstance(hung, nnx.Dict) and name in hung:
                rest = {k: v for k, v in hung.items() if k != name}
                setattr(module, slot, nnx.Dict(rest) if rest else nnx.data(None))
        weights: Any = getattr(module, "adapter_weights", None)
        if isinstance(weights, AdapterWeights):
            known = weights.get_metadata("adapters")
            keep = [i for i, (n, _) in enumerate(known) if n != name]
            left = tuple(known[i] for i in keep)
            value = weights.get_value()[..., jnp.array(keep, int)]
            module.adapter_weights = nnx.data(AdapterWeights(value, adapters=left) if left else None)
    if not adapters(fresh):
        for module in modules:
            unseam(module)
        forget_adapters(fresh)
    return fresh


def forget_adapters(model: Any) -> None:
    """Leave a model as it is without adapters: the empty slot of ours, nothing on a person's own."""
    if hasattr(model, "adapter_weights") and not isinstance(model, Model):
        del model.adapter_weights
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Model):
            module.adapter_weights = nnx.data(None)


def hang(module: Any, slot: str, name: str, what: Any) -> None:
    """Put something into a module's slot under the adapter's name, beside what hangs there.

    Raises:
        MethodError: The same adapter already claims the slot of this module.
    """
    hung = getattr(module, slot)
    if hung is not None and name in hung:
        raise MethodError(
            f"two parts of the adapter {name!r} claim `{slot}` of the same module ({type(module).__name__}); "
            "let them target different modules, or give them different names"
        )
    setattr(module, slot, nnx.Dict({**(hung or {}), name: what}))
