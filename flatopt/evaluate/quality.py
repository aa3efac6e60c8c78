"""How well models generalise after training: FlatOpt with nothing tuned against tuned families of baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Literal

from . import _figures, _standings
from ._cache import Record, RunCache
from ._cells import Compute, cell, compute_cells
from ._evaluation import Evaluation, matching, option
from ._report import Report, Table, confidence_interval
from ._training import Benchmark
from .benchmarks import choose_benchmarks
from .contestants import REFERENCE, UNKNOWN, Contestant, baselines, default_name, learned_contestants

CLASSIFICATION, REGRESSION = ("classification",), ("regression", "reconstruction")

SENSITIVITY = "What a third of the learning rate, and three times, do to the score"


@dataclass(frozen=True, kw_only=True)
class Quality(Evaluation):
    """Test scores of FlatOpt and of tuned families.

    A setting of a family is chosen per task on the ``meta`` split; the tables show the ``test`` split.  With
    ``split="meta"`` they show other tasks on the ``meta`` split, to choose weights by.
    """

    summary = "test accuracy and loss against tuned baselines"

    tasks: tuple[str, ...] = option((), "parts of the names of the tasks to run (default: all)")
    optimizers: tuple[str, ...] = option((), "parts of the names of the optimizers to run (default: all)")
    pretrained: str = option(default_name(), "weights of FlatOpt: name, folder or Hub id")
    learned: bool = option(True, "run FlatOpt and its untrained core, or the baselines alone")
    split: Literal["test", "meta"] = option("test", "split of the tables; meta has tasks of its own")
    jobs: int = option(1, "processes side by side, of one thread each")
    cached_only: bool = option(False, "train nothing: show what is finished")

    def report(self, cache: RunCache) -> Report:
        """Fill the table task by task, and compare."""
        compute = partial(cell, num_seeds=self.seeds, split=self.split)
        records = self.computed(compute, cache)
        scores, *more_tables = _tables(records, self.seeds)
        return Report(
            title=f"Quality: scores on the {self.split} split",
            header=scores.header,
            rows=scores.rows,
            records=records,
            note=_note(self.seeds),
            more_tables=more_tables,
            draw=lambda figure: _figures.draw_ranks(figure, records),
            more_figures={
                "profile": lambda figure: _figures.draw_profile(figure, records),
                "curves": lambda figure: _figures.draw_curves(figure, records),
                "differences": lambda figure: _figures.draw_differences(figure, records),
            },
        )

    def computed(self, compute: Compute, cache: RunCache) -> list[Record]:
        """Return the cells task by task; they are computed optimizer by optimizer."""
        benchmarks = self.benchmarks()
        work = [(benchmark, contestant) for contestant in self.contestants() for benchmark in benchmarks]
        records = compute_cells(work, compute, RunCache(cache.path, cached_only=self.cached_only), self.jobs)
        order = [benchmark.name for benchmark in benchmarks]
        return sorted(records, key=lambda record: order.index(record["task"]))

    def benchmarks(self) -> list[Benchmark]:
        """Return the tasks; toy sizes when ``fast``."""
        return choose_benchmarks(self.tasks, self.split, fast=self.fast)

    def contestants(self) -> list[Contestant]:
        """Return the reference, the learned ones and the other families; two learning rates each when ``fast``."""
        reference, *others = baselines()
        every = [reference, *(learned_contestants(self.pretrained) if self.learned else []), *others]
        chosen = matching([one.name for one in every], self.optimizers, "optimizer")
        kept = [one for one in every if one.name in chosen]
        if self.fast:
            return [replace(one, lrs=one.lrs[2:4] or one.lrs, options=one.options[:1], extends=False) for one in kept]
        return kept


def _tables(records: Sequence[Record], num_seeds: int) -> list[Table]:
    """Lay out all tables, the scores first."""
    cells = _standings.by_cell(records)
    tasks, optimizers = _standings.names(records, "task"), _standings.names(records, "optimizer")
    tuned = [name for name in optimizers if any(r["tuned"] for r in records if r["optimizer"] == name)]
    learned = [name for name in optimizers if name not in tuned]
    is_compared = learned and REFERENCE in optimizers
    return [
        _standings.table("Scores", cells, tasks, optimizers, _standings.spread("score", 2)),
        Table("Means and counts", _SUMMARY_HEADER, [_summary(cells, name, optimizers) for name in optimizers]),
        *([_learning_table(cells, learned)] if {"FlatOpt", "untrained core"} <= set(learned) else []),
        *([_difference_table(cells, learned, num_seeds)] if is_compared else []),
        _standings.table("Loss", cells, tasks, optimizers, _standings.spread("loss", 3)),
        _standings.table("Settings that were chosen", cells, tasks, tuned, lambda one: one["setting"]),
        _standings.table(SENSITIVITY, cells, tasks, optimizers, _sensitivity),
        *([_speed_table(cells, learned)] if is_compared else []),
    ]


def _note(num_seeds: int) -> str:
    return (
        f"Mean ± standard deviation over {num_seeds} seeds. Accuracy in %; for regression and the autoencoder -100 MSE "
        "of standardised targets. FlatOpt and the untrained core: nothing tuned. All others: learning rate, schedule "
        "(cosine or constant; Schedule-Free has one of its own) and, of AdamW, weight decay chosen per task on the "
        "meta split, by one run each, by three where that split has fewer than 1,000 examples; the best tuned family "
        "of a task is the one that is best on the split shown. Ranks and wins are among all rows but "
        f"{REFERENCE}, which is part of Adam; its own, among all."
    )


_SUMMARY_HEADER = [
    "optimizer", "accuracy %", "-100 MSE", f"accuracy less {REFERENCE}: over tasks", "over seeds", "mean rank", "wins",
    f"at least {REFERENCE}", "at least the best tuned", "a third of lr", "3 lr", "diverged",
]  # fmt: skip


def _summary(cells: _standings.Cells, name: str, optimizers: Sequence[str]) -> list[str]:
    """Return one optimizer's row of the table of means."""
    ranked = [one for one in optimizers if one != REFERENCE] if name != REFERENCE else optimizers
    own = [record for (_, optimizer), record in cells.items() if optimizer == name]
    means = []
    for kinds in (CLASSIFICATION, REGRESSION):
        scores = [_standings.mean_score(cells, task, name) for task in _standings.shared_tasks(cells, [name], kinds)]
        means.append(f"{fmean(scores):.2f} ({len(scores)})" if scores else "–")
    shared = _standings.shared_tasks(cells, [name, REFERENCE], CLASSIFICATION)
    intervals = [
        measure(cells, shared, name, REFERENCE).text() if shared else "–"
        for measure in (_standings.interval_over_tasks, _standings.interval_over_seeds)
    ]
    lower, higher = zip(*map(_standings.sensitivity, own), strict=True)
    return [
        name,
        *means,
        *intervals,
        f"{_standings.mean_ranks(cells, ranked)[name]:.2f}",
        str(_standings.wins(cells, ranked)[name]),
        "{} of {}".format(*_standings.at_least(cells, name, REFERENCE)),
        "{} of {}".format(*_standings.at_least(cells, name)),
        f"{fmean(lower):+.2f}",
        f"{fmean(higher):+.2f}",
        str(sum(record["num_diverged"] for record in own)),
    ]


def _difference_table(cells: _standings.Cells, learned: Sequence[str], num_seeds: int) -> Table:
    """Return what each learned optimizer is ahead by, task by task."""
    rows = []
    for task in _standings.shared_tasks(cells, [REFERENCE]):
        best = _standings.best_tuned(cells, task) or REFERENCE
        row = [task]
        for name in learned:
            row += [_difference(cells, task, name, other) for other in (REFERENCE, best)]
        rows.append([*row, best])
    header = ["task", *(f"{name} less {other}" for name in learned for other in (REFERENCE, "the best tuned"))]
    return Table(f"Differences of the score, 95 % interval over {num_seeds} seeds", [*header, "best tuned"], rows)


def _learning_table(cells: _standings.Cells, learned: Sequence[str]) -> Table:
    """Return what the learned weights add to the untrained rule, over the classification tasks."""
    rows = []
    over = _standings.interval_over_seeds, _standings.interval_over_tasks
    for horizon, suffix in (("told", ""), ("not told", UNKNOWN)):
        ours, core = "FlatOpt" + suffix, "untrained core" + suffix
        tasks = _standings.shared_tasks(cells, [ours, core], CLASSIFICATION) if {ours, core} <= set(learned) else []
        if tasks:
            texts = [interval(cells, tasks, ours, core, key).text() for key in ("score", "loss") for interval in over]
            rows.append([horizon, *texts])
    header = ["length of the run", "accuracy: over seeds", "over tasks", "test loss: over seeds", "over tasks"]
    return Table("FlatOpt less the same rule untrained, classification", header, rows)


def _speed_table(cells: _standings.Cells, learned: Sequence[str]) -> Table:
    """Return after which part of the run each learned optimizer has the training loss that the reference ends with."""

    def text(record: Record) -> str:
        share = _standings.steps_to_reach(record, cells[record["task"], REFERENCE])
        return f"{100 * share:.0f} %" if math.isfinite(share) else "never"

    title = f"Steps to the final training loss of {REFERENCE}, of its steps"
    return _standings.table(title, cells, _standings.shared_tasks(cells, [REFERENCE]), learned, text)


def _difference(cells: _standings.Cells, task: str, name: str, other: str) -> str:
    if (task, name) not in cells:
        return "–"
    return confidence_interval(_standings.differences(cells, task, name, other)).text()


def _sensitivity(record: Record) -> str:
    return "{:+.1f}, {:+.1f}".format(*_standings.sensitivity(record))
