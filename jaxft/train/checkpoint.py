"""Checkpoints of what a run changes: trained leaves, optimiser, step and random root; never the base."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import CheckpointError, RunError, refuse
from .digests import Record, by_name, form, misfits, record, seal
from .state import TrainState


class Checkpoints:
    """The `checkpoints/` folder of a run: each is there whole or not at all (orbax), and is what was saved (sha256).

    A checkpoint is read back when it is written, and older ones make room only then. One that was damaged since is
    never used: the newest that is whole is. One process at a time may have the folder open (`RunFolder.claim`): what is
    half written there is removed.

    Args:
        folder: Where they are.
        keep: The newest so many are kept.
        say: Gets a line about each checkpoint that is passed over.

    >>> import jaxft, optax, tempfile
    >>> state = TrainState.create(jaxft.testing.tiny_llama(), jaxft.LoRA(r=2), optax.sgd(0.1))
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(state)
    ...     int(checkpoints.restore(state).step)
    0
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, say: Callable[[str], None] = print):
        import orbax.checkpoint as ocp

        self.folder, self.keep, self.say = Path(folder).absolute(), keep, say
        self.folder.mkdir(parents=True, exist_ok=True)
        # Written before the next step begins: that step consumes the arrays, and on a CPU a writer in the background
        # would read the very memory that it reuses.
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._args = ocp.args
        self._verified: int | None = None
        self._sweep()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a folder, good or damaged, in order."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        return max(self.steps, default=None)

    def save(self, state: TrainState) -> None:
        """Write a state, and read it back.

        Raises:
            RunError: It cannot be written (a full disk, say), or is not what was written; those before it stay.
        """
        step, tree = int(state.step), state.changing()
        if step == self._verified:
            return
        found = record(tree)
        saved = self._args.Composite(
            state=self._args.StandardSave(tree), record=self._args.JsonSave({"leaves": found, "sha256": seal(found)})
        )
        try:
            self._orbax.save(self.folder / str(step), args=saved, force=True)
            self._read(step, jax.tree.map(_on_host, tree), self._record(step))
        except (OSError, ValueError, _DamagedError) as error:
            full = "No space left" in str(error)
            good = (
                "There is no good one yet"
                if self._verified is None
                else f"The last good one is of step {self._verified}"
            )
            raise RunError(
                f"{self.folder}: the checkpoint of step {step} cannot be written "
                f"({'no space left on the disk' if full else str(error)[:300]}). "
                f"{good}; {'make room' if full else 'see to the disk'}, then go on with --resume"
            ) from error
        finally:
            self._sweep()
        self._verified = step
        older = [other for other in self.steps if other < step]
        for old in older[: max(0, len(older) + 1 - self.keep)]:
            shutil.rmtree(self.folder / str(old))

    def restore(self, state: TrainState) -> TrainState:
        """Return the newest saved state that is whole, in the structure and with the shardings of `state`.

        Those newer than it are damaged: each is named, and renamed to `damaged-STEP`.

        Raises:
            CheckpointError: There is none, none is whole, or it is of other leaves (another model or method).
        """
        tree = state.changing()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                saved = self._matching(step, like)
                break
            except _DamagedError as error:
                damaged[step] = str(error)
        else:
            told = [f"{step}: {reason}" for step, reason in damaged.items()]
            what = "every checkpoint is damaged, so the run cannot go on: put a copy of one back, or begin another run"
            refuse(CheckpointError, f"{self.folder}: {what}", told)
            raise CheckpointError(f"{self.folder}: no checkpoint in it")
        for bad, reason in damaged.items():
            self.say(f"warning: {self.folder / str(bad)} is damaged ({reason}): passed over, now damaged-{bad}")
            shutil.rmtree(self.folder / f"damaged-{bad}", ignore_errors=True)
            (self.folder / str(bad)).rename(self.folder / f"damaged-{bad}")
        self._verified = step
        # Fresh buffers: what is handed to a step is donated, and the reader's memory is not ours to give away.
        saved = jax.tree.map(lambda x: jnp.array(x, copy=True), saved)
        return state.changed(saved)

    def _matching(self, step: int, like: Any) -> Any:
        """Return what a checkpoint holds, if its leaves are those wanted."""
        found = self._record(step)
        wrong = misfits(found, {name: form(leaf) for name, leaf in by_name(like).items()})
        headline = f"{self.folder / str(step)}: it is not of this model, method and optimizer"
        refuse(CheckpointError, headline, wrong, limit=len(wrong))
        return self._read(step, like, found)

    def _record(self, step: int) -> Record:
        """Return what a checkpoint should hold."""
        saved = self._load(step, record=self._args.JsonRestore())["record"]
        if not isinstance(saved, dict) or saved.get("sha256") != seal(saved.get("leaves", {})):
            raise _DamagedError("its list of leaves was altered")
        return dict(saved["leaves"])

    def _read(self, step: int, like: Any, found: Record) -> Any:
        """Return what a checkpoint holds, if it is what was saved."""
        saved = self._load(step, state=self._args.StandardRestore(like))["state"]
        altered = [name for name, leaf in record(saved).items() if leaf != found.get(name)]
        if altered:
            raise _DamagedError(f"{len(altered)} of {len(found)} leaves are not what was saved, {altered[0]} the first")
        if int(saved["step"]) != step:
            raise _DamagedError(f"it holds step {int(saved['step'])}")
        return saved

    def _load(self, step: int, **items: Any) -> Any:
        try:
            return self._orbax.restore(self.folder / str(step), args=self._args.Composite(**items))
        except Exception as error:  # what becomes of damaged files is of many kinds, bare Exception among them
            raise _DamagedError(" ".join(str(error).split())[:150] or type(error).__name__) from error

    def _sweep(self) -> None:
        """Remove what is left of a write that was cut off."""
        for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)


class _DamagedError(Exception):
    """A checkpoint that does not hold what was saved."""


def _on_host(x: jax.Array) -> Any:
    """Stand for an array that is read into the host's memory: a device may have no room for a second copy."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)
