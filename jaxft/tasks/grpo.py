"""Group relative policy optimisation: several answers to each prompt are drawn, and learn from each other's rewards."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..config.preferences import Grpo
from ..data import TrainBatches
from ..data.prompts import collate_prompts
from ..loading import free_name
from ..methods import Method
from ..methods.partition import combine
from ..models.placement import place
from ..train.grpo import Drawn, GrpoOptions, GrpoUpdate
from ..train.scoring import log_probs_of, log_probs_of_both
from ..train.state import TrainState
from ..train.step import Metrics
from .prompts import OfPrompts, whole, width_of
from .rollouts import Drawing, answer_shapes, trace_drawing
from .start import base_folder, optimizer_by_step
from .task import Data, steps_of


class GroupOptimization(OfPrompts):
    """Raise the reward of the answers to prompts, each measured by the others to the same (Shao et al. 2024).

    There is no critic, and no reference either where there is no KL to it.
    """

    unit = "of the policy"
    shown: ClassVar[Mapping[str, str]] = {"accuracy": "answers exactly right (share)"}

    @property
    def rollouts(self) -> Grpo:
        """How answers are drawn, what they are worth, and how is learnt from them."""
        assert self.config.grpo is not None  # a config of this task has it
        return self.config.grpo

    @property
    def options(self) -> GrpoOptions:
        """How the updates are made."""
        g, more = self.rollouts, ("accumulate", "max_length")
        names = [field.name for field in dataclasses.fields(GrpoOptions) if field.name not in more]
        given = {name: getattr(g, name) for name in names}
        return GrpoOptions(accumulate=self.config.train.accumulate, max_length=g.max_new_tokens, **given)

    def make_batches(self, data: Data) -> TrainBatches:
        """Return the batches: a random draw of prompts each, every one as often as there are answers to it.

        Raises:
            DataError: Fewer prompts than one batch.
        """
        t, size = self.config.train, self.rollouts.group_size
        collate = partial(collate_prompts, width=width_of(data), repeat=size)
        prompts = t.batch_size // size
        steps = steps_of(self.config, data.train, prompts)
        return TrainBatches(data.train, batch_size=prompts, seed=t.seed, steps=steps, collate=collate, window=1)

    def load_state(self, steps: int, mesh: Mesh | None, data: Data) -> TrainState:
        """Return the state that the run begins with, and load the models of the rewards over its base."""
        del data
        model, bare = self.load_start(mesh)
        state = self.begin(model, steps)
        self.reward = self.reward.load(bare, base_folder(self.config))
        return state

    def load_model(self, mesh: Mesh | None, data: Data) -> Any:
        """Return the model that a config begins with, or what its own run has made."""
        model = super().load_model(mesh, data)
        if not self.rollouts.kl_coefficient:
            self.reference = None
        return model

    def planned_state(self, model: Any, method: Method, steps: int) -> TrainState:
        """Return the state that a run begins with, for a plan."""
        return TrainState.create(model, method, optimizer_by_step(self.config, steps), name=free_name(model))

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest answers to learn from, as shapes."""
        config, referred = self.config, bool(self.rollouts.kl_coefficient)
        places = ["log_probs"] * (referred or self.options.updates > 1) + ["ref_log_probs"] * referred
        width, room = whole(config.data.max_length), self.rollouts.max_new_tokens
        return answer_shapes(config.train.batch_size, width, room, places)

    def programs(self, state: TrainState, batch: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """Return the updates, and the drawing of answers, as traced for a plan."""
        rollout, rest, drawing = trace_drawing(state.model, batch, state.key)
        return [(GrpoUpdate(self.options).trace(state, Drawn(rollout, **rest)), (state, batch)), drawing]

    def held(self, state: TrainState) -> Any:
        """Return what the step holds besides the state: the reference's copy of the trained part."""
        return state.trainable if self.rollouts.kl_coefficient else ()

    def make_step(self, state: TrainState) -> Callable[..., Any]:
        """Return the step: draw, reward, learn."""
        kept = place(jax.tree.map(jnp.copy, state.trainable)) if self.rollouts.kl_coefficient else None
        self.reference = None if kept is None else combine(kept, state.frozen)
        drawing = Drawing(state.frozen, self.data, self.rollouts, self.reward)
        return GrpoStep(drawing, GrpoUpdate(self.options), kept)


@dataclasses.dataclass(frozen=True)
class GrpoStep:
    """One iteration, called as `state, metrics = step(state, batch)`.

    Attributes:
        drawing: Draws the answers, and asks what they are worth.
        update: Learns from them.
        reference: The policy's trainable part as the stage began; None where there is no KL to it.
    """

    drawing: Drawing
    update: GrpoUpdate
    reference: Any = None

    def __call__(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        """Take one iteration."""
        drawing, model = self.drawing, state.model
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
        rollout = drawing.draw(model, dict(batch), key)
        old, reference = None, None
        if self.reference is not None:
            parts = (state.trainable, self.reference, state.frozen)
            old, reference, _ = log_probs_of_both(*parts, rollout, drawing.temperature)
        elif self.update.options.updates > 1:
            old = log_probs_of(model, rollout, drawing.temperature)
        rewards, each = drawing.scored(drawing.answers(rollout, dict(batch)))  # the pass above runs meanwhile
        state, metrics = self.update(state, Drawn(rollout, drawing.placed(rewards), old, reference))
        return state, {**metrics, **{name: jnp.asarray(x.mean()) for name, x in each.items()}}
