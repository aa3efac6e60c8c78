"""Stopping a run by SIGINT or SIGTERM: at once where nothing is lost by it, else as soon as the caller looks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class TrainingInterrupted(Exception):
    """A signal ended the run; everything up to ``update`` is in its last checkpoint."""

    def __init__(self, signal_number: int, update: int):
        super().__init__(f"interrupted by {signal.Signals(signal_number).name} after update {update}")
        self.signal_number = signal_number
        self.update = update


class _Stopped(BaseException):
    """Raised by the first signal inside of :meth:`StopOnSignal.at_once`; no ``except Exception`` catches it."""


class StopOnSignal(AbstractContextManager["StopOnSignal"]):
    """Remembers the first SIGINT or SIGTERM, and leaves the second to the system.

    Handlers exist in the main thread only; elsewhere nothing is caught, nor where a program that embeds Python has a
    handler of its own, which could not be put back.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not None:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def at_once(self, work: Callable[[], T], update: int) -> T:
        """Return what ``work`` does; a signal breaks it off and raises ``TrainingInterrupted`` after ``update``."""
        try:
            try:
                self._at_once = True
                if self.signal_number is not None:
                    raise _Stopped
                return work()
            finally:
                self._at_once = False
        except (_Stopped, RuntimeError):  # the latter where another process stopped first
            if self.signal_number is None:
                raise
            raise TrainingInterrupted(self.signal_number, update) from None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        signal.signal(number, signal.SIG_DFL)
        # os.write, to leave the line of a bar: print() is not safe in a handler that may have interrupted a print().
        os.write(2, b"\n")
        if self._at_once:
            raise _Stopped
