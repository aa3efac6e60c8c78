"""One training process for a run folder: two would write over each other's checkpoints and metrics."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "training.lock"
"""File that a training process holds; what is in it does not matter, nor that it stays."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run folder, made if need be; the system lets go of it however the process ends.

    Where the system or the file system has no such locks, nothing is held.

    Raises:
        ValueError: if another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as file:
        if sys.platform != "win32":
            import fcntl  # which Windows does not have

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{out} is in use: another process trains in it") from None
            except OSError:  # some network file systems
                pass
        yield
