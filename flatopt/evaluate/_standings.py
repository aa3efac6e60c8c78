"""What the cells of a table say: ranks, wins, paired differences with intervals, sensitivity, speed.

A record is a cell as :func:`flatopt.evaluate._cells.cell` returns it; higher scores are better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from ._cache import Record
from ._report import Interval, Table, confidence_interval, mean_pm_std

Cells = Mapping[tuple[str, str], Record]
"""Records by task and optimizer."""


def by_cell(records: Sequence[Record]) -> Cells:
    """Return records by task and optimizer."""
    return {(record["task"], record["optimizer"]): record for record in records}


def names(records: Sequence[Record], key: str) -> list[str]:
    """Return the different values of a key, in the order of their first record."""
    return list(dict.fromkeys(record[key] for record in records))


def table(
    title: str, cells: Cells, tasks: Sequence[str], optimizers: Sequence[str], text: Callable[[Record], str]
) -> Table:
    """Lay out what ``text`` says of the cells as tasks x optimizers."""
    rows = [
        [task, *(text(cells[task, name]) if (task, name) in cells else "–" for name in optimizers)] for task in tasks
    ]
    return Table(title, ["task", *optimizers], rows)


def spread(key: str, digits: int) -> Callable[[Record], str]:
    """Return what formats a measure of a cell, its mean and standard deviation over seeds."""
    return lambda record: mean_pm_std(record[key], digits)


def shared_tasks(cells: Cells, optimizers: Sequence[str], kinds: Sequence[str] = ()) -> list[str]:
    """Return the tasks that all of some optimizers have cells of; of some kinds only, if there are any."""
    tasks = dict.fromkeys(task for task, _ in cells)
    return [
        task
        for task in tasks
        if all((task, optimizer) in cells for optimizer in optimizers)
        and (not kinds or cells[task, optimizers[0]]["kind"] in kinds)
    ]


def mean_score(cells: Cells, task: str, optimizer: str) -> float:
    """Return the mean over seeds."""
    return fmean(cells[task, optimizer]["score"])


def differences(cells: Cells, task: str, optimizer: str, other: str, key: str = "score") -> list[float]:
    """Return the paired differences to another optimizer, seed by seed."""
    pairs = zip(cells[task, optimizer][key], cells[task, other][key], strict=True)
    return [one - two for one, two in pairs]


def interval_over_tasks(cells: Cells, tasks: Sequence[str], optimizer: str, other: str, key: str = "score") -> Interval:
    """Return the mean difference over tasks; its interval is over the tasks, each the mean over its seeds."""
    return confidence_interval([fmean(differences(cells, task, optimizer, other, key)) for task in tasks])


def interval_over_seeds(cells: Cells, tasks: Sequence[str], optimizer: str, other: str, key: str = "score") -> Interval:
    """Return the mean difference over tasks; its interval is over the seeds, each the mean over the tasks."""
    of_tasks = [differences(cells, task, optimizer, other, key) for task in tasks]
    return confidence_interval([fmean(of_seed) for of_seed in zip(*of_tasks, strict=True)])


def best_tuned(cells: Cells, task: str) -> str | None:
    """Return the tuned family with the highest mean score on a task, on the split that is reported."""
    scores = {name: fmean(cell["score"]) for (where, name), cell in cells.items() if where == task and cell["tuned"]}
    return max(scores, key=lambda name: scores[name]) if scores else None


def at_least(cells: Cells, optimizer: str, other: str | None = None) -> tuple[int, int]:
    """Return on how many tasks the mean score is at least that of another optimizer, and the number of tasks.

    Where no other one is named, it is that of every tuned family.
    """
    rivals = {task: other or best_tuned(cells, task) for task in shared_tasks(cells, [optimizer])}
    compared = [(task, rival) for task, rival in rivals.items() if rival and (task, rival) in cells]
    won = sum(mean_score(cells, task, optimizer) >= mean_score(cells, task, rival) for task, rival in compared)
    return won, len(compared)


def mean_ranks(cells: Cells, optimizers: Sequence[str]) -> dict[str, float]:
    """Return the mean rank of each optimizer, 1 for the best, over the tasks that all have; ties share their ranks.

    Example:
        >>> cells = {("t", name): {"score": [score]} for name, score in {"a": 3.0, "b": 1.0, "c": 3.0}.items()}
        >>> mean_ranks(cells, ["a", "b", "c"])
        {'a': 1.5, 'b': 3.0, 'c': 1.5}
    """
    tasks = shared_tasks(cells, optimizers)
    return {
        name: fmean(rank(cells, task, name, optimizers) for task in tasks) if tasks else math.nan for name in optimizers
    }


def wins(cells: Cells, optimizers: Sequence[str]) -> dict[str, int]:
    """Return on how many tasks each optimizer is the best of those that the task has, ties included."""
    return {
        name: sum(
            mean_score(cells, task, name)
            >= max(mean_score(cells, task, other) for other in optimizers if (task, other) in cells)
            for task in shared_tasks(cells, [name])
        )
        for name in optimizers
    }


def rank(cells: Cells, task: str, name: str, optimizers: Sequence[str]) -> float:
    """Return the rank of an optimizer on a task, 1 for the best; ties share their ranks."""
    own, scores = mean_score(cells, task, name), [mean_score(cells, task, other) for other in optimizers]
    return sum(score > own for score in scores) + (1 + sum(score == own for score in scores)) / 2


def sensitivity(record: Record) -> tuple[float, float]:
    """Return what a third, and three times, the learning rate does to the score, on the seeds of tuning."""
    num_seeds = len(record["score_at_third"])
    own = fmean(record["score"][:num_seeds])
    return fmean(record["score_at_third"]) - own, fmean(record["score_at_triple"]) - own


def steps_to_reach(record: Record, other: Record) -> float:
    """Return after which fraction of its steps a run has the training loss that another one ends with.

    Both are means over seeds and over a twentieth of the steps; infinite when it is never reached.
    """
    target = fmean(other["curve"][-2:])
    for end in range(2, len(record["curve"]) + 1):
        if fmean(record["curve"][end - 2 : end]) <= target:
            return end / len(record["curve"])
    return math.inf


def error(record: Record) -> float:
    """Return the mean error: 100 - accuracy, or 100 MSE."""
    score = fmean(record["score"])
    return 100 - score if record["kind"] == "classification" else -score


def profile(cells: Cells, optimizer: str, ratios: Sequence[float]) -> list[float]:
    """Return the share of tasks on which the error is at most ``ratio`` times the smallest of all optimizers."""
    tasks = shared_tasks(cells, [optimizer])
    best = {task: min(error(cell) for (where, _), cell in cells.items() if where == task) for task in tasks}
    return [fmean(error(cells[task, optimizer]) <= ratio * best[task] for task in tasks) for ratio in ratios]
