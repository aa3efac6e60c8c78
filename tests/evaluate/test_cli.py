from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flatopt._version import __version__
from flatopt.evaluate import demo, robustness, step_time
from flatopt.evaluate._evaluation import read_options
from flatopt.evaluate.cli import EVALUATIONS, build_parser, main
from flatopt.evaluate.quality import Quality
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


@pytest.mark.parametrize(("command", "num_records"), [("quality", 39), ("flatness", 39), ("robustness", 60)])
def test_command_writes_its_results_and_a_second_call_trains_nothing(
    command: str, num_records: int, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [command, "--fast", "--seeds", "1", "--pretrained", pretrained, "--out", str(tmp_path)]
    main(arguments)
    first = outputs(tmp_path)
    assert len(first) == num_records

    def fail(*arguments: object) -> None:
        raise AssertionError("trained again")

    for name in ("_training.train_benchmark", "robustness.train_benchmark", "stress.build_model"):
        monkeypatch.setattr(f"flatopt.evaluate.{name}", fail)
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
    assert printed.err == ""  # the bar is for terminals


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


@pytest.mark.parametrize("outcomes", [[float("nan"), 0.5], [0.5, float("nan")]])
def test_a_run_without_an_initial_loss_is_drawn_as_diverged(outcomes: list[float]) -> None:
    """Of two seeds, in any order, the worst one counts."""
    tried = [[{"initial": initial, "final": 0.1 if initial == 0.5 else float("inf")}] for initial in outcomes]
    assert robustness._ratio({"outcomes": tried}) == float("inf")
    assert robustness._ratio({"outcomes": [sum(tried, [])]}) == 0.2  # of two learning rates the best


def test_quality_runs_the_optimizers_that_are_named(pretrained: str, tmp_path: Path) -> None:
    arguments = ["quality", "--fast", "--seeds", "1", "--pretrained", pretrained, "--out", str(tmp_path)]
    main([*arguments, "--tasks", "digits CNN", "--optimizers", "untrained core", "SGD"])
    found = [(record["task"], record["optimizer"]) for record in outputs(tmp_path)]
    names = ["untrained core", "untrained core, length unknown", "SGD momentum"]
    assert found == [("digits CNN", name) for name in names]


@pytest.mark.parametrize(
    ("option", "listed"),
    [("--optimizers", "FlatOpt, length unknown, untrained core"), ("--tasks", "digits MLP, digits CNN")],
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


def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path: Path) -> None:
    code = """
import sys
for name in ("matplotlib", "scipy", "sklearn", "tqdm", "schedulefree", "prodigyopt"):
    sys.modules[name] = None
from flatopt.evaluate._evaluation import read_options
from flatopt.evaluate.cli import EVALUATIONS, build_parser, main
from flatopt.evaluate.quality import Quality
try:
    main(["--help"])
except SystemExit as stopped:
    assert stopped.code == 0
main(["quality", "--fast", "--out", sys.argv[1]])
"""
    out = tmp_path / "new"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "pip install 'flatopt[eval]'" in done.stderr
    assert done.stderr.count("\n") == 1 and "quality" in done.stdout
    assert not out.exists()


def test_a_package_that_only_the_figure_needs_is_missed_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        main(["quality", "--fast", "--out", str(tmp_path / "new")])
    assert stopped.value.code == 2 and "matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_fast_results_have_a_folder_of_their_own_and_say_what_they_are(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["step-time", "--fast", "--seeds", "1", "--pretrained", pretrained])
    assert (tmp_path / "runs/eval/step-time-fast/table.md").read_text().startswith("# Toy sizes, not results")
    assert not (tmp_path / "runs/eval/step-time").exists()


def test_every_field_of_a_table_is_an_option_with_its_default_and_a_help() -> None:
    parser = build_parser()
    for name, evaluation in EVALUATIONS.items():
        positional = ["module:function"] if name == "compare" else []
        chosen = parser.parse_args([name, *positional])
        for one in dataclasses.fields(evaluation):
            assert one.metadata["help"]
            if not one.metadata.get("positional"):
                assert getattr(chosen, one.name) == one.default, (name, one.name)


def test_options_are_read_into_the_table() -> None:
    chosen = build_parser().parse_args(
        ["quality", "--seeds", "2", "--tasks", "a", "b", "--no-learned", "--split", "meta"]
    )
    table = read_options(EVALUATIONS["quality"], chosen)
    assert table == Quality(seeds=2, tasks=("a", "b"), learned=False, split="meta")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_one_line(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["quality", "--fast", "--out", str(tmp_path / out)])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "file" in printed and printed.count("\n") == 1


def test_a_file_that_is_no_cache_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.sqlite3").write_text("not a data base, and long enough to be seen as something else " * 20)
    with pytest.raises(SystemExit) as stopped:
        main(["quality", "--fast", "--out", str(tmp_path)])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "runs.sqlite3" in printed and printed.count("\n") == 1


def test_version_is_that_of_the_package_also_where_it_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"flatopt {__version__}\n")
