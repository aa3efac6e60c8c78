"""Throughput of the inner loop of meta-training, recorded and compiled, beside the plain, eager one.

The one module of this folder that imports :mod:`flatopt.metatrain`: it is what it measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

import torch

from ..metatrain.config import MetaTrainConfig, ObjectiveConfig, TaskConfig
from ..metatrain.inner_training import Families
from ..metatrain.unroll import Mode, can_compile
from ._cache import Record, RunCache
from ._evaluation import Evaluation
from ._report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_PROBLEMS = 64
TRUNCATION_LENGTH = 20
NUM_TRUNCATIONS = 8
"""Truncations per round: in meta-training, too, they follow each other."""


@dataclass(frozen=True, kw_only=True)
class MetaSpeed(Evaluation):
    """Throughput of the inner loop of meta-training."""

    summary = "throughput of the inner loop of meta-training"

    def report(self, cache: RunCache) -> Report:
        """Measure inner problem-steps per second: 64-32-10 MLP, batch 64, 64 problems, flagship rule.

        A step is the gradient of a training batch, the rule, and the loss of a batch of the meta split, which is the
        objective; drawing both batches is included.
        """
        num_rounds = 2 if self.fast else 3 * self.seeds
        modes: list[Mode] = ["plain", "recorded"]
        if not self.fast and can_compile(torch.device("cpu")):
            modes.append("compiled")
        measured = {mode: _prepare(mode) for mode in modes}
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        for _ in range(num_rounds):
            for mode, run in measured.items():  # in turn: the machine is as busy for the one as for the other
                start = time.perf_counter()
                run()
                seconds[mode].append(time.perf_counter() - start)
        num_steps = NUM_PROBLEMS * TRUNCATION_LENGTH * NUM_TRUNCATIONS
        records: list[Record] = [
            {"mode": mode, "problem_steps_per_second": [num_steps / value for value in values]}
            for mode, values in seconds.items()
        ]
        plain = median(records[0]["problem_steps_per_second"])
        rows = []
        for record in records:
            speed = median(record["problem_steps_per_second"])
            rows.append([record["mode"], f"{speed:,.0f}", f"{speed / plain:.2f}"])
        return Report(
            title="Throughput of meta-training",
            header=["step", "problem-steps / s", "ratio"],
            rows=rows,
            records=records,
            draw=lambda figure: _draw(figure, records),
            note=f"64-32-10 MLP, batch 64, {NUM_PROBLEMS} problems side by side, rule orthogonalized-momentum; median "
            f"over {num_rounds} rounds in turn, {torch.get_num_threads()} thread(s), torch {torch.__version__}.",
        )


def _prepare(mode: Mode) -> Callable[[], object]:
    """Return a function that runs one truncation of all problems, warmed up."""
    config = MetaTrainConfig(
        recipe="meta-speed",
        rule="orthogonalized-momentum",
        tasks=(TaskConfig(name="mlp", num_tasks=NUM_PROBLEMS),),
        objective=ObjectiveConfig(),
        num_updates=1,
    )
    rule = config.build_rule()
    unroll = replace(Families.from_config(config, rule, torch.device("cpu")).unrolls[0], mode=mode)
    generator = torch.Generator().manual_seed(0)
    weights = rule.init_weights(generator)
    weights_N = {name: weight.repeat(NUM_PROBLEMS, *(1,) * weight.dim()) for name, weight in weights.items()}
    runs = unroll.start(weights_N, NUM_PROBLEMS, 1, generator)

    def run() -> object:
        after = runs
        for _ in range(NUM_TRUNCATIONS):
            after, _ = unroll.run(weights_N, after, 1, generator)
        return after

    run()
    return run


def _draw(figure: Figure, records: list[Record]) -> None:
    """Draw the median speeds as bars."""
    axes = figure.subplots()
    speeds = [median(record["problem_steps_per_second"]) for record in records]
    axes.bar([record["mode"] for record in records], speeds)
    axes.set_ylabel("inner problem-steps per second")
