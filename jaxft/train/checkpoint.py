"""Checkpoints of what a run changes: trained leaves, optimiser, step and random root; never the base."""

import shutil
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp

from ..errors import CheckpointError, RunError, refuse
from ..methods.partition import leaves
from .state import TrainState
from .step import with_leaves


class Checkpoints:
    """The `checkpoints/` folder of a run, kept by orbax: each is there whole or not at all.

    Args:
        folder: Where they are.
        keep: The newest so many are kept.

    >>> import jaxft, optax, tempfile
    >>> state = TrainState.create(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2), optax.sgd(0.1))
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(state)
    ...     int(checkpoints.restore(state).step)
    0
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        # Written before the next step begins: that step consumes the arrays, and on a CPU a writer in the background
        # would read the very memory that it reuses.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(
            self.folder, item_handlers=ocp.StandardCheckpointHandler(), options=options
        )
        self._ocp = ocp

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Write a state.

        Raises:
            RunError: It cannot be written (a full disk, say); the checkpoints before it stay as they are.
        """
        step = int(state.step)
        if step == self.latest:
            return
        try:
            self._manager.save(step, args=self._ocp.args.StandardSave(_tree(state)))
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            for left in self.folder.glob(f"{step}*tmp*"):
                shutil.rmtree(left, ignore_errors=True)
            full = "No space left" in str(error)
            raise RunError(
                f"{self.folder}: the checkpoint of step {step} cannot be written "
                f"({'no space left on the disk' if full else str(error)[:300]}). "
                f"The last good one is of step {self.latest}; make room, then go on with --resume"
            ) from error

    def restore(self, state: TrainState) -> TrainState:
        """Return the newest saved state, in the structure of `state`.

        Raises:
            CheckpointError: There is none, or it is of other shapes (another model or method).
        """
        step = self.latest
        if step is None:
            raise CheckpointError(f"{self.folder}: no checkpoint in it")
        self._check(step, leaves(state.trainable))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _tree(state))
        try:
            saved: Any = self._manager.restore(step, args=self._ocp.args.StandardRestore(shapes))
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{self.folder / str(step)}: damaged ({str(error)[:300]})") from error
        state = TrainState(
            saved["step"],
            with_leaves(state.trainable, saved["trainable"]),
            state.frozen,
            saved["opt_state"],
            jax.random.wrap_key_data(saved["key"]),
            state.tx,
            state.method,
            state.name,
        )
        # Fresh buffers: what is handed to a step is donated, and the reader's memory is not ours to give away.
        return jax.tree.map(lambda x: jnp.array(x, copy=True) if isinstance(x, jax.Array) else x, state)

    def _check(self, step: int, wanted: dict[str, jax.Array]) -> None:
        """Refuse a checkpoint whose trained leaves are not those wanted, by name and shape."""
        saved = self._manager.item_metadata(step)
        shapes = {path: tuple(leaf.shape) for path, leaf in saved["trainable"].items()} if saved else {}
        refuse(
            CheckpointError,
            f"{self.folder / str(step)}: it is not of this model and method",
            [f"{path} is not in it" for path in wanted if path not in shapes]
            + [f"{path} is trained there, and not here" for path in shapes if path not in wanted]
            + [
                f"{path} is {shapes[path]} there, {x.shape} here"
                for path, x in wanted.items()
                if path in shapes and shapes[path] != x.shape
            ],
        )


def _tree(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "trainable": leaves(state.trainable),
        "opt_state": state.opt_state,
        "key": jax.random.key_data(state.key),
    }
