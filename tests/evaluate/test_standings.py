"""The statistics of the quality table, on cells whose answers are known by hand."""

from __future__ import annotations

import math

import pytest
import scipy.stats
from matplotlib.figure import Figure

from flatopt.evaluate import _figures, _standings
from flatopt.evaluate._cache import Record


def record(
    task: str, optimizer: str, score: list[float], *, tuned: bool = True, kind: str = "classification"
) -> Record:
    return {"task": task, "optimizer": optimizer, "score": score, "tuned": tuned, "kind": kind}


RECORDS = [
    record("x", "Adam", [80.0, 82.0, 84.0]),
    record("x", "SGD", [81.0, 81.0, 87.0]),
    record("x", "FlatOpt", [82.0, 83.0, 85.5], tuned=False),
    record("y", "Adam", [50.0, 52.0, 54.0]),
    record("y", "SGD", [40.0, 42.0, 44.0]),
    record("y", "FlatOpt", [51.0, 53.0, 58.0], tuned=False),
    record("z", "Adam", [-30.0, -30.0, -30.0], kind="regression"),
    record("z", "FlatOpt", [-33.0, -30.0, -30.0], tuned=False, kind="regression"),
]
CELLS = _standings.by_cell(RECORDS)


def test_counts_against_the_reference_and_against_the_best_family_of_each_task() -> None:
    assert _standings.best_tuned(CELLS, "x") == "SGD" and _standings.best_tuned(CELLS, "y") == "Adam"
    assert _standings.at_least(CELLS, "FlatOpt", "Adam") == (2, 3)
    assert _standings.at_least(CELLS, "FlatOpt") == (2, 3)
    assert _standings.at_least(CELLS, "SGD", "Adam") == (1, 2)  # only the tasks that both have


def test_mean_difference_is_paired_by_seed_with_intervals_over_tasks_and_seeds() -> None:
    tasks = _standings.shared_tasks(CELLS, ["FlatOpt", "Adam"], ("classification",))
    assert tasks == ["x", "y"]
    assert _standings.differences(CELLS, "x", "FlatOpt", "Adam") == [2.0, 1.0, 1.5]
    expected = scipy.stats.ttest_1samp([1.5, 2.0], 0.0).confidence_interval()
    assert _standings.interval_over_tasks(CELLS, tasks, "FlatOpt", "Adam") == pytest.approx(
        (1.75, expected.low, expected.high)
    )
    expected = scipy.stats.ttest_1samp([1.5, 1.0, 2.75], 0.0).confidence_interval()
    assert _standings.interval_over_seeds(CELLS, tasks, "FlatOpt", "Adam") == pytest.approx(
        (1.75, expected.low, expected.high)
    )


def test_ranks_are_over_the_tasks_that_all_have_and_wins_over_those_that_one_has() -> None:
    assert _standings.mean_ranks(CELLS, ["Adam", "SGD", "FlatOpt"]) == {"Adam": 2.5, "SGD": 2.5, "FlatOpt": 1.0}
    assert _standings.wins(CELLS, ["Adam", "SGD", "FlatOpt"]) == {"Adam": 1, "SGD": 0, "FlatOpt": 2}


def test_the_figure_of_ranks_draws_the_ranks_of_the_table() -> None:
    figure = Figure()
    names = ["Adam + cosine", "SGD", "FlatOpt"]
    records = [
        record | {"optimizer": "Adam + cosine"} if record["optimizer"] == "Adam" else record for record in RECORDS
    ]
    more = [record | {"optimizer": "Adam"} for record in records if record["optimizer"] == names[0]]
    _figures.draw_ranks(figure, [*records, *more])
    (axes,) = figure.axes
    drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "None"]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    ranks = _standings.mean_ranks(_standings.by_cell([*records, *more]), ["Adam", "SGD", "FlatOpt"])
    assert dict(zip(labels, drawn, strict=True)) == ranks  # the reference is a part of Adam, and no rival


def test_profile_is_the_share_of_tasks_within_a_ratio_of_the_smallest_error() -> None:
    # Errors: x 18, 17, 16.5; y 48, 58, 46; z 30, 31.
    assert _standings.profile(CELLS, "Adam", [1.0, 1.05, 1.1]) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert _standings.profile(CELLS, "SGD", [1.0, 1.04, 1.3]) == pytest.approx([0.0, 0.5, 1.0])


def test_steps_to_a_loss_are_those_of_the_running_mean_of_two_points() -> None:
    other = {"curve": [2.0, 1.5, 1.0, 0.8]}  # ends at 0.9
    assert _standings.steps_to_reach({"curve": [2.0, 1.0, 0.8, 0.2]}, other) == 0.75
    assert _standings.steps_to_reach({"curve": [2.0, 1.9, 1.0, 0.9]}, other) == math.inf


def test_sensitivity_is_measured_on_the_seeds_of_tuning() -> None:
    cell = {"score": [80.0, 90.0, 10.0], "score_at_third": [70.0, 80.0], "score_at_triple": [81.0, 91.0]}
    assert _standings.sensitivity(cell) == (-10.0, 1.0)
