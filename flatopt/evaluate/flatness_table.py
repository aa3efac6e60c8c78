"""How flat the minima are that the optimizers reach, beside how well they generalise."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure
from tqdm import tqdm

from ._report import Record, Report, mean_pm_std
from ._training import Options, run, tuned_lr
from .curvature import Curvature
from .quality import entrants

TASKS = ("MLP 8x8, 1k (seen)", "deep MLP 8x8, 4k", "CNN 14x14, 4k", "digits CNN")
"""Names of the benchmarks measured: smooth enough in size that a few hundred Hessian products are quick."""

MEASURES = ("top_eigenvalue", "hutchinson_trace", "sam_gap", "gradient_norm", "loss", "test_loss", "test_accuracy")


def report(options: Options) -> Report:
    """Measure the minima that each contestant reaches, with the learning rates of the quality comparison."""
    benchmarks, contestants = entrants(options)
    chosen = benchmarks if options.fast else [benchmark for benchmark in benchmarks if benchmark.name in TASKS]
    if not chosen:
        raise ValueError(f"flatness is measured on {', '.join(TASKS)} only, not on {', '.join(options.tasks)}")
    curvature = Curvature(num_matvecs=5 if options.fast else 100)
    records = []
    pairs = [(benchmark, contestant) for benchmark in chosen for contestant in contestants]
    for benchmark, contestant in tqdm(pairs, desc="flatness", unit="cell"):
        lr = tuned_lr(benchmark, contestant, options.num_seeds, options.cache)
        runs = [run(benchmark, contestant, lr, seed, options.cache, curvature) for seed in range(options.num_seeds)]
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
        f"{curvature.num_examples} training images, at the end of training. SAM gap: rise of that loss, 0.05 up "
        "the gradient.",
    )


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
