"""How flat the minima are that the optimizers reach, beside how well they generalise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from ._cache import Record, RunCache
from ._cells import num_tuning_seeds
from ._evaluation import progress
from ._report import Report, mean_pm_std
from ._training import run, tuned
from .curvature import Curvature
from .quality import Quality

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = ("top_eigenvalue", "hutchinson_trace", "sam_gap", "gradient_norm", "loss", "test_loss", "test_score")


@dataclass(frozen=True, kw_only=True)
class Flatness(Quality):
    """The minima that each contestant reaches, with the settings of the quality table."""

    summary = "flatness of the minima that each optimizer reaches"

    def report(self, cache: RunCache) -> Report:
        """Measure the minima."""
        curvature = Curvature(num_matvecs=5 if self.fast else 100)
        records = []
        for benchmark, contestant in progress(self.work(), "flatness"):
            setting = tuned(benchmark, contestant, num_tuning_seeds(benchmark, self.seeds), cache)
            runs = [run(benchmark, contestant, setting, seed, cache, curvature) for seed in range(self.seeds)]
            record: Record = {"task": benchmark.name, "optimizer": contestant.name, "setting": str(setting)}
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
            note=f"Mean ± standard deviation over {self.seeds} seeds. Hessian of the mean loss on "
            f"{curvature.num_examples} training examples, at the end of training. SAM gap: rise of that loss, 0.05 up "
            "the gradient.",
        )


def _row(record: Record) -> list[str]:
    measures = [mean_pm_std(record[key], digits=3) for key in MEASURES if key not in ("gradient_norm", "test_score")]
    return [record["task"], record["optimizer"], *measures, mean_pm_std(record["test_score"], scale=100)]


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
