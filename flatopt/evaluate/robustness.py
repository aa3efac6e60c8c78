"""Does training diverge?  FlatOpt and Adam over widths, depths, batch sizes, architectures and normalisation.

The full grid is far too large for a laptop, so a small part of it is run: every *pair* of values (each width with each
depth, each architecture with each batch size, ...) is met at least once, in cells as cheap as possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

from torch import nn

from . import _standings, models
from ._cache import Record, RunCache
from ._code import code_hash, problem_identity
from ._data import data_hash
from ._evaluation import Evaluation, option, progress
from ._figures import plain_name
from ._report import Figure, Report, Table
from ._training import Benchmark, run_key, train_benchmark
from .contestants import Contestant, Setting, baselines, default_name, learned_contestants
from .stress import STRESSES, Stress, stress_losses

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "MLP": models.mlp,
    "CNN": models.cnn,
    "LSTM": models.lstm,
    "transformer": models.transformer,
}
WIDTHS = (8, 32, 128, 512, 1024)
DEPTHS = (1, 2, 4, 8, 12)
BATCH_SIZES = (8, 64, 1024)

ADAM_LRS = (1e-4, 1e-3, 1e-2)
"""Adam counts as diverging only where every one of these does: that is what "tuned" means for a yes or no."""

NUM_STEPS = 100
MIN_STEPS = 20
SECONDS_PER_RUN = 2.0
"""A run whose estimated time is longer gets fewer steps, but at least ``MIN_STEPS``."""

MAX_COST = 2.0
"""Cells with more estimated seconds per step are left out, and counted in the note of the table."""

TOLERANCE = 0.02
"""A final training loss up to 2 % above the initial one is a run that stood still, not one that diverged."""


class Cell(NamedTuple):
    """One point of the grid."""

    architecture: str
    width: int
    depth: int
    batch_size: int
    normalise: bool

    @property
    def name(self) -> str:
        """Name in the table."""
        normal = "normalised" if self.normalise else "plain"
        return f"{normal} {self.architecture}, width {self.width}, depth {self.depth}, batch {self.batch_size}"


@dataclass(frozen=True, kw_only=True)
class Robustness(Evaluation):
    """Where training diverges."""

    summary = "divergence over widths, depths, batch sizes and architectures"

    seeds: int = option(1, "runs per cell")
    pretrained: str = option(default_name(), "weights of FlatOpt: name, folder or Hub id")

    def report(self, cache: RunCache) -> Report:
        """Count on how many cells each optimizer diverges."""
        adam = replace(baselines()[0], lrs=ADAM_LRS)
        contestants = [*learned_contestants(self.pretrained)[:2], adam]
        cells = FAST_CELLS if self.fast else covering_cells(grid())
        stresses = [replace(one, num_steps=10) for one in STRESSES] if self.fast else STRESSES
        runs = [(one, contestant) for one in (*cells, *stresses) for contestant in contestants]
        records = [self._record(*one, cache) for one in progress(runs, "robustness")]
        of_grid, hard = records[: len(cells) * len(contestants)], records[len(cells) * len(contestants) :]
        names = [contestant.name for contestant in contestants]
        found = only_learned(records, adam.name)
        return Report(
            title=f"Runs that diverge, of {len(cells)} configurations of a grid and {len(stresses)} hard ones",
            header=["configurations", "number", *names],
            rows=_rows(of_grid, names),
            records=records,
            draw=lambda figure: _draw(figure, of_grid, names),
            note="Diverged: the training loss at the end is not finite or above the initial one by more than "
            f"{100 * TOLERANCE:.0f} %, for any of {self.seeds} seeds. Adam with cosine: for all of the "
            f"learning rates {', '.join(map(str, ADAM_LRS))}. FlatOpt: nothing tuned. "
            f"The configurations meet every pair of values of the {len(grid())} whose steps are estimated to take at "
            f"most {MAX_COST:.0f} s; {MIN_STEPS} to {NUM_STEPS} steps each.\n\n"
            f"FlatOpt diverged where tuned Adam did not: {'; '.join(found) or 'none'}.",
            more_tables=[_stress_table(hard, names)],
        )

    def _record(self, one: Cell | Stress, contestant: Contestant, cache: RunCache) -> Record:
        """Run one configuration with one optimizer: all of its learning rates, all seeds."""
        about: Record = {"stress": one.name} if isinstance(one, Stress) else one._asdict()
        outcome = partial(_stress_outcome, one) if isinstance(one, Stress) else partial(_outcome, one, self.fast)
        settings = contestant.settings()
        outcomes = [[outcome(contestant, each, seed, cache) for each in settings] for seed in range(self.seeds)]
        return about | {
            "configuration": one.name,
            "optimizer": contestant.name,
            "lrs": contestant.lrs,
            "outcomes": outcomes,
            "diverged": any(all(map(_diverged, tried)) for tried in outcomes),
        }


def only_learned(records: Sequence[Record], adam: str) -> list[str]:
    """Return the configurations on which a learned optimizer diverged and Adam did not, with the optimizer's name."""
    fine = {record["configuration"] for record in records if record["optimizer"] == adam and not record["diverged"]}
    return [
        f"{record['optimizer']}: {record['configuration']}"
        for record in records
        if record["diverged"] and record["configuration"] in fine
    ]


def _stress_table(records: Sequence[Record], names: Sequence[str]) -> Table:
    """Return the loss at the end over that at the start: the worst seed, the best learning rate."""
    rows: dict[str, list[str]] = {}
    for record in records:
        text = "diverged" if record["diverged"] else f"{_ratio(record):.3g}"
        rows.setdefault(record["stress"], [record["stress"]]).append(text)
    return Table("Hard configurations: final loss over initial loss", ["configuration", *names], list(rows.values()))


def _ratio(record: Record) -> float:
    """Return the final loss over the initial one, infinite where either is not finite."""
    return max(min(map(_growth, tried)) for tried in record["outcomes"])


def _growth(outcome: Record) -> float:
    ratio = float(outcome["final"] / outcome["initial"])
    return math.inf if math.isnan(ratio) else ratio


def _stress_outcome(stress: Stress, contestant: Contestant, setting: Setting, seed: int, cache: RunCache) -> Record:
    """Return the training loss of the first step, and its mean over the last ones, of one hard run."""
    key: Record = {
        "stress": problem_identity(stress),
        "data": data_hash("digits", 8),
        "optimizer": contestant.identity(),
        "setting": setting._asdict(),
        "seed": seed,
        "code": code_hash(stress_losses),
    }
    return cache.get(key, lambda: _ends(stress_losses(stress, contestant, setting, seed), stress))


def _ends(losses: Sequence[float], run: Benchmark | Stress) -> Record:
    # Enough of the last batches that noise cannot look like divergence.
    last = losses[-(20 if run.batch_size < 64 else 5) :]
    finite = len(losses) == run.num_steps and all(map(math.isfinite, losses))
    return {"initial": losses[0], "final": sum(last) / len(last) if finite else math.inf}


def grid() -> list[Cell]:
    """Return the cells of the whole grid that are cheap enough to run at all."""
    every = (Cell(*values) for values in product(ARCHITECTURES, WIDTHS, DEPTHS, BATCH_SIZES, (False, True)))
    return [cell for cell in every if seconds_per_step(cell) <= MAX_COST]


def seconds_per_step(cell: Cell) -> float:
    """Estimate the time of one training step on one core: matrix products at 20 GFLOP/s, 100 ns per parameter."""
    width, depth, batch_size = cell.width, cell.depth, cell.batch_size
    # Weights of one layer as a multiple of width^2, and how often an image of 8 x 8 pixels uses them.
    # The second convolution sees 16 pixels, those after it 4; the first has a single input channel.
    weights, uses = {"MLP": (1, 1), "CNN": (9, 4 + 12 / depth), "LSTM": (8, 8), "transformer": (8, 8)}[
        cell.architecture
    ]
    num_params = weights * width**2 * (depth - 1 if cell.architecture == "CNN" else depth)
    first = 9 * 64 * width if cell.architecture == "CNN" else 0
    return 6 * batch_size * (num_params * uses + first) / 20e9 + num_params * 1e-7 + 1e-3


def covering_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Choose cells greedily until every pair of values that occurs in ``cells`` has occurred, cheapest first."""
    missing = set().union(*map(_pairs, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: (len(_pairs(cell) & missing), -seconds_per_step(cell)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(cell: Cell) -> set[tuple[tuple[str, object], ...]]:
    return set(combinations(cell._asdict().items(), 2))


def _outcome(cell: Cell, fast: bool, contestant: Contestant, setting: Setting, seed: int, cache: RunCache) -> Record:
    """Return the training loss of the first step, and its mean over the last ones, of one run."""
    steps = 10 if fast else max(MIN_STEPS, min(NUM_STEPS, int(SECONDS_PER_RUN / seconds_per_step(cell))))
    benchmark = Benchmark(
        name=cell.name,
        source="digits",
        size=8,
        build=partial(ARCHITECTURES[cell.architecture], width=cell.width, depth=cell.depth, normalise=cell.normalise),
        batch_size=cell.batch_size,
        num_steps=steps,
    )
    run = benchmark, contestant, setting, seed
    key = {"robustness": True} | run_key(*run)
    return cache.get(key, lambda: _ends(train_benchmark(*run).trained.losses, benchmark))


def _diverged(outcome: Record) -> bool:
    return not outcome["final"] <= (1 + TOLERANCE) * outcome["initial"]


def _rows(records: Sequence[Record], names: Sequence[str]) -> list[list[str]]:
    """Return the counts for each value of each axis of the grid, and for all cells."""

    def row(label: str, own: Sequence[Record]) -> list[str]:
        counts = (sum(record["diverged"] for record in own if record["optimizer"] == name) for name in names)
        return [label, str(len(own) // len(names)), *map(str, counts)]

    rows = [
        row(_value_name(axis, value), [record for record in records if record[axis] == value])
        for axis in Cell._fields
        for value in _standings.names(records, axis)
    ]
    return [*rows, row("all", records)]


def _value_name(axis: str, value: Any) -> str:
    if axis == "normalise":
        return "normalised" if value else "plain"
    return value if axis == "architecture" else f"{axis.replace('_', ' ')} {value}"


def _draw(figure: Figure, records: Sequence[Record], names: Sequence[str]) -> None:
    """Draw the ratio of final to initial loss of each cell; the best learning rate for Adam, the worst seed for all."""
    order = sorted(records, key=lambda record: (record["architecture"], record["depth"], record["width"]))
    labels = _standings.names(order, "configuration")
    figure.set_size_inches(9, 1.5 + 0.24 * len(labels))
    axes = figure.subplots()
    low, high = 1e-3, 10.0
    for index, name in enumerate(names):
        ratios = [_ratio(record) for record in order if record["optimizer"] == name]
        axes.plot(
            [max(low, min(ratio, high)) for ratio in ratios],
            [height + 0.2 * (index - (len(names) - 1) / 2) for height in range(len(ratios))],
            "o",
            color=f"C{index}",
            label=plain_name(name),
            alpha=0.8,
            clip_on=False,
        )
    axes.axvspan(1, high, color="C3", alpha=0.08, zorder=0)
    axes.set(xscale="log", xlim=(low, high), ylim=(-0.7, len(labels) - 0.3))
    axes.set_xticks([0.001, 0.01, 0.1, 1, 10], ["0.001 or less", "0.01", "0.1", "1", "10 or more"])
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.grid(alpha=0.25)
    axes.set_xlabel("final training loss / initial one: in the red band the run diverged")
    figure.legend(fontsize=9, loc="outside upper center", ncols=len(names))


FAST_CELLS = (
    Cell("MLP", 8, 1, 8, False),
    Cell("CNN", 8, 2, 64, True),
    Cell("LSTM", 8, 1, 64, False),
    Cell("transformer", 16, 1, 8, True),
)
