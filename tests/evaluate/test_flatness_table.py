from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path

import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch import nn

from flatopt.evaluate import models
from flatopt.evaluate._cache import RunCache
from flatopt.evaluate._training import Benchmark, load_splits, train_benchmark
from flatopt.evaluate.contestants import Setting, baselines
from flatopt.evaluate.curvature import Curvature
from flatopt.evaluate.flatness_table import MIN_DRAWN, _draw, flatness_cell, flatter_than, rank_correlations

pytest.importorskip("sklearn")

TOY = Benchmark(name="toy", source="digits", size=8, num_train=60, build=partial(models.mlp, width=4), num_steps=30)


def test_a_cell_holds_the_eigenvalue_and_the_gap_of_the_model_at_the_end(tmp_path: Path) -> None:
    adam = baselines()[0]
    curvature = Curvature(num_examples=60, num_matvecs=60, gamma=10.0, num_probes=1)
    fixed = type(adam)(name="Adam", build=adam.build, lrs=(0.01,), cosines=(True,))
    cache = RunCache(tmp_path / "runs.sqlite3")
    cell = flatness_cell(TOY, fixed, cache, num_seeds=2, split="test", curvature=curvature)
    for seed in (0, 1):
        model = train_benchmark(TOY, fixed, Setting(0.01, True), seed).trained.model
        data = load_splits(TOY, seed).train
        params = dict(model.named_parameters())
        shapes = [param.shape for param in params.values()]

        def loss(vector: torch.Tensor, model=model, params=params, shapes=shapes, data=data) -> torch.Tensor:  # type: ignore[no-untyped-def]
            parts = vector.split([shape.numel() for shape in shapes])
            named = {name: part.view(shape) for name, part, shape in zip(params, parts, shapes, strict=True)}
            return nn.functional.cross_entropy(torch.func.functional_call(model, named, data.inputs), data.targets)

        start = torch.cat([param.detach().flatten() for param in params.values()])
        largest = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, start))[-1].item()
        grad = torch.autograd.functional.jacobian(loss, start)
        gap = loss(start + 0.05 * grad / grad.norm()) - loss(start)
        assert cell["top_eigenvalue"][seed] == pytest.approx(largest, rel=1e-3)
        assert cell["sam_gap"][seed] == pytest.approx(gap.item(), rel=1e-3)


def record(task: str, optimizer: str, eigenvalues: list[float], scores: list[float]) -> dict[str, object]:
    return {
        "task": task,
        "kind": "classification",
        "optimizer": optimizer,
        "score": scores,
        "top_eigenvalue": eigenvalues,
        "local_entropy": [-value for value in eigenvalues],
    }


def test_flatter_is_a_smaller_eigenvalue_and_a_larger_entropy() -> None:
    cells = {
        (task, name): record(task, name, values, [0.0, 0.0])
        for task, name, values in (
            ("x", "one", [1.0, 3.0]),
            ("x", "two", [2.0, 3.0]),
            ("y", "one", [5.0, 5.0]),
            ("y", "two", [4.0, 5.0]),
            ("z", "one", [1.0, 1.0]),
            ("z", "two", [math.nan, 5.0]),
            ("w", "one", [1.0, 1.0]),
        )
    }
    assert flatter_than(cells, "one", "two", "top_eigenvalue") == (1, 2)
    assert flatter_than(cells, "one", "two", "local_entropy") == (1, 2)


def test_a_run_without_an_eigenvalue_is_not_drawn_as_a_flat_one() -> None:
    figure = Figure()
    eigenvalues = {"one": [5.0, 7.0], "two": [math.nan, 4.0], "three": [-2.0, -1.0]}
    _draw(figure, [record("x", name, values, [90.0, math.nan]) for name, values in eigenvalues.items()])
    curvature, _ = figure.axes
    drawn = [list(line.get_xdata()) for line in curvature.lines]
    assert drawn[:2] == [[5.0, 7.0], [6.0]]
    assert math.isnan(drawn[2][0]) and drawn[2][1] == 4.0 and math.isnan(drawn[3][0])
    assert drawn[4] == [MIN_DRAWN, MIN_DRAWN]  # as flat as can be drawn
    assert "without 1 runs that have none" in curvature.get_xlabel()
    figure.savefig(io.BytesIO())


def test_rank_correlations_are_spearmans_over_all_runs_of_a_task() -> None:
    records = [
        record("x", "one", [1.0, 4.0], [90.0, 70.0]),
        record("x", "two", [2.0, math.nan], [95.0, 10.0]),
        record("x", "three", [9.0, 8.0], [60.0, 65.0]),
        record("y", "one", [1.0, 2.0], [5.0, 6.0]),
        record("y", "two", [3.0, 4.0], [7.0, 8.0]),
    ]
    expected = scipy.stats.spearmanr([1, 4, 2, 9, 8], [90, 70, 95, 60, 65]).statistic
    assert rank_correlations(records, "top_eigenvalue") == pytest.approx([expected, 1.0])
