"""Throughput of the inner loop of meta-training, compiled and eager."""

from __future__ import annotations

from ._report import Report
from ._training import Options


def report(options: Options) -> Report:
    """Measure inner problem-steps per second."""
    raise NotImplementedError("meta-speed")
