"""What each part of the learned optimizer is worth: sets of weights against each other, on the same seeds.

A row may stand for several sets, one for each seed of a meta-training.  With ``v`` a measure of set ``m`` on task ``k``
from seed ``s``, a row is ahead of another one by

    d_mk = mean_s [ v(row, m, k, s) - v(other, m, k, s) ]

where a row of a single set is the same for all ``m``.  The intervals are Student's: over the tasks, of the means over
``m``; and over the seeds of meta-training, of the means over the tasks (over ``s`` where there is one set only).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal, NamedTuple

from flatopt.pretrained import LearnedRule

from . import _standings
from ._cache import Record, RunCache
from ._cells import compute_cells
from ._evaluation import Evaluation, option
from ._figures import point_scale
from ._report import Figure, Interval, Report, Table, confidence_interval, mean_pm_std
from ._training import Benchmark, run
from .benchmarks import choose_benchmarks
from .contestants import UNKNOWN, Contestant, adam_core, default_name, learned_contestant, untrained
from .curvature import Curvature
from .flatness_table import CURVATURE, for_task
from .reproduction import load_sets

CORE, ADAM_CORE = "core", "adam core"

SMALLEST = 1e-8
"""Values below this count as this in logarithms: a training loss may be exactly zero."""


class Measure(NamedTuple):
    """What is compared."""

    title: str
    value: Callable[[Record, str], float]
    """Of a run, for a split."""
    classification_only: bool = False


MEASURES = {
    "score": Measure("accuracy, points", lambda run, split: 100 * run[f"{split}_score"], classification_only=True),
    "loss": Measure("ln loss", lambda run, split: _log(run[f"{split}_loss"])),
    "train_loss": Measure("ln training loss", lambda run, _: _log(run["train_loss"])),
    "top_eigenvalue": Measure("ln top eigenvalue", lambda run, _: _log(run["top_eigenvalue"])),
    "sam_gap": Measure("ln SAM gap", lambda run, _: _log(run["sam_gap"])),
}
FLATNESS = ("top_eigenvalue", "sam_gap")

Values = Mapping[tuple[str, str], Sequence[Sequence[float]]]
"""Measured values ``[sets, seeds]`` by row and task."""


@dataclass(frozen=True, kw_only=True)
class Ablation(Evaluation):
    """Rows of learned weights, with their untrained cores, paired with one of them."""

    summary = "sets of learned weights and untrained cores, paired"

    seeds: int = option(3, "runs per set and task")
    sets: tuple[str, ...] = option(
        (),
        "rows: NAME_OR_FOLDER, or LABEL=FOLDER,FOLDER,... of several seeds of one meta-training (default: FlatOpt's)",
    )
    against: str = option(CORE, "label of the row that all others are compared with")
    length: Literal["both", "known", "unknown"] = option("both", "whether the optimizers know the number of steps")
    flatness: bool = option(False, "measure the minima too")
    tasks: tuple[str, ...] = option((), "parts of the names of the tasks to run (default: all)")
    split: Literal["test", "meta"] = option("test", "split of the tables; meta has tasks of its own")
    jobs: int = option(1, "processes side by side, of one thread each")
    cached_only: bool = option(False, "train nothing: show what is finished")

    def report(self, cache: RunCache) -> Report:
        """Run every set on every task, and compare the rows."""
        rows = self.rows()
        if self.against not in rows:
            raise ValueError(f"no row is called {self.against!r}: there are {', '.join(rows)}")
        benchmarks = choose_benchmarks(self.tasks, self.split, fast=self.fast)
        keys = [key for key in MEASURES if self.flatness or key not in FLATNESS]
        curvature = CURVATURE if self.flatness else None
        work = [(one, entrant) for entrant in self.entrants(rows) for one in benchmarks]
        compute = partial(ablation_cell, num_seeds=self.seeds, split=self.split, curvature=curvature)
        records = compute_cells(work, compute, RunCache(cache.path, cached_only=self.cached_only), self.jobs)
        tables = []
        for suffix in self.suffixes():
            values = {key: gather(records, rows, suffix, key) for key in keys}
            kinds = {one.name: one.kind for one in benchmarks}
            tables += _tables(values, kinds, list(rows), self.against, "unknown" if suffix else "known")
        first, *others = tables
        return Report(
            title=f"Ablation on the {self.split} split. {first.title}",
            header=first.header,
            rows=first.rows,
            records=records,
            draw=lambda figure: _draw(figure, records, rows, self.suffixes()),
            note=f"Seeds of every run: {self.seeds}. Differences are to the row {self.against!r}, paired by task and "
            "seed; in brackets the 95 % interval. Lower on: the number of tasks with a negative mean difference, which "
            f"is worse for accuracy and better for all else. In logarithms, {SMALLEST:g} is the least. Sets: "
            f"{', '.join(f'{label} {len(sets)}' for label, sets in rows.items())}.",
            more_tables=others,
        )

    def rows(self) -> dict[str, list[LearnedRule]]:
        """Return the sets of each row by its label, which no other row may have, with the untrained cores first."""
        asked: dict[str, list[str]] = {}
        for text in self.sets or (default_name(),):
            label, _, folders = text.rpartition("=")
            label = label or folders
            if label in (*asked, CORE, ADAM_CORE):
                raise ValueError(
                    f"--sets: there is a row called {label!r} already: give it another label, LABEL=FOLDER"
                )
            asked[label] = folders.split(",")
        every = load_sets([name for names in asked.values() for name in names])
        core = untrained(next(iter(every.values())))
        adam = adam_core(core)
        cores = {**({ADAM_CORE: [adam]} if adam else {}), CORE: [core]}
        return cores | {label: [every[name] for name in names] for label, names in asked.items()}

    def suffixes(self) -> list[str]:
        """Return what follows the names of contestants: nothing for a known length."""
        return {"both": ["", UNKNOWN], "known": [""], "unknown": [UNKNOWN]}[self.length]

    def entrants(self, rows: Mapping[str, Sequence[LearnedRule]]) -> list[Contestant]:
        """Return every set with every length; their names are ``label#index`` and the suffix."""
        return [
            learned_contestant(f"{label}#{index}{suffix}", learned, horizon_known=not suffix)
            for suffix in self.suffixes()
            for label, sets in rows.items()
            for index, learned in enumerate(sets)
        ]


def ablation_cell(
    benchmark: Benchmark,
    contestant: Contestant,
    cache: RunCache,
    *,
    num_seeds: int,
    split: str,
    curvature: Curvature | None,
) -> Record:
    """Return the measures of one set on one task, one value per seed."""
    curvature = curvature and for_task(curvature, benchmark)
    setting = contestant.settings()[0]
    runs = [run(benchmark, contestant, setting, seed, cache, curvature) for seed in range(num_seeds)]
    keys = [key for key in MEASURES if curvature is not None or key not in FLATNESS]
    values = {key: [MEASURES[key].value(one, split) for one in runs] for key in keys}
    return {"task": benchmark.name, "kind": benchmark.kind, "optimizer": contestant.name, **values}


def gather(records: Sequence[Record], rows: Mapping[str, Sequence[LearnedRule]], suffix: str, key: str) -> Values:
    """Return the values of a measure by row and task, where all sets of the row are finished."""
    cells, tasks = _standings.by_cell(records), _standings.names(records, "task")
    found = {}
    for label, sets in rows.items():
        for task in tasks:
            own = [cells.get((task, f"{label}#{index}{suffix}")) for index in range(len(sets))]
            if all(own):
                found[label, task] = [record[key] for record in own if record]
    return found


def paired(values: Values, tasks: Sequence[str], row: str, other: str) -> list[list[list[float]]]:
    """Return the differences ``[tasks, sets, seeds]``; a row of one set is compared with each set of the other.

    Two rows of several sets need the same number of them: else ``ValueError``.
    """
    differences = []
    for task in tasks:
        one, two = values[row, task], values[other, task]
        num_sets = max(len(one), len(two))
        if {len(one), len(two)} - {1, num_sets}:
            raise ValueError(f"rows {row!r} and {other!r} have {len(one)} and {len(two)} sets: they cannot be paired")
        one, two = (list(part) * (num_sets // len(part)) for part in (one, two))
        differences.append([[a - b for a, b in zip(*pair, strict=True)] for pair in zip(one, two, strict=True)])
    return differences


def intervals(differences: Sequence[Sequence[Sequence[float]]]) -> tuple[Interval, Interval]:
    """Return the mean difference with its interval over tasks, and over sets, or over seeds where there is one set."""
    over_tasks = [fmean(fmean(seeds) for seeds in sets) for sets in differences]
    if len(differences[0]) > 1:
        others = [fmean(map(fmean, of_set)) for of_set in zip(*differences, strict=True)]
    else:
        others = [fmean(of_seed) for of_seed in zip(*(sets[0] for sets in differences), strict=True)]
    return confidence_interval(over_tasks), confidence_interval(others)


def _tables(
    values: Mapping[str, Values], kinds: Mapping[str, str], labels: Sequence[str], against: str, length: str
) -> list[Table]:
    """Return the table of differences, a row for each measure and label, and that of the scores, for one length."""
    finished = [task for task in kinds if all((label, task) in values["score"] for label in labels)]
    classes = [task for task in finished if kinds[task] == "classification"]
    rows = []
    for key in values:
        tasks = classes if MEASURES[key].classification_only else finished
        for label in labels if tasks else ():
            if label != against:
                differences = paired(values[key], tasks, label, against)
                texts = (one.text(3) for one in intervals(differences))
                lower = sum(fmean(map(fmean, sets)) < 0 for sets in differences)
                rows.append([MEASURES[key].title, label, *texts, f"{lower} of {len(tasks)}"])
    scores = [[task, *(_cell(values["score"].get((label, task))) for label in labels)] for task in kinds]
    if classes:
        means = (fmean(fmean(map(fmean, values["score"][label, task])) for task in classes) for label in labels)
        scores.insert(0, ["mean accuracy", *(f"{mean:.2f}" for mean in means)])
    header = ["measure", "row", "over tasks", "over sets or seeds", "lower on"]
    return [
        Table(f"Differences, length {length}", header, rows),
        Table(f"Scores, length {length}", ["task", *labels], scores),
    ]


def _cell(sets: Sequence[Sequence[float]] | None) -> str:
    return mean_pm_std([value for seeds in sets for value in seeds]) if sets else "–"


def _log(value: float) -> float:
    return math.log(max(value, SMALLEST)) if 0 <= value < math.inf else math.nan


def _draw(
    figure: Figure, records: Sequence[Record], rows: Mapping[str, Sequence[LearnedRule]], suffixes: Sequence[str]
) -> None:
    """Draw the score of each row less that of the first one, task by task and in the mean."""
    first, *labels = rows
    panels = figure.subplots(1, len(suffixes), squeeze=False, sharey=True)[0]
    for axes, suffix in zip(panels, suffixes, strict=True):
        values = gather(records, rows, suffix, "score")
        for height, label in enumerate(labels):
            tasks = [task for name, task in values if name == label and (first, task) in values]
            points = [fmean(map(fmean, values[label, task])) - fmean(map(fmean, values[first, task])) for task in tasks]
            axes.plot(points, [height] * len(points), "o", color=f"C{height}", alpha=0.5)
            if points:
                axes.plot([fmean(points)] * 2, [height - 0.3, height + 0.3], color=f"C{height}", linewidth=3)
        point_scale(axes)
        axes.set_yticks(range(len(labels)), labels)
        title = f"length of the run {'unknown' if suffix else 'known'}"
        axes.set(title=title, xlabel=f"score less that of the {first}, points")
