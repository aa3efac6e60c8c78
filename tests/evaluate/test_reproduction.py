from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from flatopt import LearnedRule
from flatopt.evaluate import models, reproduction
from flatopt.evaluate._cache import RunCache
from flatopt.evaluate._training import Benchmark, build_model, run
from flatopt.evaluate.cli import main
from flatopt.evaluate.contestants import Setting, baselines
from flatopt.evaluate.curvature import MEASURES, Curvature
from flatopt.evaluate.reproduction import (
    Pair,
    Reproduction,
    compare_pairs,
    load_sets,
    optimizees,
    pairs_of,
    selection_optimizees,
)
from flatopt.pretrained import load_folder, weights_sha256
from flatopt.rules import L2ODM, Adam, L2OScale, UpdateRule
from flatopt.tasks import Batch

pytest.importorskip("sklearn")


@pytest.mark.parametrize("count", [1, 3, 4])
def test_every_panel_of_the_minima_names_its_optimizee(count: int) -> None:
    from matplotlib.figure import Figure

    names = [f"problem {index}" for index in range(count)]
    measured = {"optimizer": "Adam", "log_top_eigenvalue": [1.0, 2.0], "accuracy": [0.5, 0.6]}
    figure = Figure()
    reproduction._draw_minima(figure, [{"optimizee": name} | measured for name in names], [])
    assert [axes.get_title() for axes in figure.axes if axes.axison] == names


TOY = Curvature(num_examples=20, num_matvecs=3, gamma=10.0, num_probes=1, num_lanczos=3)


def toy_optimizees(data: str) -> list[Benchmark]:
    build = partial(models.small_start, build=partial(models.mlp, width=4))
    shape = {"source": "digits in [0, 1]", "size": 8, "num_train": 100, "build": build}
    return [Benchmark(name=f"{name} {data}", num_steps=10, **shape) for name in ("one", "two")]  # type: ignore[arg-type]


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Save four sets of weights that nobody has trained, and make everything else small."""
    monkeypatch.setattr(reproduction, "optimizees", toy_optimizees)
    monkeypatch.setattr(reproduction, "selection_optimizees", lambda data: toy_optimizees(f"{data} to choose by"))
    monkeypatch.setattr(reproduction, "FAST_CURVATURE", TOY)
    rules: dict[str, UpdateRule] = {"dm": L2ODM(), "dm-a": L2ODM(), "scale": L2OScale(), "dm-b": L2ODM()}
    for seed, (name, rule) in enumerate(rules.items()):
        LearnedRule(rule, rule.init_weights(torch.Generator().manual_seed(seed))).save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in rules]


def test_missing_sets_are_all_named_in_one_error(tmp_path: Path) -> None:
    cache = RunCache(tmp_path / "runs.sqlite3")
    with pytest.raises(ValueError, match="no learned weights are called no-such-set, nor-this: there are .*--sets"):
        Reproduction(sets=("no-such-set", "flat-v2", "nor-this")).report(cache)
    assert not cache.items()


def test_the_first_set_of_a_rule_is_the_plain_one_of_all_others(sets: list[str]) -> None:
    dm, dm_a, _, dm_b = sets
    assert pairs_of(load_sets(sets)) == [Pair(dm, dm_a), Pair(dm, dm_b)]


def test_the_nine_sets_give_six_pairs() -> None:
    rules = {name: LearnedRule(Adam(lr=float(len(name))), {}) for name in reproduction.SETS}
    assert len(rules) == 9
    assert [name for name in reproduction.SETS if "-hessian" not in name and "-entropy" not in name] == [
        "l2o-dm",
        "rnnprop",
        "l2o-scale",
    ]


def record(optimizee: str, optimizer: str, accuracy: list[float], top_eigenvalue: list[float]) -> dict[str, object]:
    logs = [math.log(value) for value in top_eigenvalue]
    return {
        "optimizee": optimizee,
        "optimizer": optimizer,
        "accuracy": accuracy,
        "loss": [1 - value for value in accuracy],
        "top_eigenvalue": top_eigenvalue,
        "log_top_eigenvalue": logs,
    }


def test_differences_are_paired_by_seed_and_optimizee_and_then_averaged_over_optimizees() -> None:
    records = [
        record("x", "plain", [0.80, 0.60, 0.70], [4.0, 8.0, 2.0]),
        record("x", "flat", [0.82, 0.61, 0.75], [2.0, 4.0, 1.0]),
        record("y", "other", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
        record("y", "plain", [0.50, 0.90, 0.40], [1.0, 1.0, 1.0]),
        record("y", "flat", [0.54, 0.89, 0.43], [3.0, 3.0, 3.0]),
    ]
    found = {(row["optimizee"], row["measure"]): row for row in compare_pairs(records, [Pair("plain", "flat")])}
    assert found["x", "accuracy"]["differences"] == pytest.approx([0.02, 0.01, 0.05])
    assert found["x", "loss"]["differences"] == pytest.approx([-0.02, -0.01, -0.05])
    mean = found["mean", "accuracy"]
    assert mean["differences"] == pytest.approx([0.03, 0.0, 0.04])  # seed by seed
    expected = scipy.stats.ttest_rel([0.68, 0.75, 0.59], [0.65, 0.75, 0.55]).confidence_interval()
    assert (mean["low"], mean["high"]) == pytest.approx((expected.low, expected.high))
    assert mean["mean"] == pytest.approx(0.07 / 3)
    assert found["x", "log_top_eigenvalue"]["differences"] == pytest.approx([-math.log(2)] * 3)
    assert found["mean", "top_eigenvalue"]["differences"] == pytest.approx([0.0, -1.0, 0.5])
    assert (mean["plain"], mean["regularized"]) == ("plain", "flat")


def test_a_broken_run_leaves_no_interval() -> None:
    records = [record("x", "plain", [0.5, 0.5], [1.0, 1.0]), record("x", "flat", [0.5, math.nan], [1.0, 1.0])]
    accuracy = compare_pairs(records, [Pair("plain", "flat")])[0]
    assert math.isnan(accuracy["mean"]) and math.isnan(accuracy["low"])


def test_command_writes_tables_figures_and_goes_on_where_it_was(
    sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["reproduction", "--fast", "--sets", *sets, "--out", str(out)]
    main([*arguments, "--tasks", "two"])
    main(arguments)
    first = json.loads((out / "results.json").read_text())
    cells = [row for row in first if "lr" in row]
    assert len(cells) == 2 * (4 + 3)
    assert all(len(row["accuracy"]) == 2 for row in cells)
    for row in cells:
        for train_loss, loss, gap in zip(row["train_loss"], row["loss"], row["gap"], strict=True):
            assert gap == pytest.approx(loss - train_loss)
    assert len(first) - len(cells) == 2 * 4 * 3  # pairs, measures, two optimizees and their mean
    text = (out / "table.md").read_text(encoding="utf-8")
    assert text.count("## ") == 5 and "regularized less plain" in text
    for name in ("figure", "paired"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    def fail(*arguments: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as nothing_is_trained:
        nothing_is_trained.setattr("flatopt.evaluate._training.train_benchmark", fail)
        main(arguments)
    assert json.loads((out / "results.json").read_text()) == first
    main([*arguments, "--split", "meta", "--learned-only"])
    meta = [row for row in json.loads((out / "results.json").read_text()) if "lr" in row]
    assert len(meta) == 2 * 4
    assert {row["optimizee"] for row in meta} == {f"{name} fashion-mnist to choose by" for name in ("one", "two")}
    assert not {row["optimizee"] for row in meta} & {row["optimizee"] for row in cells}
    weights = weights_sha256(load_folder(sets[0]).weights)
    accuracies = {
        entry["seed"]: result["meta_score"]
        for entry, result in RunCache(out / "runs.sqlite3").items()
        if "curvature" in entry and entry["optimizer"].get("weights") == weights
    }
    assert [meta[0]["accuracy"][seed] for seed in (0, 1)] == [accuracies[0], accuracies[1]]
    assert "results on the meta split" in (out / "table.md").read_text(encoding="utf-8")


def test_unknown_tasks_are_refused(sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["reproduction", "--sets", *sets, "--tasks", "three", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert re.search("no optimizee has .*three.* in its name", capsys.readouterr().err)


def test_random_numbers_of_the_optimizer_follow_the_seed(sets: list[str]) -> None:
    contestant = Reproduction().entrants(load_sets(sets[2:3]))[1][0]
    states = []
    for seed in (0, 0, 1):
        param = nn.Parameter(torch.ones(3))
        optimizer = contestant.build([param], 1.0, 10, seed)
        param.grad = torch.ones(3)
        optimizer.step()
        states.append(optimizer.state[param]["log_lr"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_optimizees_have_the_published_numbers_of_parameters() -> None:
    counts = {
        problem.name: sum(p.numel() for p in build_model(problem.build, problem.size, 0).parameters())
        for problem in optimizees("mnist")
    }
    assert counts["ReLU MLP, MNIST"] == 15_910
    assert counts["deep sigmoid MLP, MNIST"] == 16_330
    assert counts["BatchNorm CNN, MNIST"] == 18_122 + 2 * (16 + 32)  # the published 18,122 leave out BatchNorm's own
    assert sum(p.numel() for p in models.published_plain_cnn(28, stride=1).parameters()) == 64_402


def test_what_is_chosen_by_is_neither_what_is_reported_nor_what_meta_training_saw() -> None:
    def layers(problem: Benchmark) -> str:
        return f"{problem.source} {problem.size} {build_model(problem.build, problem.size, 0)}"

    seen = replace(optimizees("mnist")[0], build=partial(models.mlp, width=20, activation=nn.Sigmoid))
    reported = {layers(problem) for problem in optimizees("mnist")}
    chosen_by = {layers(problem) for problem in selection_optimizees("mnist")}
    assert len(reported) == 6 and len(chosen_by) == 5
    assert not reported & chosen_by and layers(seen) not in reported | chosen_by


@pytest.mark.parametrize(
    "problem",
    [*optimizees("fashion-mnist"), *selection_optimizees("fashion-mnist")],
    ids=lambda problem: problem.name,
)
def test_optimizees_start_small_and_every_parameter_has_a_gradient(problem: Benchmark) -> None:
    model = build_model(problem.build, problem.size, 0)
    weights = torch.cat(
        [p.flatten() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters()]
    )
    assert weights.std().item() == pytest.approx(0.01, rel=0.1)
    logits = model(torch.rand(4, problem.size, problem.size, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, 10) and logits.min() < 0  # linear: the published nets clip them at zero
    logits.logsumexp(1).sum().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


def test_local_entropy_is_that_of_the_explicit_hessian() -> None:
    model = build_model(lambda size: nn.Linear(size, 3), 2, 0).double()
    data = Batch(
        torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    )
    curvature = Curvature(num_examples=30, num_matvecs=9, gamma=10.0, num_probes=200, num_lanczos=9)
    measured = curvature(model, data, 0)
    assert set(measured) == set(MEASURES)
    shapes = [param.shape for param in model.parameters()]
    start = torch.cat([param.detach().flatten() for param in model.parameters()])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        weight, bias = (part.view(shape) for part, shape in zip(vector.split([6, 3]), shapes, strict=True))
        return F.cross_entropy(F.linear(data.inputs, weight, bias), data.targets)

    hessian = torch.autograd.functional.hessian(loss, start)
    grad = torch.autograd.functional.jacobian(loss, start)
    shifted = hessian + 10 * torch.eye(9, dtype=torch.float64)
    log_det = torch.linalg.slogdet(shifted / 10)[1]
    expected = -loss(start) + 0.5 * grad @ torch.linalg.solve(shifted, grad) - 0.5 * log_det
    assert measured["local_entropy"] == pytest.approx(expected.item(), abs=6e-3)
    assert measured["top_eigenvalue"] == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)


def test_a_diverged_run_has_no_curvature(tmp_path: Path) -> None:
    problem = toy_optimizees("")[0]
    contestant = baselines()[3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flatopt.evaluate._training.measure", lambda *_: (math.inf, 0.0))
        result = run(problem, contestant, Setting(0.1), 0, RunCache(tmp_path / "runs.sqlite3"), TOY)
    assert all(math.isnan(result[key]) for key in MEASURES)
    assert math.isnan(reproduction.COLUMNS["gap"].value(result, "test"))
