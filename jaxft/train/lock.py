"""One writer of a folder: a lock that the system lets go of when its process ends, however it ends."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def locked(file: Path) -> Iterator[str | None]:
    """Hold a lock on a file while the context lasts.

    The file stays when the lock goes; of itself it means nothing.

    Args:
        file: Made if it is not there, with its folder.

    Yields:
        None where the lock was free, and is held now; else who holds it.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "lock")
    >>> with locked(file) as first, locked(file) as second:
    ...     first, second == f"process {os.getpid()} on {socket.gethostname()}"
    (None, True)
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", encoding="utf-8") as opened:
        other = _take(opened)
        if other is None:
            opened.truncate(0)
            opened.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            opened.flush()
        yield other


def holder(file: Path) -> str | None:
    """Return who holds a lock, None where nobody does; nothing is written."""
    if not file.is_file():
        return None
    with file.open("r+", encoding="utf-8") as opened:
        return _take(opened)


def _take(opened: TextIO) -> str | None:
    """Lock an open file until it is closed; return who has it locked already."""
    import fcntl  # not on every system, where the rest of the library works all the same

    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        opened.seek(0)
        return opened.read().strip() or "another process"
