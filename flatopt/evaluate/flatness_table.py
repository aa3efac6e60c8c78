"""How flat the minima are that the optimizers reach, beside how well they generalise."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from flatopt.flatness import flatness_of
from flatopt.tasks import Batch

from ._report import Record, Report, mean_pm_std
from ._training import Benchmark, Options, measure, run_key, train_benchmark, tuned_lr
from .baselines import Contestant
from .quality import entrants

TASKS = ("MLP 8x8, 1k", "deep MLP 8x8, 4k", "CNN 14x14, 4k", "digits CNN")
"""Names of the benchmarks measured: smooth enough in size that a few hundred Hessian products are quick."""

NUM_EXAMPLES = 1000
"""Training examples that define the loss surface."""

MEASURES = ("top_eigenvalue", "hutchinson_trace", "sam_gap", "gradient_norm", "loss", "test_loss", "test_accuracy")


def report(options: Options) -> Report:
    """Measure the minima that each contestant reaches, with the learning rates of the quality comparison."""
    benchmarks, contestants = entrants(options)
    chosen = benchmarks if options.fast else [benchmark for benchmark in benchmarks if benchmark.name in TASKS]
    records = []
    pairs = [(benchmark, contestant) for benchmark in chosen for contestant in contestants]
    for benchmark, contestant in tqdm(pairs, desc="flatness", unit="cell"):
        lr = tuned_lr(benchmark, contestant, options.num_seeds, options.cache)
        runs = [_measure_run(benchmark, contestant, lr, seed, options) for seed in range(options.num_seeds)]
        record: Record = {"task": benchmark.name, "optimizer": contestant.name, "lr": lr}
        records.append(record | {key: [result[key] for result in runs] for key in MEASURES})
    return Report(
        title="Flatness of the minima",
        header=[
            "task",
            "optimizer",
            "top eigenvalue",
            "trace",
            "SAM gap",
            "train loss",
            "test loss",
            "test accuracy %",
        ],
        rows=[_row(record) for record in records],
        records=records,
        draw=lambda figure: _draw(figure, records),
        note=f"Mean ± standard deviation over {options.num_seeds} seeds. Hessian of the mean cross-entropy on "
        f"{NUM_EXAMPLES} training images, at the end of training. SAM gap: rise of that loss, 0.05 up the gradient.",
    )


def _measure_run(benchmark: Benchmark, contestant: Contestant, lr: float, seed: int, options: Options) -> Record:
    """Train once more, since the cache keeps no weights, and measure."""

    def compute() -> Record:
        trained, splits = train_benchmark(benchmark, contestant, lr, seed)
        data = Batch(*(tensor[:NUM_EXAMPLES] for tensor in splits.train))
        record: Record = flatness_of(
            trained.model.eval(),
            F.cross_entropy,
            data,
            num_matvecs=5 if options.fast else 100,
            generator=torch.Generator().manual_seed(seed),
        )
        record["test_loss"], record["test_accuracy"] = measure(trained.model, splits.test)
        return record

    return options.cache.get({"flatness": True} | run_key(benchmark, contestant, lr, seed), compute)


def _row(record: Record) -> list[str]:
    measures = [mean_pm_std(record[key], digits=3) for key in MEASURES if key not in ("gradient_norm", "test_accuracy")]
    return [record["task"], record["optimizer"], *measures, mean_pm_std(record["test_accuracy"], scale=100)]


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    """Draw test loss against the top eigenvalue, one panel per task."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    optimizers = list(dict.fromkeys(record["optimizer"] for record in records))
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for record in (record for record in records if record["task"] == task):
            colour = f"C{optimizers.index(record['optimizer'])}"
            axes.plot(record["top_eigenvalue"], record["test_loss"], ".", color=colour, alpha=0.5)
            centre = fmean(record["top_eigenvalue"]), fmean(record["test_loss"])
            axes.plot(*centre, "o", color=colour, label=record["optimizer"])
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("top Hessian eigenvalue")
    panels[0].set_ylabel("test loss")
    panels[0].legend(fontsize=7)
