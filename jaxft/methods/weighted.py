"""A new LoRA made of others that a model carries: their weighted combination."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import MethodError, nearest, refuse
from ..models.names import named_modules
from ..models.placement import place
from ..models.seams import number
from .average import carried, waiting
from .combine import (
    Array,
    disjoint_mean,
    drop_and_rescale,
    elected_sign,
    prune_smallest,
    truncated_product,
    weighted_sum,
)
from .heads import copied_heads
from .lora import LoRA
from .low_rank import LowRank
from .method import Method, attach
from .switch import all_off

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
SIGNS = ("total", "frequency")
COMBINATIONS = ("svd", "cat", *ON_FACTORS, *(f"{rule}_svd" for rule in ON_FACTORS[1:]))


@dataclasses.dataclass(frozen=True)
class Part:
    """One adapter's low-rank product at one kernel: `scale x a b`, with its weight in the combination."""

    adapter: str
    weight: float
    scale: float
    a: Array
    b: Array


Parts = dict[str, dict[int, list[Part]]]


def add_weighted_adapter(
    model: Any,
    weights: Mapping[str, float],
    *,
    name: str,
    combination: str = "svd",
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    seed: int = 0,
) -> Any:
    """Return a new model that also carries one LoRA made of several: of `sum_i w_i s_i A_i B_i`, or near it.

    As in peft 0.21.2, the scale of the result is 1, and with `w_i' = w_i s_i` the combinations are:

    - `"cat"`: exactly the sum, `A = [w_i' A_i ...]`, `B = [B_i ...]`; the ranks add up.
    - `"svd"`: the closest product of rank `svd_rank` to the sum.
    - `"linear"`: `A = sum_i sign(w_i') sqrt|w_i'| A_i`, `B = sum_i sqrt|w_i'| B_i`: rough, since `A_i B_j` are in it.
    - `"magnitude_prune"`, `"dare_linear"`: as linear, of factors thinned out to `density`, by size or at random.
    - `"ties"`, `"dare_ties"`: of factors thinned out so, the disjoint mean of the entries that agree in sign.
    - `"..._svd"`: the same rules on the whole changes `s_i A_i B_i`, then the closest product of rank `svd_rank`.

    Where only some of the adapters change a layer, these alone are combined there. peft 0.21.2 hands `use_rslora` on to
    the result, whose scale is then `sqrt(r)`; here it is 1, as the formula says. It also takes one adapter alone for
    "linear"; here the rule that is asked for is the rule that is applied.

    Args:
        model: A model that carries the adapters.
        weights: `{name: weight}`; negative ones take away.
        name: Of the new adapter. It waits for `set_adapter`; what the model computes does not change.
        combination: One of those above.
        density: What is kept in pruning, above 0 and at most 1.
        majority_sign_method: `"total"` or `"frequency"`, for ties.
        svd_rank: By default the largest rank among the adapters.
        seed: Of what is dropped at random.

    Returns:
        The new model; the given one stays as it is.

    Raises:
        MethodError: A name that no adapter has or that is taken, an adapter that is no plain LoRA, unequal ranks where
            factors are combined entry by entry, or an option out of range.

    >>> import jaxft
    >>> model = jaxft.attach(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2), name="a")
    >>> model = jaxft.attach(model, jaxft.LoRA(r=4), name="b")
    >>> model = jaxft.add_weighted_adapter(model, {"a": 0.7, "b": -0.3}, name="c", combination="cat")
    >>> jaxft.adapters(model)["c"].r, model.adapter_weights.get_value().tolist()
    (6, [1.0, 1.0, 0.0])
    """
    if not isinstance(weights, Mapping):
        raise MethodError(f"weights={weights!r}: give {{name: weight}}")
    meant = carried(model, weights, name)
    problems = [*_option_problems(weights, combination, density, majority_sign_method, svd_rank, seed)]
    problems += [what for given, method in meant.items() if (what := _no_plain_lora(given, method))]
    problems += [
        f"{given!r} has a copy of the head {head}, and heads do not add up (jaxft.average_adapters takes their mean)"
        for given in meant
        for head in copied_heads(model, given)
    ]
    refuse(MethodError, f"adapters that cannot be combined by {combination!r}", problems)
    parts, targets = _parts(model, weights)
    ranks = [[part.a.shape[1] for part in at] for layers in parts.values() for at in layers.values()]
    if combination in ON_FACTORS:
        _check_equal_ranks(parts, combination)
    largest = max(map(max, ranks))
    rank = int(max(map(sum, ranks)) if combination == "cat" else svd_rank or largest)
    _check_room(parts, combination, rank, svd_rank)
    fresh = attach(all_off(model), _method(list(meant.values()), targets, rank), name=name)
    for n in named_modules(fresh):
        for layer, at in parts.get(n.path, {}).items():
            rng = np.random.default_rng([seed, number(n.path), layer])
            a, b = _combined(at, combination, rank, density, majority_sign_method, rng)
            _put(n.module.delta[name], layer, a, b)
    return waiting(place(fresh), model)


def _option_problems(
    weights: Mapping[str, float], combination: str, density: Any, sign: str, svd_rank: Any, seed: Any
) -> Iterable[str]:
    for given, weight in weights.items():
        if not _is(Real, weight) or not math.isfinite(weight):
            yield f"weight {weight!r} of {given!r}: give a finite number"
    if not _is(Integral, seed) or seed < 0:
        yield f"seed={seed!r}: give a whole number of at least 0"
    if sign not in SIGNS:
        yield f"majority_sign_method={sign!r}: choose one of {', '.join(map(repr, SIGNS))}"
    if not isinstance(combination, str) or combination not in COMBINATIONS:
        yield f"combination={combination!r}: {nearest(str(combination), COMBINATIONS, n=3)}"
        return
    if sign in SIGNS[1:] and "ties" not in combination:
        yield f"majority_sign_method={sign!r}: no sign is elected in {combination!r}, only in ties"
    thins = any(word in combination for word in ("ties", "dare", "prune"))
    if thins and (not _is(Real, density) or not 0 < density <= 1):
        yield f"density={density!r}: say what share is kept, above 0 and at most 1"
    if not thins and density is not None:
        yield f"density={density!r}: {combination!r} keeps all, so give none"
    if svd_rank is not None and (not _on_deltas(combination) or not _is(Integral, svd_rank) or svd_rank < 1):
        yield f"svd_rank={svd_rank!r}: a whole number of at least 1, for a combination that ends in svd"


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _on_deltas(combination: str) -> bool:
    return combination.endswith("svd")


def _no_plain_lora(name: str, method: Method) -> str:
    """Say why an adapter is no low-rank product alone, "" if it is one."""
    if type(method) is not LoRA:
        return f"{name!r} is {type(method).__name__}: only LoRA can be (jaxft.average_adapters takes equal ones)"
    if method.use_dora:
        return f"{name!r} is DoRA, whose magnitudes do not add up: merge it into the base instead"
    if method.init not in ("default", "gaussian"):
        return f"{name!r} began with init={method.init!r}: jaxft.save_serving makes a plain LoRA of it"
    if method.modules_to_save or method.trainable_tokens or method.bias != "none":
        return f"{name!r} has values in the base's place (modules_to_save, trainable_tokens, bias): they do not add up"
    return ""


def _parts(model: Any, weights: Mapping[str, float]) -> tuple[Parts, tuple[str, ...]]:
    """Return what there is to combine, by path and layer; and the names of the modules."""
    parts: Parts = {}
    targets = []
    for n in named_modules(model):
        hung = {given: d for given, d in (getattr(n.module, "delta", None) or {}).items() if given in weights}
        for given, delta in hung.items():
            if type(delta) is not LowRank:
                raise MethodError(f"{given!r} has a {type(delta).__name__} at {n.path}; only low-rank products combine")
            for layer, scale, a, b in _products(delta):
                at = parts.setdefault(n.path, {}).setdefault(layer, [])
                at.append(Part(given, float(weights[given]), scale, a, b))
        if hung:
            targets += [n.names[layer] for layer in sorted(parts[n.path])] if n.stacked else list(n.names)
    return parts, tuple(targets)


def _products(delta: LowRank) -> Iterable[tuple[int, float, Array, Array]]:
    """Yield layer, scale, A `[in, r]` and B `[r, out]` of each kernel, padding left out."""
    flat = (np.asarray(v.get_value(), np.float32) for v in (delta.a, delta.b, delta.gate))
    a, b, gate = (x.reshape(-1, *x.shape[x.ndim - n :]) for x, n in zip(flat, (2, 2, 1), strict=True))
    ranks = delta.ranks if len(delta.ranks) == len(a) else delta.ranks * len(a)
    for i, (layer, r) in enumerate(zip(delta.layers_held or range(len(a)), ranks, strict=True)):
        yield layer, float(gate[i, 0]), a[i, :, :r], b[i, :r]


def _check_equal_ranks(parts: Parts, combination: str) -> None:
    found = {
        ", ".join(f"{part.adapter!r} has rank {part.a.shape[1]}" for part in at): path
        for path, layers in parts.items()
        for at in layers.values()
        if len({part.a.shape[1] for part in at}) > 1
    }
    headline = f"{combination!r} combines factors entry by entry, so ranks must be equal; take 'cat' or 'svd'"
    refuse(MethodError, headline, [f"{what}, at {path}" for what, path in found.items()])


def _check_room(parts: Parts, combination: str, rank: int, svd_rank: int | None) -> None:
    """Refuse a rank that some kernel is too small for: the result has one rank for all."""
    kernels = {path: (at[0].a.shape[0], at[0].b.shape[1]) for path, layers in parts.items() for at in layers.values()}
    most = min(map(min, kernels.values()))
    asked = f"svd_rank={svd_rank}" if svd_rank else "the largest rank among the adapters"
    why = "'cat' adds the ranks up" if combination == "cat" else f"{combination!r} takes {asked}"
    headline = f"{why}, and the result has one rank for all kernels: take combination='svd' with an svd_rank of at most"
    small = {path: kernel for path, kernel in kernels.items() if min(kernel) < rank}
    problems = [f"rank {rank} for {path}, whose kernel is {n} x {m}" for path, (n, m) in small.items()]
    refuse(MethodError, f"{headline} {most}", problems)


def _method(methods: Sequence[Any], targets: tuple[str, ...], rank: int) -> LoRA:
    """Return the method of the result: scale 1, the places of all."""
    where = ("target_modules", "exclude_modules", "layers", "layers_pattern")
    plain = {"r": rank, "alpha": rank, "rank_pattern": (), "alpha_pattern": (), "use_rslora": False}
    if any(getattr(m, option) != getattr(methods[0], option) for m in methods for option in where):
        plain |= {"target_modules": targets, "exclude_modules": None, "layers": None, "layers_pattern": None}
    return dataclasses.replace(methods[0], **plain)


def _combined(
    parts: Sequence[Part], combination: str, rank: int, density: float | None, sign: str, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return A `[in, r]` and B `[r, out]` of one kernel."""
    scaled = np.array([part.weight * part.scale for part in parts], np.float32)
    if combination in ("cat", "svd"):
        a = np.concatenate([part.a * w for part, w in zip(parts, scaled, strict=True)], 1)
        b = np.concatenate([part.b for part in parts], 0)
        return (a, b) if combination == "cat" else truncated_product(a, b, rank)

    def by_rule(arrays: list[Array], weights: Array) -> Array:
        if combination.startswith("dare"):
            arrays = [drop_and_rescale(x, density or 1, rng) for x in arrays]
        elif not combination.startswith("linear"):
            arrays = [prune_smallest(x, density or 1) for x in arrays]
        stacked = np.stack(arrays)
        if "ties" in combination:
            return disjoint_mean(stacked, weights, elected_sign(stacked, sign))
        return weighted_sum(stacked, weights)

    if combination in ON_FACTORS:
        root = np.sqrt(np.abs(scaled))
        return by_rule([part.a for part in parts], np.sign(scaled) * root), by_rule([part.b for part in parts], root)
    changes = [part.scale * part.a @ part.b for part in parts]
    change = by_rule(changes, np.array([part.weight for part in parts], np.float32))
    return truncated_product(change, np.eye(change.shape[1], dtype=np.float32), rank)


def _put(delta: Any, layer: int, a: Array, b: Array) -> None:
    """Write a product into a fresh delta, zeros where its rank is larger."""
    i = (delta.layers_held or range(layer + 1)).index(layer)
    for variable, value in ((delta.a, a), (delta.b, b)):
        whole = np.array(variable.get_value())
        flat = whole.reshape(-1, *whole.shape[-2:])
        flat[i] = 0
        flat[i][tuple(map(slice, value.shape))] = value
        variable.set_value(jnp.asarray(whole))
