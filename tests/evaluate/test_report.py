from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from flatopt.evaluate._report import Report, RunCache, markdown_table, mean_and_std, mean_pm_std, write_report


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


def test_cache_computes_once_and_survives_a_new_process(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"loss": math.inf}

    for _ in range(3):
        cache = RunCache(tmp_path / "runs.jsonl")
        assert cache.get({"lr": 0.1, "seed": 0}, compute) == {"loss": math.inf}
        assert cache.get({"seed": 0, "lr": 0.1}, compute) == {"loss": math.inf}
    assert len(calls) == 1


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_cache_drops_a_line_cut_by_a_kill_and_keeps_the_others(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "runs.jsonl"
    for seed in range(3):
        RunCache(path).get({"seed": seed}, lambda seed=seed: {"value": seed})
    path.write_bytes(path.read_bytes()[:-cut])
    cache = RunCache(path)
    recomputed = []
    for seed in range(3):
        assert cache.get({"seed": seed}, lambda seed=seed: recomputed.append(seed) or {"value": seed}) == {
            "value": seed
        }
    assert recomputed == [2]
    assert len(path.read_text().splitlines()) == 3
