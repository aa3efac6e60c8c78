"""Table of the throughput of meta-training, as :mod:`flatopt.metatrain.speed` measures it.

The one module of this folder that imports :mod:`flatopt.metatrain`: it is what it measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from ..metatrain import speed
from ._cache import Record, RunCache
from ._evaluation import Evaluation
from ._report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class MetaSpeed(Evaluation):
    """Throughput of the inner loop of meta-training."""

    summary = "throughput of the inner loop of meta-training"

    def report(self, cache: RunCache) -> Report:
        """Measure inner problem-steps per second; nothing of it is kept in the cache."""
        num_rounds = 2 if self.fast else 3 * self.seeds
        speeds = speed.measure([mode for mode in speed.modes() if not self.fast or mode != "compiled"], num_rounds)
        records: list[Record] = [{"mode": mode, "problem_steps_per_second": values} for mode, values in speeds.items()]
        return Report(
            title="Throughput of meta-training",
            header=["step", "problem-steps / s", "ratio"],
            rows=speed.ratios(speeds),
            records=records,
            draw=lambda figure: _draw(figure, records),
            note=f"{speed.WHAT}; median over {num_rounds} rounds in turn, {torch.get_num_threads()} thread(s), "
            f"torch {torch.__version__}.",
        )


def _draw(figure: Figure, records: list[Record]) -> None:
    """Draw the median speeds as bars."""
    axes = figure.subplots()
    speeds = [median(record["problem_steps_per_second"]) for record in records]
    axes.bar([record["mode"] for record in records], speeds)
    axes.set_ylabel("inner problem-steps per second")
