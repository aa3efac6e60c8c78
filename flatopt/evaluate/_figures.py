"""The figures of the quality table; matplotlib comes in by the figure that is drawn on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from . import _standings
from ._cache import Record
from ._report import Axes, Figure, Interval, confidence_interval
from .contestants import REFERENCE

CURVE_TASKS = ("MLP 28x28", "CNN", "row LSTM", "text transformer")
"""Parts of the names of the tasks whose curves are drawn; the first ones of the table if none is there."""

LOSSES = [digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 3, 5)]
"""What an axis of losses is labelled with."""

CURVE_OPTIMIZERS = ("FlatOpt", "FlatOpt, length unknown", REFERENCE, "SGD momentum", "Muon")


def draw_ranks(figure: Figure, records: Sequence[Record]) -> None:
    """Draw the rank on each task as a dot, and the mean rank as a bar, best first."""
    cells = _standings.by_cell(records)
    optimizers = _standings.names(records, "optimizer")
    rivals = [name for name in optimizers if name != REFERENCE] or optimizers
    tasks = _standings.shared_tasks(cells, rivals) or _standings.names(records, "task")
    on = {task: [name for name in rivals if (task, name) in cells] for task in tasks}
    ranks = {
        name: [_standings.rank(cells, task, name, on[task]) for task in tasks if name in on[task]] for name in rivals
    }
    order = sorted(rivals, key=lambda name: fmean(ranks[name]), reverse=True)
    axes = figure.subplots()
    for height, name in enumerate(order):
        count = len(ranks[name])
        spread = [height + 0.5 * (index / max(1, count - 1) - 0.5) for index in range(count)]
        axes.plot(ranks[name], spread, ".", color=_colour(name, optimizers), alpha=0.6)
        axes.plot(
            [fmean(ranks[name])] * 2, [height - 0.35, height + 0.35], color=_colour(name, optimizers), linewidth=4
        )
    axes.set_yticks(range(len(order)), map(plain_name, order))
    axes.set_xlabel(f"rank on each of {len(tasks)} tasks (dots) and their mean (bars); 1 is the best")


def draw_profile(figure: Figure, records: Sequence[Record]) -> None:
    """Draw the performance profile: on which share of the tasks the error is at most so many times the best one."""
    cells, optimizers = _standings.by_cell(records), _standings.names(records, "optimizer")
    ratios = [1 + 0.01 * step for step in range(51)]
    axes = figure.subplots()
    for name in optimizers:
        is_ours = name.startswith("FlatOpt")
        axes.step(
            ratios,
            _standings.profile(cells, name, ratios),
            "-" if name.startswith(("FlatOpt", "untrained")) else "--",
            where="post",
            label=plain_name(name),
            color=_colour(name, optimizers),
            linewidth=2.5 if is_ours else 1.2,
            zorder=3 if is_ours else 2,
        )
    axes.set(xlabel="error, as a multiple of the smallest error of the task", ylabel="share of the tasks, at most that")
    axes.set(ylim=(0, 1.02), xlim=(1, ratios[-1]))
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right center")


def draw_curves(figure: Figure, records: Sequence[Record]) -> None:
    """Draw training loss and test score along the run, for a few tasks."""
    cells, names = _standings.by_cell(records), _standings.names(records, "optimizer")
    every = _standings.names(records, "task")
    tasks = [task for task in every if task.startswith(CURVE_TASKS)][:4] or every[:4]
    figure.set_size_inches(3.6 * len(tasks), 6.5)
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        for name in [name for name in CURVE_OPTIMIZERS if (task, name) in cells] or names[:3]:
            record, colour = cells[task, name], _colour(name, names)
            share = record["num_steps"] / max(1, len(record["curve"]))
            steps = [share * (index + 0.5) for index in range(len(record["curve"]))]
            panels[0, column].plot(steps, record["curve"], color=colour, label=plain_name(name))
            panels[1, column].plot(*zip(*record["test_curve"], strict=True), color=colour)
        panels[0, column].set(title=task, yscale="log")
        low, high = panels[0, column].get_ylim()
        ticks = [tick for tick in LOSSES if low <= tick <= high]
        panels[0, column].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[0, column].set_yticks([], minor=True)
        panels[1, column].set(xlabel="step")
    for axes in panels.flatten():
        axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel("training loss")
    panels[1, 0].set_ylabel("test score: accuracy %, or -100 MSE")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(CURVE_OPTIMIZERS))


def draw_differences(figure: Figure, records: Sequence[Record]) -> None:
    """Draw the score of the learned optimizers less that of the reference, with intervals over seeds."""
    cells = _standings.by_cell(records)
    learned = [name for name in _standings.names(records, "optimizer") if name.startswith(("FlatOpt", "untrained"))]
    tasks = _standings.shared_tasks(cells, [REFERENCE])
    figure.set_size_inches(9, 1.5 + 0.35 * len(tasks))
    axes = figure.subplots()
    for index, name in enumerate(learned):
        for row, task in enumerate(tasks):
            if (task, name) not in cells:
                continue
            interval = confidence_interval(_standings.differences(cells, task, name, REFERENCE))
            height = row + 0.16 * (index - (len(learned) - 1) / 2)
            label = plain_name(name) if row == 0 else None
            draw_interval(axes, height, interval, color=f"C{index}", markersize=4, linewidth=1, label=label)
    point_scale(axes)
    task_rows(axes, tasks)
    axes.set_xlabel(f"score less that of tuned {REFERENCE}, points: FlatOpt is better on the right")
    if learned and tasks:
        figure.legend(fontsize=9, loc="outside upper center", ncols=2)


def plain_name(name: str) -> str:
    """Return an optimizer's name in words that need no page to explain them.

    Example:
        >>> plain_name("untrained core, length unknown")
        'FlatOpt untrained, length unknown'
    """
    return name.replace("untrained core", "FlatOpt untrained")


def draw_interval(axes: Axes, height: float, interval: Interval, **style: Any) -> None:
    """Draw a mean as a dot, and its interval as a bar where there is one."""
    mean, low, high = interval
    bars = [[mean - low], [high - mean]] if math.isfinite(low) else None
    axes.errorbar(mean, height, xerr=bars, marker="o", **style)


def task_rows(axes: Axes, tasks: Sequence[str]) -> None:
    """Label the rows of a figure with the tasks, the first at the top, on bands that tell one from the next."""
    for row in range(0, len(tasks), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="0.95", zorder=0)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=9)
    axes.set_ylim(max(1, len(tasks)) - 0.5, -0.5)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and those before it, ``window`` of them.

    Example:
        >>> smooth([1.0, 3.0, 5.0], 2)
        [1.0, 2.0, 4.0]
    """
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def point_scale(axes: Axes) -> None:
    """Let an axis of differences in points be linear around its zero line, logarithmic further out, and in numbers."""
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_xscale("symlog", linthresh=2)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", alpha=0.25)


def _colour(name: str, optimizers: Sequence[str]) -> str:
    return _COLOURS[optimizers.index(name) % len(_COLOURS)]


_COLOURS = (*(f"C{index}" for index in range(10)), "black", "navy", "darkgreen")
