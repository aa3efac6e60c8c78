from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import scipy.stats
import torch

from flatopt.evaluate._report import (
    Report,
    Table,
    confidence_interval,
    markdown_table,
    mean_and_std,
    mean_pm_std,
    write_report,
)


def test_mean_and_std_are_those_of_the_standard_library() -> None:
    values = [0.3, 1.7, -2.0, 5.5]
    mean, std = mean_and_std(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert std == pytest.approx(statistics.stdev(values))


def test_one_broken_run_breaks_the_mean_visibly() -> None:
    assert mean_pm_std([1.0, math.inf]) == "nan ± nan"


def test_table_rows_must_fit_the_header() -> None:
    with pytest.raises(ValueError, match="2 cells under a header of 1"):
        markdown_table(["a"], [["1", "2"]])


def test_report_is_written_as_table_json_and_figure(tmp_path: Path) -> None:
    report = Report(
        title="Title",
        header=["a"],
        rows=[["1"]],
        records=[{"a": 1.0, "b": [math.nan, 2.0]}],
        draw=lambda figure: figure.subplots().plot([0, 1]),
        note="note",
    )
    text = write_report(report, tmp_path / "new" / "folder")
    assert text == (tmp_path / "new/folder/table.md").read_text(encoding="utf-8")
    assert "# Title" in text and "| 1 |" in text and "note" in text
    assert json.loads((tmp_path / "new/folder/results.json").read_text()) == [{"a": 1.0, "b": [None, 2.0]}]
    assert (tmp_path / "new/folder/figure.png").read_bytes().startswith(b"\x89PNG")


def test_interval_is_students_by_hand_and_by_scipy() -> None:
    # Differences 1, 2, 3, 4, 5: mean 3, std sqrt(2.5), t(0.975, 4) = 2.7764 from a printed table.
    mean, low, high = confidence_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    half = pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)
    assert high - mean == half and mean - low == half
    values = [0.3, -1.2, 0.8, 2.5]
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval()
    assert confidence_interval(values)[1:] == pytest.approx((expected.low, expected.high))


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    samples = 0.4 + torch.randn(2000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    intervals = [confidence_interval(row) for row in samples.tolist()]
    covered = sum(interval.low <= 0.4 <= interval.high for interval in intervals) / 2000
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)  # with 1.96 in place of 2.776 it is 0.88


def test_no_interval_from_one_value_or_from_a_broken_run() -> None:
    assert confidence_interval([2.0]).mean == 2.0 and math.isnan(confidence_interval([2.0]).low)
    assert all(map(math.isnan, confidence_interval([1.0, math.nan, 2.0])))


def test_further_tables_and_figures_are_written(tmp_path: Path) -> None:
    report = Report(
        title="Title",
        header=["a"],
        rows=[["1"]],
        records=[],
        draw=lambda figure: figure.subplots().plot([0, 1]),
        more_tables=[Table("Second", ["b"], [["2"]])],
        more_figures={"other": lambda figure: figure.subplots().plot([1, 0])},
    )
    assert "## Second\n\n| b |\n|---|\n| 2 |" in write_report(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "results.json", "figure.png", "other.png"}
