"""How well models generalise after training: FlatOpt with nothing tuned against tuned baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from matplotlib.figure import Figure
from tqdm import tqdm

from ._report import Record, Report, mean_pm_std
from ._training import Benchmark, Options, run, tuned_lr
from .baselines import BASELINES, Contestant, learned_contestants
from .benchmarks import BENCHMARKS, FAST_BENCHMARKS, META_BENCHMARKS


def report(options: Options) -> Report:
    """Compare test accuracy and loss of all contestants on all benchmarks.

    A baseline's learning rate is chosen per benchmark on the ``meta`` split; the table shows the ``test`` split.  With
    ``split="meta"`` it shows the meta-validation tasks on the ``meta`` split: a table to choose weights by.
    """
    benchmarks, contestants = entrants(options)
    records = []
    pairs = [(benchmark, contestant) for benchmark in benchmarks for contestant in contestants]
    for benchmark, contestant in tqdm(pairs, desc="quality", unit="cell"):
        records.append(compare(benchmark, contestant, options))
    return Report(
        title=f"Accuracy % (loss) on the {options.split} split",
        header=["task", *(contestant.name for contestant in contestants)],
        rows=_rows(
            records, [benchmark.name for benchmark in benchmarks], [contestant.name for contestant in contestants]
        ),
        records=records,
        draw=lambda figure: _draw(figure, records),
        note=f"Mean ± standard deviation over {options.num_seeds} seeds (mean loss in brackets). Baselines: "
        "cosine schedule, learning rate chosen per task on a split that is not the test split. FlatOpt: nothing tuned.",
    )


def entrants(options: Options) -> tuple[Sequence[Benchmark], Sequence[Contestant]]:
    """Return what is compared; two learning rates and toy benchmarks when ``fast``.

    Raises:
        ValueError: if no benchmark or no optimizer has a name that was asked for; the message lists them.
    """
    contestants = [*learned_contestants(options.pretrained), *BASELINES]
    names = list(dict.fromkeys(contestant.name.partition(",")[0] for contestant in contestants))
    if unknown := [name for name in options.optimizers if name not in names]:
        raise ValueError(f"unknown optimizer {unknown[0]!r}: there are {', '.join(names)}")
    contestants = [one for one in contestants if one.name.partition(",")[0] in (options.optimizers or names)]
    if options.fast:
        return FAST_BENCHMARKS, [replace(one, lrs=one.lrs[2:4] or one.lrs) for one in contestants]
    benchmarks = META_BENCHMARKS if options.split == "meta" else BENCHMARKS
    chosen = [one for one in benchmarks if not options.tasks or any(part in one.name for part in options.tasks)]
    if not chosen:
        raise ValueError(f"no benchmark has {options.tasks} in its name: there are {[one.name for one in benchmarks]}")
    return chosen, contestants


def compare(benchmark: Benchmark, contestant: Contestant, options: Options) -> Record:
    """Return the results of one cell of the table, all seeds."""
    lr = tuned_lr(benchmark, contestant, options.num_seeds, options.cache)
    runs = [run(benchmark, contestant, lr, seed, options.cache) for seed in range(options.num_seeds)]
    record: Record = {"task": benchmark.name, "optimizer": contestant.name, "lr": lr}
    keys = {"train_loss": "train_loss", "loss": f"{options.split}_loss", "accuracy": f"{options.split}_accuracy"}
    for name, key in (keys | {"seconds": "seconds"}).items():
        record[name] = [result[key] for result in runs]
    return record


def _rows(records: Sequence[Record], tasks: Sequence[str], optimizers: Sequence[str]) -> list[list[str]]:
    """Lay the records out as tasks x optimizers, with the means over all tasks at the end."""
    cells = {(record["task"], record["optimizer"]): record for record in records}
    rows = [[task, *(_cell(cells[task, optimizer]) for optimizer in optimizers)] for task in tasks]
    means = []
    for optimizer in optimizers:
        accuracy = fmean(fmean(cells[task, optimizer]["accuracy"]) for task in tasks)
        loss = fmean(fmean(cells[task, optimizer]["loss"]) for task in tasks)
        means.append(f"{100 * accuracy:.2f} ({loss:.3f})")
    return [*rows, ["mean", *means]]


def _cell(record: Record) -> str:
    return f"{mean_pm_std(record['accuracy'], scale=100)} ({fmean(record['loss']):.3f})"


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    """Draw, per task, accuracy relative to the mean of all optimizers, seeds as dots and means as bars."""
    axes = figure.subplots()
    tasks = list(dict.fromkeys(record["task"] for record in records))
    optimizers = list(dict.fromkeys(record["optimizer"] for record in records))
    centre = {task: fmean(fmean(r["accuracy"]) for r in records if r["task"] == task) for task in tasks}
    for record in records:
        index = optimizers.index(record["optimizer"])
        where = tasks.index(record["task"]) + (index - (len(optimizers) - 1) / 2) * 0.13
        values = [100 * (value - centre[record["task"]]) for value in record["accuracy"]]
        label = record["optimizer"] if record["task"] == tasks[0] else None
        axes.plot([where] * len(values), values, ".", color=f"C{index}", alpha=0.5, markersize=4)
        axes.plot([where], [fmean(values)], "_", color=f"C{index}", markersize=9, markeredgewidth=2.5, label=label)
    axes.axhline(0, color="0.8", zorder=0)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("accuracy, points above the task's mean")
    axes.legend(fontsize=8, ncols=3)
