"""How far a run is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from datetime import timedelta
from typing import Any, Self, TextIO


class Progress:
    """Steps, loss, tokens a second and the time that is left, on stderr.

    Args:
        steps: Of the whole run.
        start: Steps taken before.
        out: Where to.

    >>> import io
    >>> with Progress(10, out=(out := io.StringIO())) as progress:
    ...     progress.update(5, loss=1.25, tokens_per_second=1234.5)
    >>> out.getvalue().split(" | ")[:3]
    ['step 5/10', 'loss 1.2500', '1,234 tokens/s']
    """

    def __init__(self, steps: int, *, start: int = 0, out: TextIO | None = None):
        self.steps, self.start, self.out = steps, start, out or sys.stderr
        self.mark: tuple[int, float] | None = None  # the first word: the steps before it were compiled too
        self.bar: Any = None

    def __enter__(self) -> Self:
        self.began = time.perf_counter()
        if self.out.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, TimeElapsedColumn(), console=Console(file=self.out))
            self.bar.start()
            self.task = self.bar.add_task("compiling", total=self.steps, completed=self.start)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(
        self, step: int, *, loss: float, tokens_per_second: float | None = None, rows_per_second: float = 0.0
    ) -> None:
        """Show where the run is."""
        now = time.perf_counter()
        first, since = self.mark or (self.start, self.began)
        left = (now - since) / max(step - first, 1) * (self.steps - step)
        if self.mark is None:
            self.mark = (step, now)
        none = tokens_per_second is None
        speed = f"{rows_per_second:,.0f} rows/s" if none else f"{tokens_per_second:,.0f} tokens/s"
        what = f"loss {loss:.4f} | {speed} | ETA {timedelta(seconds=round(left))}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=what)
        else:
            print(f"step {step}/{self.steps} | {what}", file=self.out, flush=True)

    def say(self, text: str) -> None:
        """Show a line of text, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.out, flush=True)
