"""Being asked to stop: SIGTERM ends a run after the step that it is at, with that step saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self


class Stopped(BaseException):  # as KeyboardInterrupt: no `except Exception` on the way may take it for a fault
    """The run was asked to stop, and has."""


class Stop:
    """Whether the run was asked to stop; as a context it listens for SIGTERM.

    >>> with Stop() as stop:
    ...     before = stop()
    ...     signal.raise_signal(signal.SIGTERM)
    ...     before, stop()
    (False, True)
    """

    def __init__(self) -> None:
        self.asked = self._leave = False

    def __call__(self) -> bool:
        """Tell whether the run was asked to stop."""
        return self.asked

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, nothing is lost by leaving: being asked raises `Stopped`."""
        self._leave = True
        try:
            self._check()
            yield
        finally:
            self._leave = False

    def _hear(self, *_: Any) -> None:
        self.asked = True
        self._check()

    def _check(self) -> None:
        if self.asked and self._leave:
            self._leave = False  # a second signal finds nothing more to interrupt
            raise Stopped
