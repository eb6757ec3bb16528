"""The state of proximal policy optimisation: policy, reference and critic over the arrays of one base."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from ..errors import MethodError, SelectionError
from ..methods import Full, Method
from ..methods.merge import merge
from ..methods.method import adapters, detach, parts_of
from ..methods.partition import combine
from ..models.names import is_variable, variables
from ..models.placement import mesh_of, move, place
from ..models.seams import AdapterWeights
from ..models.sharing import with_head
from ..parallel.rules import repeated
from .state import TrainState

CRITIC = "critic"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PpoState(TrainState):
    """The policy's state, and what learning from rewards needs besides.

    No array of the frozen part is in it twice. (A critic that adapts what the policy trains stands on the reference's
    arrays, which both hold.)

    Attributes:
        reference: The policy's trainable part as the stage began; with `frozen` it is the reference. It never changes
            and is in no checkpoint: a run that goes on makes it again.
        critic: A classifier of one label on the reference's backbone, with a trained part of its own. Its frozen part
            lacks what the policy's `frozen` holds: `critic_of` puts it together.
        kl_coefficient: Weight of the KL to the reference, float32.
    """

    reference: Any = None
    critic: Any = None
    kl_coefficient: Any = None

    @classmethod
    def begin(
        cls, policy: TrainState, method: Method, tx: optax.GradientTransformation, *, seed: int, kl: float, fresh: bool
    ) -> Self:
        """Give a policy its reference and critic.

        The critic stands on what the stage begins with, without an adapter that the policy has just got: its own is
        named "critic". Its head begins at zero, so that all first values are 0 (as in Ziegler et al. 2019; Huang et al.
        2024), and the first advantages are those of the rewards alone.

        Args:
            policy: The policy before step 0.
            method: The critic's.
            tx: The critic's optimiser.
            seed: Of the first values of its adapter.
            kl: The first KL coefficient.
            fresh: Whether the policy's adapter is new; else it goes on with one that the critic has beneath its own.

        Raises:
            MethodError: The critic's method does not fit it.
        """
        shapes = isinstance(policy.step, jax.ShapeDtypeStruct)
        reference = policy.trainable if shapes else place(jax.tree.map(jnp.copy, policy.trainable))
        model = combine(reference, policy.frozen)
        if fresh and policy.name in adapters(model):
            model = detach(model, policy.name)
        try:
            if adapters(model) and any(isinstance(part, Full) for part in parts_of(method)):
                model = merge(model)
            critic = TrainState.create(value_model(model), method, tx, seed=seed, name=CRITIC)
        except (MethodError, SelectionError) as error:
            raise MethodError(f"the critic, which ppo.critic gives a method of its own: {error}") from None
        critic = critic.replace(frozen=borrowing(critic.frozen, policy.frozen))
        coefficient, mesh = jax.eval_shape(lambda: jnp.float32(kl)) if shapes else jnp.float32(kl), mesh_of(model)
        fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
        fields["kl_coefficient"] = coefficient if mesh is None else move(coefficient, repeated(mesh))
        return cls(**fields, reference=reference, critic=critic)

    def changing(self) -> dict[str, Any]:
        """Return what steps change, as a checkpoint holds it: a tree of arrays."""
        return {**super().changing(), "critic": self.critic.changing(), "kl_coefficient": self.kl_coefficient}

    def changed(self, saved: dict[str, Any]) -> Self:
        """Return this state with what a checkpoint held: the inverse of `changing`."""
        policy = super().changed(saved)
        return policy.replace(critic=self.critic.changed(saved["critic"]), kl_coefficient=saved["kl_coefficient"])


def value_model(model: Any) -> Any:
    """Return the model of values on a causal language model's backbone, its head zero.

    >>> import jaxft
    >>> values = value_model(jaxft.testing.tiny_llama()).scores({"input_ids": jnp.array([[3, 4]])})
    >>> values.shape, float(jnp.abs(values).max())
    ((1, 2, 1), 0.0)
    """
    critic = with_head(model, ("value",))
    for variable in variables(critic).values():
        if variable.get_metadata("new", False):
            variable.set_value(jnp.zeros_like(variable.get_value()))
    return critic


def borrowing(part: Any, lender: Any) -> Any:
    """Return a part with holes where it holds the very arrays, or like shapes, that another has at the same place."""
    there = {path: variable.get_value() for path, variable in variables(lender).items()}

    def pick(path: str, variable: Any) -> Any:
        value = variable.get_value()
        shape = isinstance(value, jax.ShapeDtypeStruct) and not isinstance(variable, AdapterWeights)
        equal = shape and there.get(path) == value
        return variable.replace(None) if equal or (value is not None and there.get(path) is value) else variable

    return _map(pick, part)


def critic_of(trainable: Any, frozen: Any, lender: Any) -> Any:
    """Return the critic: its two parts, and what it has borrowed from the policy's frozen part."""
    there = {path: variable.get_value() for path, variable in variables(lender).items()}
    own = {path for part in (trainable, frozen) for path, v in variables(part).items() if v.get_value() is not None}

    def pick(path: str, variable: Any) -> Any:
        return variable if path in own else variable.replace(there[path])

    return combine(trainable, _map(pick, frozen))


def _map(f: Any, part: Any) -> Any:
    paths = iter(variables(part))
    return jax.tree.map(lambda variable: f(next(paths), variable), part, is_leaf=is_variable)
