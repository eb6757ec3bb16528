"""Proximal policy optimisation: answers are drawn, rewarded, and learnt from, without going far from the reference."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..config.preferences import Ppo
from ..config.schema import make_one
from ..loading import free_name
from ..methods import Method
from ..methods.partition import combine
from ..train.experience import Experience, PpoOptions
from ..train.policy import PpoState
from ..train.ppo import PpoUpdate
from ..train.scoring import log_probs_of_both, values_of
from ..train.state import TrainState
from ..train.step import Metrics
from .prompts import OfPrompts, whole
from .rollouts import Drawing, answer_shapes, trace_drawing
from .start import base_folder, optimizer_by_step
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
        config = self.config
        model, bare = self.load_start(mesh)
        state = self.with_critic(self.begin(model, steps), fresh=config.method is not None)
        self.reward = self.reward.load(bare, base_folder(config))
        self.critic_positions = state.critic.frozen.positions_left()
        return state

    def with_critic(self, policy: TrainState, *, fresh: bool) -> PpoState:
        """Return the state of a policy before step 0 with what learning from rewards needs besides."""
        p = self.rollouts
        method = policy.method if p.critic is None else make_one(p.critic)
        return PpoState.begin(policy, method, policy.tx, seed=self.config.train.seed, kl=p.kl_coefficient, fresh=fresh)

    def planned_state(self, model: Any, method: Method, steps: int) -> PpoState:
        """Return the state that a run begins with, for a plan."""
        policy = TrainState.create(model, method, optimizer_by_step(self.config, steps), name=free_name(model))
        return self.with_critic(policy, fresh=True)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest answers to learn from, as shapes."""
        config, places = self.config, ("log_probs", "ref_log_probs", "entropy", "values")
        width, room = whole(config.data.max_length), self.rollouts.max_new_tokens
        return answer_shapes(config.train.batch_size, width, room, places)

    def programs(self, state: Any, batch: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """Return the updates, and the drawing of answers, as traced for a plan."""
        rollout, rest, drawing = trace_drawing(state.model, batch, state.key)
        learnt = PpoUpdate(self.options).trace(state, Experience(rollout, **rest))
        return [(learnt, (dataclasses.replace(state, reference=None), batch)), drawing]

    def positions_left(self, model: Any) -> dict[str, int | None]:
        """Return how many tokens prompt and answer may have together, by each model that reads them."""
        return {**super().positions_left(model), "the critic": self.critic_positions}

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
