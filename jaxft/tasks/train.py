"""A run from config to summary: check everything, train, evaluate at both ends, write what was made."""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import jax

from ..config import Config
from ..interop.folder import save_adapter
from ..methods import Full
from ..methods.method import parts_of
from ..methods.report import parameter_report
from ..report import plot_curves
from ..run import RunFolder
from ..train.checkpoint import Checkpoints
from ..train.evaluate import prefixed
from ..train.loop import fit
from ..train.memory import peak_memory
from ..train.progress import Progress
from ..train.state import TrainState
from ..train.stop import Stop, Stopped
from ..train.trackers import check_trackers, make_trackers
from .fingerprints import check_same, fingerprints
from .registry import task_of
from .start import choose_mesh, choose_remat, schedule_of

Say = Callable[[str], None]
SPEEDS = ("tokens_per_second", "rows_per_second")


class Job:
    """A run that has passed every check, and has written nothing yet.

    Args:
        config: Of the run.
        resume: Go on with the newest checkpoint of the output folder.
        say: Gets lines for a person to read.
        stop: Asked after every step whether to leave it at that.

    Raises:
        JaxftError: Whatever is wrong with config, data, model or method; or with `resume` is not as it was.
    """

    def __init__(self, config: Config, *, resume: bool = False, say: Say = print, stop: Stop | None = None):
        self.config, self.say, self.run, self.resume = config, say, RunFolder(config.output), resume
        self.mesh = choose_mesh(config)
        self.stop = stop or Stop()
        self.task = task_of(config)
        self.task.check_config()
        self.data = self.task.load_data()
        self.task.check_evaluation(self.data)
        check_trackers(config.trackers)
        self.batches = self.task.make_batches(self.data)
        self.steps = len(self.batches)
        self.schedule = schedule_of(config, self.steps)
        self.remat = choose_remat(config)
        self.state = self.task.load_state(self.steps, self.mesh, self.data)
        self.step = self.task.make_step(self.state)
        self.task.check_fit(self.data, self.state.frozen)
        self.eval_batch_size = config.evaluation.batch_size or config.train.batch_size
        for line in self.data.notes():
            say(line)
        if config.data.packing:
            say(str(self.batches))
        self.parameters = parameter_report(self.state)
        say(str(self.parameters).splitlines()[0])
        self.fingerprints = fingerprints(config, self.data, self.state)
        if resume:
            check_same(self.run, self.fingerprints)

    def train(self) -> dict[str, Any]:
        """Train, and return the summary that was written.

        Raises:
            RunError: The output folder is in use, nothing finite comes out of the steps, or a file cannot be written.
            Stopped: That was asked for; the steps taken are saved.
        """
        config, run = self.config, self.run
        run.check_free(config, resume=self.resume)
        with run.claim():
            run.check_free(config, resume=self.resume)  # another process may have begun while this one was loading
            with ExitStack() as opened:
                checkpoints = opened.enter_context(Checkpoints(run.checkpoints, keep=config.train.keep, say=self.say))
                state = self._start(checkpoints)
                trackers = make_trackers(config.trackers, run.path, config.model_dump(mode="json"))
                for tracker in trackers:
                    opened.callback(tracker.finish)
                step = int(state.step)
                if step % (config.train.eval_every or self.steps) == 0 and self._last_evaluated() != step:
                    self._evaluate(state, trackers)
                began = time.perf_counter() - self.spent
                progress = opened.enter_context(Progress(self.steps, start=step))
                state = self._fit(state, checkpoints, trackers, progress, began)
                seconds = time.perf_counter() - began
            return self._finish(state, seconds)

    def _fit(
        self, state: TrainState, checkpoints: Checkpoints, trackers: list[Any], progress: Progress, began: float
    ) -> TrainState:
        train = self.config.train

        def log(n: int, figures: dict[str, float]) -> None:
            more = {"learning_rate": float(self.schedule(n - 1)), "seconds": time.perf_counter() - began}
            more["peak_memory_bytes"] = peak_memory()
            for tracker in trackers:
                tracker.log(n, {"loss": figures["loss"], **more, **figures})
            speeds = {name: figures[name] for name in SPEEDS if name in figures}
            progress.update(n, loss=figures["loss"], **speeds)

        def look(state: TrainState) -> None:
            figures = self._evaluate(state, trackers)
            if figures:
                progress.say(f"step {int(state.step)}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))

        state = fit(
            state,
            self.step,
            self.batches.iterate(int(state.step)),
            steps=self.steps,
            log_every=train.log_every,
            log=log,
            hooks={look: train.eval_every or self.steps, checkpoints.save: train.save_every or self.steps},
            stop=self.stop,
        )
        checkpoints.save(state)
        if not self.stop() and self._last_evaluated() != self.steps:
            look(state)
        if self.stop():
            raise Stopped(f"stopped after step {int(state.step)}, which is saved")
        return state

    def _start(self, checkpoints: Checkpoints) -> TrainState:
        self.spent = max((row.get("seconds", 0.0) for row in self.run.records(self.run.metrics)), default=0.0)
        if self.resume and checkpoints.latest is not None:
            state = checkpoints.restore(self.state)
            self.run.rewind(int(state.step))
            self.say(f"going on after step {int(state.step)}")
            return state
        if self.resume:
            self.say("no checkpoint has been written yet: the run begins at step 0")
            self.run.rewind(-1)
        self.run.begin(self.config, self.fingerprints)
        return self.state

    def _evaluate(self, state: TrainState, trackers: list[Any]) -> dict[str, float]:
        """Log the figures on the held-out rows, and some answers; nothing where the run is asked to stop meanwhile."""
        if not self.config.data.eval:
            return {}
        step, model = int(state.step), state.model
        with suppress(Stopped), self.stop.at_once():
            figures, made = self.task.evaluate(model, self.data, self.eval_batch_size)
        if self.stop():
            return {}
        figures = prefixed(figures)
        for tracker in trackers:
            tracker.log(step, figures)
        self.task.keep(self.run, step, self.data, made)
        return figures

    def _evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.run.records(self.run.metrics) if any(name.startswith("eval_") for name in row)]

    def _last_evaluated(self) -> int:
        return max((row["step"] for row in self._evaluations()), default=-1)

    def _finish(self, state: TrainState, seconds: float) -> dict[str, Any]:
        whole = any(isinstance(part, Full) for part in parts_of(state.method))
        if whole:
            made = self.task.write(state.model, self.run.model, self.data)
        else:
            made = save_adapter(state, self.run.adapter)
        picture = plot_curves(
            self.run.metrics,
            self.run.report / "curves.png",
            title=str(self.run.path),
            unit=self.task.unit,
            shown=self.task.shown,
        )
        self.task.draw(self.run, self.data)
        evaluations = self._evaluations()
        logged = [row for row in self.run.records(self.run.metrics) if "step_seconds" in row]
        summary = {
            "before": _without_step(evaluations[0]) if evaluations else {},
            "after": _without_step(evaluations[-1]) if evaluations else {},
            "steps": self.steps,
            "loss": logged[-1]["loss"],
            **{name: logged[-1][name] for name in SPEEDS if name in logged[-1]},
            "trainable_parameters": self.parameters.trainable,
            "total_parameters": self.parameters.total,
            "trainable_percent": self.parameters.percent,
            "seconds": seconds,
            "peak_memory_bytes": max(peak_memory(), *(row.get("peak_memory_bytes", 0) for row in logged)),
            "model" if whole else "adapter": str(made),
            "report": str(picture),
            "device": jax.devices()[0].device_kind,
        }
        self.run.finish(summary)
        return summary


def sample_pairs(run: RunFolder) -> list[dict[str, Any]]:
    """Return the samples of a run, each with what was answered before and after."""
    rows = run.records(run.samples)
    last = max((row["step"] for row in rows), default=0)
    before = {(row["prompt"], row.get("expected")): row["answer"] for row in rows if row["step"] == 0}
    return [
        {**row, "before": before.get((row["prompt"], row.get("expected")), ""), "after": row["answer"]}
        for row in rows
        if row["step"] == last
    ]


def _without_step(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "step"}
