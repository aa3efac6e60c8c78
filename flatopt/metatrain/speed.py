"""Throughput of inner training, recorded and compiled, beside the plain, eager step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import get_args

import torch

from .config import MetaTrainConfig, TaskConfig
from .inner_training import Families
from .runs import repeat_weights
from .unroll import Mode, can_compile

NUM_PROBLEMS = 64
TRUNCATION_LENGTH = 20
NUM_TRUNCATIONS = 8
"""Truncations per round: in meta-training, too, they follow each other."""

WHAT = f"64-32-10 MLP, batch 64, {NUM_PROBLEMS} problems side by side, rule orthogonalized-momentum"
"""What is measured, for a note below the numbers."""


def modes() -> list[Mode]:
    """Return the ways to take a step that this machine has."""
    return [mode for mode in get_args(Mode) if mode != "compiled" or can_compile(torch.device("cpu"))]


def measure(modes: Sequence[Mode], num_rounds: int) -> dict[Mode, list[float]]:
    """Return inner problem-steps per second on the CPU, of each round.

    A step is the gradient of a training batch, the rule, and the loss of a batch of the meta split, which is the
    objective; drawing both batches is included.  All modes are warmed up, and take their turn in each round.
    """
    prepared = {mode: _prepare(mode) for mode in modes}
    speeds: dict[Mode, list[float]] = {mode: [] for mode in modes}
    for _ in range(num_rounds):
        for mode, run in prepared.items():  # in turn: the machine is as busy for the one as for the other
            start = time.perf_counter()
            run()
            speeds[mode].append(NUM_PROBLEMS * TRUNCATION_LENGTH * NUM_TRUNCATIONS / (time.perf_counter() - start))
    return speeds


def ratios(speeds: dict[Mode, list[float]]) -> list[tuple[str, str, str]]:
    """Return a row per mode: its name, its median speed, and that over the median of the first.

    Example:
        >>> ratios({"plain": [900.0, 1000.0, 1100.0], "recorded": [2500.0]})
        [('plain', '1,000', '1.00'), ('recorded', '2,500', '2.50')]
    """
    medians = {mode: median(values) for mode, values in speeds.items()}
    first = next(iter(medians.values()))
    return [(mode, f"{speed:,.0f}", f"{speed / first:.2f}") for mode, speed in medians.items()]


def _prepare(mode: Mode) -> Callable[[], object]:
    """Return a function that runs some truncations of all problems, warmed up."""
    config = MetaTrainConfig(
        recipe="meta-speed",
        rule="orthogonalized-momentum",
        tasks=(TaskConfig(name="mlp", num_tasks=NUM_PROBLEMS),),
        num_updates=1,
    )
    unroll = replace(Families.from_config(config, torch.device("cpu")).unrolls[0], mode=mode)
    generator = torch.Generator().manual_seed(0)
    weights_N = repeat_weights(unroll.rule.init_weights(generator), NUM_PROBLEMS)
    runs = unroll.start(weights_N, NUM_PROBLEMS, 1, generator)

    def run() -> object:
        after = runs
        for _ in range(NUM_TRUNCATIONS):
            after, _ = unroll.run(weights_N, after, 1, generator)
        return after

    run()
    return run
