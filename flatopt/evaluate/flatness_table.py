"""How flat the minima are that the optimizers reach, beside how well they generalise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from . import _standings
from ._cache import Record, RunCache
from ._cells import num_tuning_seeds
from ._evaluation import option
from ._figures import plain_name, point_scale, task_rows
from ._report import Figure, Report, Table, confidence_interval
from ._training import Benchmark, run, tuned
from .contestants import REFERENCE, Contestant
from .curvature import Curvature
from .quality import Quality


class Column(NamedTuple):
    """A measure of flatness in the tables."""

    title: str
    digits: int
    flatter: int
    """-1 where smaller values are flatter, 1 where larger ones are."""


COLUMNS = {
    "top_eigenvalue": Column("Top eigenvalue", 2, -1),
    "hutchinson_trace": Column("Trace", 1, -1),
    "sam_gap": Column("SAM gap", 4, -1),
    "local_entropy": Column("Local entropy", 2, 1),
}

CURVATURE = Curvature(num_examples=400, num_matvecs=15, gamma=10.0, num_probes=2)
TEXT_EXAMPLES = 100
"""A stretch of text is a sequence of examples."""

MIN_DRAWN = 1e-3
"""Smaller eigenvalues are drawn here, negative ones too: what is flat to rounding need not spread the axis."""


@dataclass(frozen=True, kw_only=True)
class Flatness(Quality):
    """The minima that each optimizer reaches, with the settings of the quality table."""

    summary = "flatness of the minima that each optimizer reaches"

    seeds: int = option(3, "runs per cell; --cache of a quality table brings its settings")

    def report(self, cache: RunCache) -> Report:
        """Train with the settings that were chosen, measure the minima, and compare them with the reference's."""
        curvature = replace(CURVATURE, num_examples=50, num_matvecs=5) if self.fast else CURVATURE
        compute = partial(flatness_cell, num_seeds=self.seeds, split=self.split, curvature=curvature)
        records = self.computed(compute, cache)
        cells = _standings.by_cell(records)
        tasks, optimizers = _standings.names(records, "task"), _standings.names(records, "optimizer")
        return Report(
            title="Flatness of the minima",
            header=["optimizer", "score", "ln top eigenvalue", *(f"{one.title}: flatter" for one in COLUMNS.values())],
            rows=[_summary(cells, name) for name in optimizers],
            records=records,
            draw=lambda figure: _draw(figure, records),
            note=f"Score: accuracy in %, or -100 MSE, mean over tasks. Flatter: on how many tasks the mean over "
            f"{self.seeds} seeds is flatter than that of tuned {REFERENCE}. Hessian of the mean loss on "
            f"{curvature.num_examples} training examples ({TEXT_EXAMPLES} of text) at the end of training. SAM gap: "
            "rise of that loss, 0.05 up the gradient. Local entropy: Laplace, gamma = "
            f"{curvature.gamma:g}, less that of a loss of zero; nan where H + gamma I is not positive definite.",
            more_tables=[
                _correlations(records),
                *(
                    _standings.table(one.title, cells, tasks, optimizers, _standings.spread(key, one.digits))
                    for key, one in COLUMNS.items()
                ),
            ],
        )


def for_task(curvature: Curvature, benchmark: Benchmark) -> Curvature:
    """Return what is measured on a task: on fewer examples of text."""
    is_text = benchmark.source == "text"
    return replace(curvature, num_examples=min(TEXT_EXAMPLES, curvature.num_examples)) if is_text else curvature


def flatness_cell(
    benchmark: Benchmark, contestant: Contestant, cache: RunCache, *, num_seeds: int, split: str, curvature: Curvature
) -> Record:
    """Return the measures of one cell, one value per seed."""
    curvature = for_task(curvature, benchmark)
    setting = tuned(benchmark, contestant, num_tuning_seeds(benchmark, num_seeds), cache)
    runs = [run(benchmark, contestant, setting, seed, cache, curvature) for seed in range(num_seeds)]
    return {
        "task": benchmark.name,
        "kind": benchmark.kind,
        "optimizer": contestant.name,
        "setting": str(setting),
        "score": [100 * one[f"{split}_score"] for one in runs],
        "train_loss": [one["train_loss"] for one in runs],
        **{key: [one[key] for one in runs] for key in COLUMNS},
    }


def flatter_than(cells: _standings.Cells, name: str, other: str, key: str) -> tuple[int, int]:
    """Return on how many tasks the mean of a measure is flatter than another optimizer's, and of how many."""
    won = count = 0
    for task in _standings.shared_tasks(cells, [name, other]):
        own, its = fmean(cells[task, name][key]), fmean(cells[task, other][key])
        if math.isfinite(own) and math.isfinite(its):
            count += 1
            won += COLUMNS[key].flatter * (own - its) > 0
    return won, count


def rank_correlations(records: Sequence[Record], key: str) -> list[float]:
    """Return, for each task, Spearman's correlation between a measure and the score over the runs of all optimizers."""
    from scipy.stats import spearmanr

    found = []
    for task in _standings.names(records, "task"):
        own = [record for record in records if record["task"] == task]
        pairs = [pair for record in own for pair in zip(record[key], record["score"], strict=True)]
        finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if len(finite) > 2 and all(len(set(values)) > 1 for values in zip(*finite, strict=True)):
            found.append(float(spearmanr(*zip(*finite, strict=True)).statistic))
    return found


def _correlations(records: Sequence[Record]) -> Table:
    rows = []
    for key, one in COLUMNS.items():
        values = rank_correlations(records, key)
        text = confidence_interval(values).text() if values else "–"
        rows.append([one.title, text, f"{sum(value < 0 for value in values)} of {len(values)}"])
    title = "Rank correlation with the score over all runs of a task: mean over tasks, 95 % interval"
    return Table(title, ["measure", "Spearman's rho", "negative on"], rows)


def _summary(cells: _standings.Cells, name: str) -> list[str]:
    own = [record for (_, optimizer), record in cells.items() if optimizer == name]
    logs = [math.log(value) for record in own for value in record["top_eigenvalue"] if value > 0]
    counts = ["{} of {}".format(*flatter_than(cells, name, REFERENCE, key)) for key in COLUMNS]
    score = fmean(value for record in own for value in record["score"])
    return [name, f"{score:.2f}", f"{fmean(logs):.2f}" if logs else "–", *counts]


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    """Draw the top eigenvalue and the score of every task, seeds as small dots and means as large ones."""
    tasks, optimizers = _standings.names(records, "task"), _standings.names(records, "optimizer")
    reference = {record["task"]: fmean(record["score"]) for record in records if record["optimizer"] == optimizers[0]}
    styles: dict[str, dict[str, Any]] = {
        name: {"color": f"C{index % 10}", "marker": "os^"[index // 10], "linestyle": "none"}
        for index, name in enumerate(optimizers)
    }
    figure.set_size_inches(10, 1.8 + 0.3 * len(tasks))
    curvature, score = figure.subplots(1, 2, sharey=True)
    for record in records:
        style = styles[record["optimizer"]]
        row = tasks.index(record["task"]) + 0.2 * (optimizers.index(record["optimizer"]) - (len(optimizers) - 1) / 2)
        gains = [value - reference.get(record["task"], 0.0) for value in record["score"]]
        eigenvalues = [
            max(value, MIN_DRAWN) if math.isfinite(value) else math.nan for value in record["top_eigenvalue"]
        ]
        for axes, values in ((curvature, eigenvalues), (score, gains)):  # what is not a number is not drawn
            axes.plot(values, [row] * len(values), markersize=3, alpha=0.4, **style)
            axes.plot([fmean(values)], [row], markersize=6, **style)
    for name in optimizers:
        curvature.plot([], [], label=plain_name(name), **styles[name])
    for axes in (curvature, score):
        task_rows(axes, tasks)
    curvature.set_xscale("log")
    curvature.grid(axis="x", alpha=0.25)
    missing = sum(not math.isfinite(value) for record in records for value in record["top_eigenvalue"])
    left_out = f"; without {missing} runs that have none" if missing else ""
    curvature.set_xlabel(f"top Hessian eigenvalue (left: flatter{left_out})")
    point_scale(score)
    score.set_xlabel(f"score less the mean of {optimizers[0]}, points")
    figure.legend(loc="outside upper center", ncols=5, fontsize=9)
