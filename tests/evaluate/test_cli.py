from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flatopt.evaluate import demo, robustness, step_time
from flatopt.evaluate.cli import main
from flatopt.pretrained import LearnedRule
from flatopt.rules import OrthogonalizedMomentum

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save untrained weights: these tests are about the commands, not about what was learned."""
    rule = OrthogonalizedMomentum()
    folder = tmp_path_factory.mktemp("weights") / "untrained"
    LearnedRule(rule, rule.init_weights(torch.Generator().manual_seed(0))).save_pretrained(folder)
    return str(folder)


def outputs(folder: Path) -> list[dict[str, object]]:
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "|---" in (folder / "table.md").read_text(encoding="utf-8")
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(("command", "num_records"), [("quality", 36), ("flatness", 36), ("robustness", 12)])
def test_command_writes_its_results_and_a_second_call_trains_nothing(
    command: str, num_records: int, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [command, "--fast", "--seeds", "1", "--pretrained", pretrained, "--out", str(tmp_path)]
    main(arguments)
    first = outputs(tmp_path)
    assert len(first) == num_records

    def fail(*arguments: object) -> None:
        raise AssertionError("trained again")

    for module in ("_training", "robustness"):
        monkeypatch.setattr(f"flatopt.evaluate.{module}.train_benchmark", fail)
    main(arguments)
    assert outputs(tmp_path) == first


def test_step_time_reports_both_optimizers(pretrained: str, tmp_path: Path) -> None:
    main(["step-time", "--fast", "--seeds", "1", "--pretrained", pretrained, "--out", str(tmp_path)])
    (record,) = outputs(tmp_path)
    assert record["num_params"] == 64 * 32 + 32 + 32 * 10 + 10
    # AdamW keeps two moments; its 0-D step counters are 4 of 2,410 floats.
    assert record["AdamW"]["state"] == pytest.approx(2.0, abs=0.01)
    assert record["AdamW"]["ratio"] == 1 and record["FlatOpt"]["ratio"] > 0


def test_peak_memory_is_the_largest_sum_not_the_total() -> None:
    def allocate() -> None:
        for _ in range(5):
            torch.empty(1_000_000)

    assert 4e6 <= step_time.peak_bytes(allocate) < 8e6


def test_demo_compares_the_two_optimizers(pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--seeds", "1", "--steps", "30", "--pretrained", pretrained, "--out", str(tmp_path)])
    adam, learned = outputs(tmp_path)
    assert adam["optimizer"] == "torch.optim.Adam(lr=1e-3)" and learned["optimizer"] == "flatopt.FlatOpt"
    assert len(adam["losses"][0]) == len(learned["losses"][0]) == 30
    assert adam["losses"][0][0] == learned["losses"][0][0]  # same initial weights, same first batch
    printed = capsys.readouterr()
    assert "| flatopt.FlatOpt" in printed.out
    assert "30/30" in printed.err


def test_cells_of_the_robustness_grid_cover_every_pair_of_values() -> None:
    cells = robustness.grid()
    chosen = robustness.covering_cells(cells)
    assert set().union(*map(robustness._pairs, chosen)) == set().union(*map(robustness._pairs, cells))
    assert len(chosen) < len(cells) / 5
    for axis, values in {
        "architecture": robustness.ARCHITECTURES,
        "width": robustness.WIDTHS,
        "depth": robustness.DEPTHS,
        "batch_size": robustness.BATCH_SIZES,
        "normalise": (False, True),
    }.items():
        assert {getattr(cell, axis) for cell in chosen} == set(values)


@pytest.mark.parametrize(
    ("initial", "final", "diverged"),
    [(2.3, 0.1, False), (2.3, 2.31, False), (2.3, 2.5, True), (2.3, float("inf"), True), (float("nan"), 1.0, True)],
)
def test_divergence_is_a_final_loss_above_the_initial_one(initial: float, final: float, diverged: bool) -> None:
    assert robustness._diverged({"initial": initial, "final": final}) is diverged


def test_quality_runs_the_optimizers_that_are_named(pretrained: str, tmp_path: Path) -> None:
    arguments = ["quality", "--fast", "--seeds", "1", "--pretrained", pretrained, "--out", str(tmp_path)]
    main([*arguments, "--tasks", "digits CNN", "--optimizers", "untrained core", "SGD"])
    found = [(record["task"], record["optimizer"]) for record in outputs(tmp_path)]
    names = ["untrained core", "untrained core, horizon unknown", "SGD momentum"]
    assert found == [("digits CNN", name) for name in names]


@pytest.mark.parametrize(
    ("option", "listed"),
    [("--optimizers", "FlatOpt, horizon unknown, untrained core"), ("--tasks", "digits MLP, digits CNN")],
)
def test_an_unknown_name_is_one_line_that_lists_the_valid_ones(
    option: str, listed: str, pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["quality", option, "nonsense", "--pretrained", pretrained, "--out", str(tmp_path)])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "nonsense" in printed and listed in printed and printed.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["quality", "--seeds", "0"], ["quality", "--seeds", "x"]])
def test_wrong_arguments_exit_with_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
