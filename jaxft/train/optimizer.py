"""Optimisers and schedules by name, and which leaves decay may touch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..errors import OptimizerError, nearest, refuse

DECAYED = ("kernel", "embedding", "a", "b")
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")


def decay_mask(params: Mapping[str, Any]) -> dict[str, bool]:
    """Tell by kind of leaf what weight decay acts on: matrices, not biases, norm scales or other vectors.

    By the leaf's name and not by its number of dimensions, since a stacked bias has two.

    Args:
        params: `{path: array}`, as the optimiser of a `TrainState` sees the trained leaves.

    Returns:
        `{path: bool}`, as `optax.adamw(..., mask=decay_mask)` takes it.

    >>> decay_mask({"model.layers.mlp.up_proj.kernel": 0, "transformer.h.ln_1.bias": 0, "lm_head.delta.default.a": 0})
    {'model.layers.mlp.up_proj.kernel': True, 'transformer.h.ln_1.bias': False, 'lm_head.delta.default.a': True}
    """
    return {path: path.rsplit(".", 1)[-1] in DECAYED for path in params}


def make_schedule(kind: str, learning_rate: float, *, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Return the learning rate by step, as the schedules of `transformers` give it.

    In the warm-up `learning_rate * n / warmup_steps`; after it constant, or linearly or along half a cosine down to 0
    at the last step.

    Args:
        kind: `"constant"`, `"linear"` or `"cosine"`.
        learning_rate: At its highest.
        steps: Of the whole run, warm-up included.
        warmup_steps: Steps of the warm-up.

    Returns:
        A function of the number of steps taken.

    Raises:
        OptimizerError: No such schedule, or a warm-up that is as long as the run.

    >>> schedule = make_schedule("linear", 1.0, steps=10, warmup_steps=2)
    >>> [round(float(schedule(n)), 3) for n in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if kind not in SCHEDULES:
        raise OptimizerError(f"schedule {kind!r} is unknown; {nearest(kind, SCHEDULES)}")
    if warmup_steps >= steps:
        raise OptimizerError(f"warmup_steps={warmup_steps} of {steps} steps: nothing would be left after the warm-up")
    rest = steps - warmup_steps
    falling = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest),
    }[kind]()
    if not warmup_steps:
        return falling
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), falling], [warmup_steps])


def by_step(make: Callable[[Any], optax.GradientTransformation], schedule: optax.Schedule) -> Any:
    """Return an optimiser whose learning rate goes by the steps of a run, each of which may update many times.

    Its `update` is told the step: `update(grads, state, params, step=step)`. So the rate is that of the step however
    many updates it takes, or leaves out.

    Args:
        make: Returns the optimiser of a learning rate; its state does not hang on it.
        schedule: The learning rate by step.

    >>> tx = by_step(optax.sgd, lambda step: 1.0 / (1 + step))
    >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), step=jnp.int32(1))
    >>> float(updates[0])
    -0.5
    """

    def update(grads: Any, state: Any, params: Any = None, *, step: jax.Array, **more: Any) -> tuple[Any, Any]:
        return optax.with_extra_args_support(make(schedule(step))).update(grads, state, params, **more)

    return optax.GradientTransformationExtraArgs(make(0.0).init, update)


def in_phases(first: optax.GradientTransformation, second: optax.GradientTransformation, steps: int) -> Any:
    """Return the optimiser that is `first` for some steps, and then `second` from a state of its own.

    Args:
        first: Of the first phase.
        second: Of what follows: of the same kind, with another schedule say.
        steps: Updates of the first phase.

    >>> import jax.numpy as jnp
    >>> tx = in_phases(optax.sgd(1.0), optax.sgd(0.5), 1)
    >>> state, moved = tx.init(jnp.zeros(1)), []
    >>> for _ in range(2):
    ...     update, state = tx.update(jnp.ones(1), state)
    ...     moved.append(float(update[0]))
    >>> moved
    [-1.0, -0.5]
    """

    def init(params: Any) -> Any:
        return jnp.int32(0), first.init(params)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        count, inner = state
        fresh = second.init(grads if params is None else params)
        inner = jax.tree.map(partial(jnp.where, count == steps), fresh, inner)
        updates, inner = jax.lax.cond(count < steps, first.update, second.update, grads, inner, params)
        return updates, (count + 1, inner)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    name: str,
    schedule: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
) -> optax.GradientTransformation:
    """Return an optimiser by name, with decay on matrices alone and the norm of all gradients clipped first.

    Args:
        name: `"adamw"`, `"adam"`, `"sgd"`, `"lion"` or `"adafactor"`.
        schedule: The learning rate, or a function of the steps taken.
        weight_decay: Decoupled, for adamw, lion and adafactor; adam and sgd have none and refuse it.
        clip_norm: Global norm over the trained leaves at most; None: no clipping.
        b1: First moment's decay, of adamw, adam and lion; None: optax's own default, for each.
        b2: Second moment's decay, likewise.
        eps: Added to the root of the second moment, of adamw and adam.

    Returns:
        An optax optimiser.

    Raises:
        OptimizerError: No such optimiser, or an option that it does not have.

    >>> tx = make_optimizer("adamw", 1e-3, weight_decay=0.1, clip_norm=1.0)
    >>> isinstance(tx, optax.GradientTransformation)
    True
    """
    moments = {key: value for key, value in (("b1", b1), ("b2", b2), ("eps", eps)) if value is not None}
    decay = {"weight_decay": weight_decay, "mask": decay_mask}
    factored = {"weight_decay_rate": weight_decay or None, "weight_decay_mask": decay_mask}
    makers = {
        "adamw": lambda: optax.adamw(schedule, **moments, **decay),
        "adam": lambda: optax.adam(schedule, **moments),
        "sgd": lambda: optax.sgd(schedule),
        "lion": lambda: optax.lion(schedule, **moments, **decay),
        "adafactor": lambda: optax.adafactor(schedule, **factored),
    }
    taken = {"adamw": {"b1", "b2", "eps"}, "adam": {"b1", "b2", "eps"}, "lion": {"b1", "b2"}}.get(name, set())
    refuse(
        OptimizerError,
        "an optimiser that cannot be made",
        [f"name {name!r} is unknown; {nearest(name, OPTIMIZERS)}"] * (name not in OPTIMIZERS)
        + [f"weight_decay={weight_decay}: {name} has no decoupled decay, take adamw"]
        * (name in ("adam", "sgd") and weight_decay > 0)
        + [f"{key}={value}: {name} has no such option" for key, value in moments.items() if key not in taken],
    )
    made = makers[name]()
    return made if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), made)
