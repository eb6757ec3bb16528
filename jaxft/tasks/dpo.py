"""Direct preference optimisation: the better of two answers becomes likelier, as seen from where training began."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..config.preferences import Dpo
from ..errors import ConfigError
from ..loading import load_run
from ..losses.comparisons import PAIR, make_dpo_loss, reference_log_probs
from ..methods.method import adapters, detach
from ..methods.partition import attached
from ..models.placement import mesh_of
from ..parallel.rules import rows_sharding
from ..run import RunFolder
from ..train.evaluate import evaluate_loss
from ..train.state import TrainState
from ..train.step import ModelLoss, make_train_step
from .comparisons import OfComparisons
from .start import base_of, begin, dtype_of, load_base
from .task import Data


class PreferenceOptimisation(OfComparisons):
    """Tune a policy on pairs, beside a frozen copy of itself as it was when the run began.

    The reference drops nothing, and the policy drops what the run's own `method` asks: without that the loss begins at
    log 2. Dropout of the base and of an earlier run's adapter is off, unless `dpo.dropout` asks for it.

    Attributes:
        reference: That copy; it shares what is not trained with the policy.
    """

    formats = ("preference",)
    unit = "mean over pairs"
    shown: ClassVar[Mapping[str, str]] = {"accuracy": "pairs told apart rightly (share)"}
    reference: Any

    @property
    def options(self) -> Dpo:
        """The section `dpo` of the config."""
        return self.config.dpo or Dpo()

    @cached_property
    def loss(self) -> ModelLoss:
        """The loss of a step."""
        o = self.options
        loss: ModelLoss = make_dpo_loss(beta=o.beta, kind=o.kind, label_smoothing=o.label_smoothing)
        return loss

    def load_data(self, *, train: bool = True) -> Data:
        """Read the rows. Arguments and errors as of the task.

        Raises:
            ConfigError: The model is an encoder, which gives no probability to an answer.
        """
        if self.is_encoder():
            raise ConfigError("model: an encoder gives no probability to an answer; dpo needs a causal language model")
        return super().load_data(train=train)

    def load_model(self, mesh: Mesh | None, data: Data) -> Any:
        """Return the model that a config begins with, or that the run has made; the reference is what that began with.

        The run's adapter is laid over the reference's own base, which so is in memory once.
        """
        del data
        begun = self.begun or self.config
        base = load_base(begun, base_of(begun), "none", mesh)
        model, method, name = begin(begun, base)
        self.reference = attached(model, method, name=name, seed=begun.train.seed)
        if self.begun is None:
            return self.reference
        for one in adapters(base):
            base = detach(base, one)
        return load_run(RunFolder(self.config.model.source), dtype=dtype_of(begun), mesh=mesh, over=base)[0]

    def make_step(self, state: TrainState) -> Callable[..., Any]:
        """Return the step. The reference is made of the state: its trained part is copied, since steps consume it."""
        copied = jax.tree.map(jnp.copy, state.trainable)
        self.reference = state.replace(trainable=copied).model
        accumulate = self.config.train.accumulate
        return ReferredStep(make_train_step(self.loss, accumulate=accumulate), self.reference, accumulate)

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], Any]:
        """Return the loss and the figures of `make_dpo_loss` on the held-out pairs, beside the reference."""
        collate = self.collate()

        def referred(examples: Any, **options: Any) -> Any:
            batch = collate(examples, **options)
            return {**batch, **reference_log_probs(self.reference, batch)}

        return evaluate_loss(model, self.loss, data.held_out, batch_size=batch_size, collate=referred), None

    def held(self, state: TrainState) -> Any:
        """Return what the step holds besides the state: the reference's copy of the trained part."""
        return state.trainable

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest batch, as shapes."""
        row = jax.ShapeDtypeStruct((self.config.train.batch_size,), jnp.float32)
        return {**super().shapes(), **{f"{name}_reference": row for name in PAIR}}


class ReferredStep:
    """A step whose batches first get the log-probabilities of a reference, micro-batch by micro-batch as it does.

    Args:
        step: The step.
        reference: The model that training began with.
        accumulate: Micro-batches of a batch.
    """

    def __init__(self, step: Callable[..., Any], reference: Any, accumulate: int = 1):
        self.step, self.reference, self.accumulate = step, reference, accumulate

    def __call__(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
        """Take one step."""
        return self.step(state, {**batch, **self.refer(batch)})

    def refer(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Return `chosen_reference` and `rejected_reference` `[B]` of a batch."""
        mesh, rows = mesh_of(self.reference), len(next(iter(batch.values()))) // self.accumulate
        parts = []
        for i in range(self.accumulate):
            part = {name: x[i * rows : (i + 1) * rows] for name, x in batch.items()}
            part = part if mesh is None else jax.device_put(part, rows_sharding(mesh))
            parts.append(reference_log_probs(self.reference, part))
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
