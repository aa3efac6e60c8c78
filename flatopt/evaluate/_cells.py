"""The cells of the quality table: one task, one optimizer, tuned, all seeds; computed side by side if asked for."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import repeat
from statistics import fmean

import torch

from ._cache import NotComputed, Record, RunCache
from ._data import SOURCES
from ._evaluation import progress
from ._training import Benchmark, run, tuned
from .contestants import Contestant, neighbour

SMALL_SPLIT, TUNING_SEEDS_OF_SMALL = 1000, 3
"""Settings are chosen by one run each, by three where the ``meta`` split has fewer examples than this."""

Work = tuple[Benchmark, Contestant]

Compute = Callable[[Benchmark, Contestant, RunCache], Record]
"""Makes one cell; it goes to other processes, so it is a function of a module or a partial of one.

It raises ``NotComputed`` where a run is missing from a cache that computes nothing.
"""


def num_tuning_seeds(benchmark: Benchmark, num_seeds: int) -> int:
    """Return by how many of the seeds of the comparison settings are chosen."""
    small = len(SOURCES[benchmark.source](benchmark.size).meta.targets) < SMALL_SPLIT
    return min(num_seeds, TUNING_SEEDS_OF_SMALL if small else 1)


def cell(benchmark: Benchmark, contestant: Contestant, cache: RunCache, *, num_seeds: int, split: str) -> Record:
    """Return the results of one cell: scores in points (accuracy in %, or -100 MSE), one value per seed."""
    num_tuning = num_tuning_seeds(benchmark, num_seeds)
    setting = tuned(benchmark, contestant, num_tuning, cache)
    runs = [run(benchmark, contestant, setting, seed, cache) for seed in range(num_seeds)]
    around = {
        name: [
            100 * run(benchmark, contestant, neighbour(setting, up=up), seed, cache)[f"{split}_score"]
            for seed in range(num_tuning)
        ]
        for name, up in (("score_at_third", False), ("score_at_triple", True))
    }
    return {
        "task": benchmark.name,
        "kind": benchmark.kind,
        "num_steps": benchmark.num_steps,
        "optimizer": contestant.name,
        "tuned": len(contestant.settings()) > 1,
        "lr": setting.lr,
        "setting": str(setting),
        "score": [100 * one[f"{split}_score"] for one in runs],
        "loss": [one[f"{split}_loss"] for one in runs],
        "train_loss": [one["train_loss"] for one in runs],
        "seconds": [one["seconds"] for one in runs],
        "num_diverged": sum(map(diverged, runs)),
        "curve": [fmean(values) for values in zip(*(one["curve"] for one in runs), strict=False)],
        "test_curve": [
            (points[0][0], 100 * fmean(point[1] for point in points))
            for points in zip(*(one["test_curve"] for one in runs), strict=False)
        ],
        **around,
    }


def diverged(one: Record) -> bool:
    """Return whether a run ended with a training loss that is not finite or above the initial one."""
    return not one["train_loss"] <= one["initial_loss"]


def compute_cells(work: Sequence[Work], compute: Compute, cache: RunCache, jobs: int) -> list[Record]:
    """Return the cells in the order of ``work``, on ``jobs`` processes with a thread each.

    A cache that computes nothing gives the cells whose runs are all there.

    Raises:
        ValueError: that is none.
        ChildProcessError: one of the processes died.
    """
    if cache.cached_only:
        found: list[Record] = []
        for one in work:
            with suppress(NotComputed):
                found.append(compute(*one, cache))
        if not found:
            raise ValueError(f"nothing that was asked for is finished in {cache.path}")
        return found
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [compute(*one, cache) for one in progress(work, lambda one: f"{one[0].name}, {one[1].name}")]
        finally:
            torch.set_num_threads(threads)
    return _side_by_side(work, compute, cache, jobs)


def _side_by_side(work: Sequence[Work], compute: Compute, cache: RunCache, jobs: int) -> list[Record]:
    benchmarks, contestants = zip(*work, strict=True)
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _prepare_worker) as pool:
        try:
            records = pool.map(compute, benchmarks, contestants, repeat(cache))
            return list(progress(records, "cells", total=len(work)))
        except BaseException as error:  # Ctrl-C too
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.terminate()  # else the pool waits for what has begun
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    f"one of {jobs} processes died, as happens where memory runs out: the same command, perhaps with "
                    f"fewer --jobs, goes on from the finished runs in {cache.path}"
                ) from None
            raise


def _prepare_worker() -> None:
    """Leave Ctrl-C to the parent, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
