"""Proximal policy optimisation: answers are drawn, rewarded, and learnt from, without going far from the reference."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..config.schema import Ppo, make_one
from ..methods.partition import combine
from ..train.experience import Experience, PpoOptions
from ..train.policy import PpoState
from ..train.ppo import PpoUpdate
from ..train.scoring import log_probs_of_both, values_of
from ..train.step import Metrics
from .prompts import OfPrompts
from .rollouts import Drawing
from .start import base_folder, begin, optimizer_by_step
from .task import Data


class PolicyOptimization(OfPrompts):
    """Raise the reward of the answers to prompts (Schulman et al. 2017; Ziegler et al. 2019)."""

    unit = "of policy and values"
    critic_positions: int | None = None

    @property
    def rollouts(self) -> Ppo:
        """How answers are drawn, what they are worth, and how is learnt from them."""
        assert self.config.ppo is not None  # a config of this task has it
        return self.config.ppo

    @property
    def options(self) -> PpoOptions:
        """How the updates are made."""
        ours = {field.name for field in dataclasses.fields(PpoOptions)} - {"accumulate"}
        return PpoOptions(accumulate=self.config.train.accumulate, **{n: getattr(self.rollouts, n) for n in ours})

    def load_state(self, steps: int, mesh: Mesh | None, data: Data) -> PpoState:
        """Return the state that the run begins with, and load the models of the rewards over its base."""
        del data
        model, bare = self.load_start(mesh)
        state = self.state_of(model, steps)
        self.reward = self.reward.load(bare, base_folder(self.config))
        self.critic_positions = state.critic.frozen.positions_left()
        return state

    def state_of(self, model: Any, steps: int) -> PpoState:
        """Return the first state over the model that the stage begins with, arrays or shapes."""
        config, p = self.config, self.rollouts
        policy = begin(config, model, optimizer_by_step(config, steps))
        method = policy.method if p.critic is None else make_one(p.critic)
        options: dict[str, Any] = {"seed": config.train.seed, "kl": p.kl_coefficient}
        return PpoState.begin(policy, method, policy.tx, fresh=config.method is not None, **options)

    def positions_left(self, model: Any) -> int | None:
        """Return how many tokens prompt and answer may have together, by policy and critic."""
        known = [left for left in (model.positions_left(), self.critic_positions) if left is not None]
        return min(known, default=None)

    def make_step(self, state: Any) -> Callable[..., Any]:
        """Return the step: draw, score, reward, learn."""
        self.reference = combine(state.reference, state.frozen)
        return PpoStep(Drawing(state.frozen, self.data, self.rollouts, self.reward), PpoUpdate(self.options))


@dataclasses.dataclass(frozen=True)
class PpoStep:
    """One iteration, called as `state, metrics = step(state, batch)`.

    Attributes:
        drawing: Draws the answers, and asks what they are worth.
        update: Learns from them.
    """

    drawing: Drawing
    update: PpoUpdate

    def __call__(self, state: PpoState, batch: Mapping[str, Any]) -> tuple[PpoState, Metrics]:
        """Take one iteration."""
        drawing, critic = self.drawing, state.critic
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
        rollout = drawing.draw(state.model, dict(batch), key)
        log_probs, reference, entropy = log_probs_of_both(
            state.trainable, state.reference, state.frozen, rollout, drawing.temperature
        )
        values = values_of(critic.trainable, critic.frozen, state.frozen, rollout)
        rewards, each = drawing.scored(drawing.answers(rollout, dict(batch)))  # the passes above run meanwhile
        experience = Experience(rollout, log_probs, reference, entropy, values, drawing.placed(rewards))
        state, metrics = self.update(state, experience)
        return state, {**metrics, **{name: jnp.asarray(x.mean()) for name, x in each.items()}}
