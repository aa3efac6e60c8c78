from __future__ import annotations

import json
from pathlib import Path

import pytest
import scipy.stats
import torch

from flatopt.evaluate.ablation import Ablation, intervals, paired
from flatopt.evaluate.cli import main
from flatopt.pretrained import LearnedRule
from flatopt.rules import OrthogonalizedMomentum

pytest.importorskip("sklearn")

# Two sets of one row, three seeds, two tasks; the other row has one set.
VALUES = {
    ("flat", "x"): [[3.0, 4.0, 5.0], [4.0, 6.0, 8.0]],
    ("flat", "y"): [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]],
    ("plain", "x"): [[1.0, 2.0, 3.0], [3.0, 3.0, 3.0]],
    ("plain", "y"): [[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]],
    ("core", "x"): [[1.0, 2.0, 6.0]],
    ("core", "y"): [[0.5, 0.5, 0.5]],
}


def test_rows_are_paired_by_set_task_and_seed() -> None:
    assert paired(VALUES, ["x", "y"], "flat", "plain") == [
        [[2.0, 2.0, 2.0], [1.0, 3.0, 5.0]],
        [[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]],
    ]


def test_a_row_of_one_set_is_compared_with_each_set_of_another() -> None:
    assert paired(VALUES, ["x"], "flat", "core") == [[[2.0, 2.0, -1.0], [3.0, 4.0, 2.0]]]
    assert paired(VALUES, ["x"], "core", "core") == [[[0.0, 0.0, 0.0]]]


def test_rows_of_two_and_three_sets_cannot_be_paired() -> None:
    values = VALUES | {("three", "x"): [[0.0] * 3] * 3}
    with pytest.raises(ValueError, match="'flat' and 'three' have 2 and 3 sets"):
        paired(values, ["x"], "flat", "three")


def test_intervals_are_students_over_tasks_over_sets_and_over_seeds() -> None:
    over_tasks, over_sets = intervals(paired(VALUES, ["x", "y"], "flat", "plain"))
    # Means of the tasks 2.5 and 0.5; means of the sets over tasks and seeds (2 + 0) / 2 and (3 + 1) / 2.
    expected = scipy.stats.ttest_1samp([2.5, 0.5], 0.0).confidence_interval()
    assert over_tasks == pytest.approx((1.5, expected.low, expected.high))
    expected = scipy.stats.ttest_1samp([1.0, 2.0], 0.0).confidence_interval()
    assert over_sets == pytest.approx((1.5, expected.low, expected.high))
    single = {key: sets[:1] for key, sets in VALUES.items()}
    _, over_seeds = intervals(paired(single, ["x", "y"], "flat", "plain"))
    expected = scipy.stats.ttest_1samp([1.5, 1.0, 0.5], 0.0).confidence_interval()
    assert over_seeds == pytest.approx((1.0, expected.low, expected.high))


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    rule = OrthogonalizedMomentum()
    folders = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        weights = {name: 0.1 * torch.randn(w.shape, generator=generator) for name, w in rule.init_weights().items()}
        folders.append(str(tmp_path / f"set-{seed}"))
        LearnedRule(rule, weights).save_pretrained(folders[-1])
    return folders


def test_command_compares_rows_of_several_sets_with_both_cores(sets: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["ablation", "--fast", "--seeds", "2", "--tasks", "digits MLP", "--flatness", "--out", str(out)]
    main([*arguments, "--sets", f"both={','.join(sets)}", sets[0], "--length", "known"])
    records = {record["optimizer"]: record for record in json.loads((out / "results.json").read_text())}
    assert list(records) == ["adam core#0", "core#0", "both#0", "both#1", f"{sets[0]}#0"]
    assert records["both#0"]["score"] == records[f"{sets[0]}#0"]["score"] != records["both#1"]["score"]
    assert records["adam core#0"]["score"] != records["core#0"]["score"]
    table = (out / "table.md").read_text(encoding="utf-8")
    mean = sum(sum(records[f"both#{index}"]["score"]) for index in (0, 1)) / 4 - sum(records["core#0"]["score"]) / 2
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = {(line[0], line[1]): line[2:] for line in cells if len(line) == 5}
    assert rows["accuracy, points", "both"][0] == f"{mean:+.3f}"
    lower = sum(sum(records[f"both#{index}"]["top_eigenvalue"]) for index in (0, 1)) / 2
    lower -= sum(records["core#0"]["top_eigenvalue"])
    assert rows["ln top eigenvalue", "both"][0] == f"{lower / 2:+.3f}"
    assert rows["ln top eigenvalue", "both"][2] == f"{int(lower < 0)} of 1"
    scores = next(line for line in cells if line[0] == "mean accuracy")
    assert scores[1:3] == [f"{sum(records[name]['score']) / 2:.2f}" for name in ("adam core#0", "core#0")]


@pytest.mark.parametrize("labels", [("mine", "mine"), ("core",), ("adam core",)])
def test_a_label_stands_for_one_row(labels: tuple[str, ...], sets: list[str]) -> None:
    with pytest.raises(ValueError, match=f"there is a row called {labels[-1]!r} already"):
        Ablation(sets=tuple(f"{label}={sets[0]}" for label in labels)).rows()
    with pytest.raises(ValueError, match="already"):
        Ablation(sets=(sets[0], sets[0])).rows()


def test_an_unknown_row_to_compare_with_is_named(sets: list[str]) -> None:
    with pytest.raises(ValueError, match="no row is called 'nothing': there are adam core, core, one"):
        Ablation(sets=(f"one={sets[0]}",), against="nothing").report(None)  # type: ignore[arg-type]
