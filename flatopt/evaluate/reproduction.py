"""Do flatness-regularised learned optimizers generalise better?  The experiment of the paper, on other optimizees.

The networks were not seen in meta-training.  Each is trained on the ``train`` split by every set of learned weights,
with nothing tuned, and by baselines whose learning rate is chosen on ``meta``; results are those on ``test``.  For
tables of the ``meta`` split, to choose sets by, other networks are trained.  Sets of the same rule are compared pair by
pair: for optimizee ``k`` and seed ``s``

    d_s = mean_k [ value(regularized, k, s) - value(plain, k, s) ]

and the interval is Student's over the seeds.

Reference: Yang et al., *Learning to Generalize Provably in Learning to Optimize*, 2023,
https://arxiv.org/abs/2302.11085
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from flatopt.pretrained import LearnedRule, list_pretrained, load_pretrained

from . import _standings
from ._cache import Record, RunCache
from ._evaluation import Evaluation, matching, option, progress
from ._figures import draw_interval
from ._report import Figure, Interval, Report, Table, confidence_interval, mean_and_std, mean_pm_std
from ._training import Benchmark, run, tuned
from .contestants import Contestant, baselines, learned_contestant
from .curvature import Curvature
from .published_tasks import optimizees, selection_optimizees

SETS = tuple(
    rule + regularizer for rule in ("l2o-dm", "rnnprop", "l2o-scale") for regularizer in ("", "-hessian", "-entropy")
)
"""The sets of the reproduction; of each rule the plain one comes first."""

NUM_TUNING_SEEDS = 2
"""Seeds that choose a learning rate; the first seeds of the comparison, whose runs are then used again."""

BASELINE_NAMES = ("Adam", "SGD momentum", "SAM")

CURVATURE = Curvature(num_examples=400, num_matvecs=12, gamma=10.0)
"""``gamma`` is above the magnitude of the negative eigenvalues that trained networks have here (about 1)."""

FAST_CURVATURE = replace(CURVATURE, num_examples=100, num_matvecs=4, num_probes=1, num_lanczos=4)
FAST_SEEDS = 2


class Column(NamedTuple):
    """A column of the table of results."""

    name: str
    value: Callable[[Record, str], float]
    """Value of a run, for a split."""
    digits: int = 3
    scale: float = 1.0


COLUMNS: dict[str, Column] = {
    "train_loss": Column("train loss", lambda run, _: run["train_loss"]),
    "accuracy": Column("accuracy %", lambda run, split: run[f"{split}_score"], digits=2, scale=100),
    "loss": Column("loss", lambda run, split: run[f"{split}_loss"]),
    "gap": Column("gap", lambda run, split: run[f"{split}_loss"] - run["train_loss"]),
    "top_eigenvalue": Column("top eigenvalue", lambda run, _: run["top_eigenvalue"], digits=2),
    "trace": Column("trace", lambda run, _: run["hutchinson_trace"], digits=1),
    "local_entropy": Column("local entropy", lambda run, _: run["local_entropy"], digits=2),
    "log_top_eigenvalue": Column("ln top eigenvalue", lambda run, _: _log(run["top_eigenvalue"])),
}
"""What is reported; the logarithm only in means over optimizees, whose eigenvalues differ by orders of magnitude."""

COMPARED = ("accuracy", "loss", "top_eigenvalue", "log_top_eigenvalue")
"""Measures of the paired differences."""


class Pair(NamedTuple):
    """Two contestants with the same rule."""

    plain: str
    regularized: str


@dataclass(frozen=True, kw_only=True)
class Reproduction(Evaluation):
    """Regularized against plain learned optimizers on optimizees that they have not seen."""

    summary = "regularized against plain learned optimizers, and tuned baselines"

    split: Literal["test", "meta"] = option("test", "split of the table; meta has optimizees of its own")
    tasks: tuple[str, ...] = option((), "parts of the names of the optimizees to run (default: all)")
    sets: tuple[str, ...] = option((), "learned weights, of each rule the plain ones first (default: the nine sets)")
    data: Literal["fashion-mnist", "mnist"] = option("fashion-mnist", "images")
    learned_only: bool = option(False, "leave the baselines out")

    def report(self, cache: RunCache) -> Report:
        """Train every optimizee with every contestant, and compare the sets of each rule."""
        num_seeds = min(self.seeds, FAST_SEEDS) if self.fast else self.seeds
        curvature = FAST_CURVATURE if self.fast else CURVATURE
        learned = load_sets(self.sets or SETS)
        benchmarks, contestants = self.entrants(learned)
        cells = [(benchmark, contestant) for benchmark in benchmarks for contestant in contestants]
        records = [compare(*one, num_seeds, self.split, curvature, cache) for one in progress(cells, "reproduction")]
        pairs = pairs_of(learned)
        comparisons = compare_pairs(records, pairs)
        return Report(
            title=f"Unseen optimizees: results on the {self.split} split",
            header=["optimizee", "optimizer", "lr", *(COLUMNS[key].name for key in _SHOWN)],
            rows=[_row(record) for record in records],
            records=[*records, *comparisons],
            draw=lambda figure: _draw_minima(figure, records, by_rule(learned)),
            note=f"Mean ± standard deviation over {num_seeds} seeds, which decide training images, initial "
            "weights, batches and the optimizer's own random numbers. Loss and accuracy: of the "
            f"{self.split} split, train loss: of all training images, gap: their difference. Curvature: Hessian of the "
            f"mean cross-entropy on {curvature.num_examples} training images at the end. Local entropy: Laplace, "
            f"gamma = {curvature.gamma:g}, less that of a loss of zero; nan where H + gamma I is not positive "
            "definite. Learned sets: nothing tuned. Baselines: "
            "cosine schedule, learning rate chosen per optimizee on the meta split.",
            more_tables=[
                Table(
                    "Means over the optimizees",
                    ["optimizer", *(COLUMNS[key].name for key in _SUMMARISED)],
                    [_mean_row(records, contestant.name) for contestant in contestants],
                ),
                *(_paired_table(comparisons, key, num_seeds) for key in COMPARED),
            ],
            more_figures={"paired": lambda figure: _draw_pairs(figure, comparisons)} if pairs else {},
        )

    def entrants(self, learned: dict[str, LearnedRule]) -> tuple[Sequence[Benchmark], Sequence[Contestant]]:
        """Return what is compared; a tenth of the steps and two learning rates when ``fast``.

        On the ``meta`` split the optimizees are others than those of the results, by which neither coefficients nor
        sets may be chosen.
        """
        benchmarks = optimizees(self.data) if self.split == "test" else selection_optimizees(self.data)
        names = matching([one.name for one in benchmarks], self.tasks, "optimizee")
        chosen = [one for one in benchmarks if one.name in names]
        baseline = [] if self.learned_only else [one for one in baselines() if one.name in BASELINE_NAMES]
        families = [replace(one, cosines=(True,), extends=False) for one in baseline]  # with a cosine, on a fixed grid
        if self.fast:
            chosen = [replace(one, num_steps=one.num_steps // 10) for one in chosen]
            families = [replace(one, lrs=one.lrs[2:4]) for one in families]
        sets = [learned_contestant(name, rule, horizon_known=True) for name, rule in learned.items()]
        return chosen, [*sets, *families]


_SHOWN = [key for key in COLUMNS if key != "log_top_eigenvalue"]
_SUMMARISED = ("train_loss", "accuracy", "loss", "gap", "log_top_eigenvalue", "local_entropy")
MEAN = "mean"
"""Name of the mean over all optimizees, in place of the name of one."""


def load_sets(names: Sequence[str]) -> dict[str, LearnedRule]:
    """Return learned weights by the names that were asked for; ``ValueError`` names all that cannot be found."""
    missing = [name for name in names if name not in list_pretrained() and not Path(name).is_dir() and "/" not in name]
    if missing:
        raise ValueError(
            f"no learned weights are called {', '.join(missing)}: there are {', '.join(list_pretrained()) or 'none'}. "
            "Make them with flatopt-train, or choose others with --sets NAME_OR_FOLDER ..."
        )
    return {name: load_pretrained(name) for name in names}


def by_rule(learned: dict[str, LearnedRule]) -> list[list[str]]:
    """Return the names of the sets, those of one rule together; of these the first one is the plain set."""
    found: dict[str, list[str]] = {}
    for name, one in learned.items():
        found.setdefault(one.rule.name, []).append(name)
    return list(found.values())


def pairs_of(learned: dict[str, LearnedRule]) -> list[Pair]:
    """Return each regularized set with the plain one of the same rule."""
    return [Pair(plain, name) for plain, *others in by_rule(learned) for name in others]


def compare(
    benchmark: Benchmark, contestant: Contestant, num_seeds: int, split: str, curvature: Curvature, cache: RunCache
) -> Record:
    """Return the results of one optimizer on one optimizee, all seeds."""
    setting = tuned(benchmark, contestant, min(num_seeds, NUM_TUNING_SEEDS), cache)
    runs = [run(benchmark, contestant, setting, seed, cache, curvature) for seed in range(num_seeds)]
    record: Record = {"optimizee": benchmark.name, "optimizer": contestant.name, "lr": setting.lr}
    record |= {key: [column.value(result, split) for result in runs] for key, column in COLUMNS.items()}
    return record | {"seconds": [result["seconds"] for result in runs]}


def compare_pairs(records: Sequence[Record], pairs: Sequence[Pair]) -> list[Record]:
    """Return the paired differences regularized - plain: of each optimizee, and of the mean over them."""
    cells = {(record["optimizee"], record["optimizer"]): record for record in records}
    names = _standings.names(records, "optimizee")
    comparisons: list[Record] = []
    for pair in pairs:
        for key in COMPARED:
            differences = {
                name: _standings.differences(cells, name, pair.regularized, pair.plain, key) for name in names
            }
            differences[MEAN] = [fmean(of_seed) for of_seed in zip(*differences.values(), strict=True)]
            for name, values in differences.items():
                about: Record = {"optimizee": name, "measure": key, "differences": values}
                comparisons.append(pair._asdict() | about | confidence_interval(values)._asdict())
    return comparisons


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _row(record: Record) -> list[str]:
    cells = [mean_pm_std(record[key], COLUMNS[key].digits, COLUMNS[key].scale) for key in _SHOWN]
    return [record["optimizee"], record["optimizer"], f"{record['lr']:g}", *cells]


def _mean_row(records: Sequence[Record], optimizer: str) -> list[str]:
    """Return means over optimizees, and the spread of that mean over seeds."""
    own = [record for record in records if record["optimizer"] == optimizer]
    cells = []
    for key in _SUMMARISED:
        means = [fmean(of_seed) for of_seed in zip(*(record[key] for record in own), strict=True)]
        cells.append(mean_pm_std(means, COLUMNS[key].digits, COLUMNS[key].scale))
    return [optimizer, *cells]


def _paired_table(comparisons: Sequence[Record], key: str, num_seeds: int) -> Table:
    """Lay out the differences of one measure as pairs x optimizees."""
    own = [record for record in comparisons if record["measure"] == key]
    names = _standings.names(own, "optimizee")
    rows: dict[str, list[str]] = {}
    for record in own:
        rows.setdefault(_label(record), []).append(_interval(record).text(COLUMNS[key].digits, COLUMNS[key].scale))
    title = f"{COLUMNS[key].name}: regularized less plain, paired, 95 % interval over {num_seeds} seeds"
    return Table(title, ["pair", *names], [[label, *cells] for label, cells in rows.items()])


def _interval(record: Record) -> Interval:
    return Interval(*(record[end] for end in Interval._fields))


def _label(record: Record) -> str:
    return f"{record['regularized']} - {record['plain']}"


def _draw_minima(figure: Figure, records: Sequence[Record], rules: Sequence[Sequence[str]]) -> None:
    """Draw accuracy against top eigenvalue, one panel per optimizee: means, with standard deviations as bars.

    Colours are rules, markers are their sets; baselines are grey.
    """
    from matplotlib.lines import Line2D

    names, optimizers = (_standings.names(records, key) for key in ("optimizee", "optimizer"))
    sets = [name for own in rules for name in own]
    baseline = [name for name in optimizers if name not in sets]
    style: dict[str, dict[str, Any]] = {
        name: {"color": f"C{rule % 10}", "marker": "os^vp<>hd"[index % 9]}
        for rule, own in enumerate(rules)
        for index, name in enumerate(own)
    }
    style |= {name: {"color": "0.35", "marker": "DPX*"[index % 4]} for index, name in enumerate(baseline)}

    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    figure.set_size_inches(4.0 * num_columns, 3.3 * num_rows + 0.8)
    every = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in every[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(every, names, strict=False):
        axes.set_title(name, fontsize=9)
        for record in (record for record in records if record["optimizee"] == name):
            (x, x_std), (y, y_std) = mean_and_std(record["log_top_eigenvalue"]), mean_and_std(record["accuracy"])
            axes.errorbar(
                x / math.log(10),
                100 * y,
                xerr=x_std / math.log(10),
                yerr=100 * y_std,
                markersize=6,
                elinewidth=0.7,
                linestyle="none",
                alpha=0.85,
                **style[record["optimizer"]],
            )
        axes.grid(alpha=0.25)
        axes.set_xlabel("log10 of the top Hessian eigenvalue", fontsize=8)
    for axes in every[::3]:
        axes.set_ylabel("accuracy %")
    handles = [Line2D([], [], linestyle="none", label=optimizer, **style[optimizer]) for optimizer in optimizers]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)


def _draw_pairs(figure: Figure, comparisons: Sequence[Record]) -> None:
    """Draw the intervals of the paired differences: the mean over optimizees large, each of them small above it."""
    from matplotlib.lines import Line2D

    labels = list(dict.fromkeys(map(_label, comparisons)))
    names = [name for name in _standings.names(comparisons, "optimizee") if name != MEAN]
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)} | {MEAN: "k"}
    figure.set_size_inches(11, 1.6 + 0.9 * len(labels))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "accuracy"), (right, "log_top_eigenvalue")):
        own = [record for record in comparisons if record["measure"] == key]
        for record in own:
            above = list(colours).index(record["optimizee"]) - len(names)
            height = labels.index(_label(record)) + 0.11 * above
            scaled = Interval(*(COLUMNS[key].scale * end for end in _interval(record)))
            large = {"markersize": 6, "linewidth": 2, "alpha": 1.0}
            style = large if record["optimizee"] == MEAN else {"markersize": 3, "linewidth": 0.8, "alpha": 0.7}
            draw_interval(axes, height, scaled, color=colours[record["optimizee"]], **style)
        # Intervals of single optimizees may be so wide that those of the means could not be seen.
        ends = [_interval(record) if record["optimizee"] == MEAN else (record["mean"],) for record in own]
        seen = [0.0, *(COLUMNS[key].scale * end for some in ends for end in some if math.isfinite(end))]
        margin = 0.1 * (max(seen) - min(seen)) or 1.0
        axes.set_xlim(min(seen) - margin, max(seen) + margin)
        axes.axvline(0, color="0.4", linewidth=1)
        axes.grid(axis="x", alpha=0.25)
    left.set_yticks(range(len(labels)), labels, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("difference of accuracy, points (right: regularized is better)")
    right.set_xlabel("difference of ln top eigenvalue (left: regularized is flatter)")
    handles = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
