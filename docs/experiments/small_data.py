"""What stopping early does on a few hundred rows, to FlatOpt and to Adam at its default learning rate.

Trains a dense network on the four small tables of ``flatopt-eval quality``, five seeds each.  Nothing is tuned.  Early
stopping looks at the validation split every ten steps, and reports the network with the lowest validation loss.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/small_data.py``; it writes ``docs/results/small-data.json`` for
``docs/results/generate.py``.  ``--fast`` trains 20 steps with one seed, and writes nothing.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from flatopt import FlatOpt
from flatopt.evaluate._training import Benchmark, build_model, draw_batches, load_splits, measure, set_mode, train
from flatopt.evaluate.benchmarks import choose_benchmarks

FAST = "--fast" in sys.argv
OUT = Path(__file__).parents[1] / "results" / "small-data.json"
TASKS = ("breast cancer", "5 classes", "friedman", "diabetes")
EVERY = 10
"""Steps between two looks at the validation split."""

Build = Callable[[Iterable[Tensor], int], Optimizer]
# Of each: the optimizer, and whether it stops early.
VARIANTS: dict[str, tuple[Build, bool]] = {
    "Adam, lr 1e-3": (lambda params, steps: Adam(params, lr=1e-3), False),
    "Adam, lr 1e-3, stopped early": (lambda params, steps: Adam(params, lr=1e-3), True),
    "FlatOpt, num_steps": (lambda params, steps: FlatOpt(params, num_steps=steps), False),
    "FlatOpt, num_steps, stopped early": (lambda params, steps: FlatOpt(params, num_steps=steps), True),
    "FlatOpt, stopped early": (lambda params, steps: FlatOpt(params), True),
}


def run(task: Benchmark, build: Build, early: bool, seed: int) -> tuple[float, float]:
    """Return loss and score on the test split, of the network at the end or of the best by validation."""
    num_steps = 20 if FAST else task.num_steps
    splits, model = load_splits(task, seed), build_model(task.build, task.size, seed)
    optimizer = build(model.parameters(), num_steps)
    best, kept = math.inf, copy.deepcopy(model)

    def look(step: int) -> None:
        nonlocal best
        if early and step % EVERY == 0:
            set_mode(model, optimizer, training=False)
            loss, _ = measure(model, splits.meta, task.loss_fn)
            if loss < best:
                best = loss
                kept.load_state_dict(model.state_dict())
            set_mode(model, optimizer, training=True)

    batches = draw_batches(splits.train, task.batch_size, num_steps, torch.Generator().manual_seed(seed))
    train(model, optimizer, batches, loss_fn=task.loss_fn, after_step=look)
    return measure(kept if early else model, splits.test, task.loss_fn)


def cell(task: Benchmark, runs: Sequence[tuple[float, float]]) -> str:
    """Return what the table shows of one variant on one task."""
    losses, scores = zip(*runs, strict=True)
    spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
    accuracy = "" if task.kind == "regression" else f", {100 * fmean(scores):.1f} %"
    return f"{fmean(losses):.3f}{spread}{accuracy}"


num_seeds = 1 if FAST else 5
tasks = choose_benchmarks(TASKS, "test", fast=False)
rows = []
for name, variant in VARIANTS.items():
    rows.append([name])
    for task in tasks:
        rows[-1].append(cell(task, [run(task, *variant, seed) for seed in range(num_seeds)]))
        print(f"{name}, {task.name}: {rows[-1][-1]}", flush=True)
if not FAST:
    learned = FlatOpt([torch.nn.Parameter(torch.zeros(1))]).learned
    headers = [
        f"{task.name.removesuffix(', 800 rows')}, {len(load_splits(task, 0).train.targets)} rows" for task in tasks
    ]
    table = {
        "title": "Small data",
        "note": f"Loss on the test split, mean ± standard deviation over {num_seeds} seeds, and accuracy. Regression: "
        f"mean squared error of standardised targets, so 1 is the error of the mean. "
        f"Weights: {learned.name}, SHA-256 {learned.sha256[:12]}.",
        "command": "OMP_NUM_THREADS=1 python docs/experiments/small_data.py",
        "columns": ["optimizer", *headers],
        "rows": rows,
    }
    OUT.write_text(json.dumps({"tables": [table]}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
