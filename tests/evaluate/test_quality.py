from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flatopt.evaluate import quality
from flatopt.evaluate._cache import Record, RunCache
from flatopt.evaluate._report import confidence_interval
from flatopt.evaluate._standings import by_cell
from flatopt.evaluate._training import results
from flatopt.evaluate.benchmarks import BENCHMARKS, FAST_STEPS, FAST_TRAIN
from flatopt.evaluate.cli import main
from flatopt.evaluate.contestants import Setting, baselines
from flatopt.evaluate.quality import Quality

pytest.importorskip("sklearn")

TASK = "tabular, breast cancer"


def fast(tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    options = ["--fast", "--seeds", "2", "--tasks", TASK, "--out", str(tmp_path), *arguments]
    main(["quality", *options])
    return json.loads((tmp_path / "results.json").read_text())


def test_a_cell_is_the_setting_that_is_best_on_meta_and_its_runs_on_test(tmp_path: Path) -> None:
    (cell,) = fast(tmp_path, "--optimizers", "SGD")
    benchmark = replace(next(one for one in BENCHMARKS if one.name == TASK), num_steps=FAST_STEPS, num_train=FAST_TRAIN)
    sgd = next(one for one in baselines() if one.name == "SGD momentum")
    grid = [Setting(lr, cosine) for cosine in (True, False) for lr in (0.1, 0.3)]
    runs = {setting: [results(benchmark, sgd, setting, seed) for seed in (0, 1)] for setting in grid}

    def on_meta(setting: Setting) -> tuple[float, float]:
        return sum(one["meta_score"] for one in runs[setting]), -sum(one["meta_loss"] for one in runs[setting])

    best = max(grid, key=on_meta)
    assert cell["setting"] == str(best)
    assert cell["score"] == [100 * one["test_score"] for one in runs[best]]
    assert cell["loss"] == [one["test_loss"] for one in runs[best]]
    tripled = best._replace(lr=0.3 if best.lr == 0.1 else 1.0)
    assert cell["score_at_triple"] == [100 * results(benchmark, sgd, tripled, seed)["test_score"] for seed in (0, 1)]


@pytest.mark.slow
def test_processes_side_by_side_give_what_one_gives(tmp_path: Path) -> None:
    arguments = ("--optimizers", "Adam + cosine", "SGD")
    alone, together = (
        fast(tmp_path / name, *arguments, "--jobs", jobs) for name, jobs in (("alone", "1"), ("together", "2"))
    )
    for one, two in zip(alone, together, strict=True):
        assert {key: value for key, value in one.items() if key != "seconds"} == {
            key: value for key, value in two.items() if key != "seconds"
        }


def test_a_half_filled_cache_shows_the_cells_that_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fast(tmp_path, "--cached-only")
    assert "nothing that was asked for is finished" in capsys.readouterr().err
    fast(tmp_path, "--optimizers", "Adam + cosine")
    cache = RunCache(tmp_path / "runs.sqlite3")
    table = Quality(fast=True, tasks=(TASK,), optimizers=("SGD momentum",))
    ((task,), (sgd,)) = table.benchmarks(), table.contestants()
    from flatopt.evaluate._training import run

    run(task, sgd, sgd.settings()[0], 0, cache)  # of a cell that is not finished
    monkeypatch.setattr("flatopt.evaluate._training.train_benchmark", lambda *_: pytest.fail("trained"))
    assert [record["optimizer"] for record in fast(tmp_path, "--cached-only")] == ["Adam + cosine"]


def test_new_weights_keep_the_runs_of_the_baselines(tmp_path: Path) -> None:
    from flatopt.pretrained import load_pretrained
    from flatopt.rules import OrthogonalizedMomentum

    rule, counts = OrthogonalizedMomentum(), []
    for index in (0, 1):
        weights = {name: weight + 0.01 * index for name, weight in rule.init_weights().items()}
        replace(load_pretrained("flat-v2"), rule=rule, weights=weights).save_pretrained(tmp_path / f"set-{index}")
        fast(tmp_path / "out", "--pretrained", str(tmp_path / f"set-{index}"), "--optimizers", "Adam", "FlatOpt")
        builds = [
            key["optimizer"].get("weights", "baseline") for key, _ in RunCache(tmp_path / "out/runs.sqlite3").items()
        ]
        assert len(set(builds)) == 2 + index
        counts.append(builds.count("baseline"))
    assert counts[0] == counts[1] > 0


def test_at_least_eighteen_tasks_of_all_kinds_and_eight_families() -> None:
    assert len(BENCHMARKS) >= 18 and len({one.name for one in BENCHMARKS}) == len(BENCHMARKS)
    assert {one.kind for one in BENCHMARKS} == {"classification", "regression", "reconstruction"}
    assert len(baselines()) >= 7 + hasattr(torch.optim, "Muon")


def test_what_learning_adds_is_the_paired_difference_to_the_untrained_rule() -> None:
    def record(task: str, name: str, score: list[float], loss: list[float], kind: str = "classification") -> Record:
        return {"task": task, "optimizer": name, "score": score, "loss": loss, "kind": kind, "tuned": False}

    cells = by_cell(
        [
            record("a", "FlatOpt", [81.0, 83.0], [0.5, 0.4]),
            record("a", "untrained core", [80.0, 80.0], [0.6, 0.6]),
            record("b", "FlatOpt", [60.0, 60.0], [1.0, 0.9]),
            record("b", "untrained core", [60.0, 58.0], [1.0, 1.0]),
            record("c", "FlatOpt", [-90.0, -90.0], [0.9, 0.9], kind="regression"),
            record("c", "untrained core", [-50.0, -50.0], [0.5, 0.5], kind="regression"),
        ]
    )
    ((told, *texts),) = quality._learning_table(cells, ["FlatOpt", "untrained core"]).rows
    expected = [
        confidence_interval(values).text() for values in ([0.5, 2.5], [2.0, 1.0], [-0.05, -0.15], [-0.15, -0.05])
    ]
    assert told == "told" and texts == expected


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_is_one_line_that_says_how_to_go_on(jobs: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flatopt", "eval", "quality", "--no-learned", "--tasks", "digits CNN"]
    process = subprocess.Popen(
        [*command, "--jobs", jobs, "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # Whoever starts the tests in the background of a script has them ignore SIGINT, and their children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs.sqlite3").exists() or not RunCache(tmp_path / "runs.sqlite3").items():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.count("\n") == 1 and "goes on from the finished runs" in printed
