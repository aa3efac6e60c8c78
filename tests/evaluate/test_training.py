from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from flatopt import FlatOpt
from flatopt.evaluate import models
from flatopt.evaluate._cache import RunCache
from flatopt.evaluate._training import (
    Benchmark,
    build_model,
    draw_batches,
    load_splits,
    measure,
    refresh_batch_norm,
    results,
    run,
    run_key,
    train,
    tuned,
)
from flatopt.evaluate.benchmarks import BENCHMARKS, META_BENCHMARKS
from flatopt.evaluate.contestants import (
    NO_AVERAGE,
    UNKNOWN,
    Contestant,
    Setting,
    default_name,
    learned_contestants,
    schedule_free,
)
from flatopt.tasks import Batch

pytest.importorskip("sklearn")

TOY = Benchmark(name="toy", source="digits", size=8, num_train=100, build=partial(models.mlp, width=4), num_steps=5)


def contestant(*lrs: float) -> Contestant:
    return Contestant(name="SGD", build=sgd, lrs=lrs, cosines=(True,))


def sgd(params: Iterable[torch.Tensor], lr: float, num_steps: int, seed: int) -> SGD:
    return SGD(params, lr)


def test_initial_weights_depend_on_the_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (build_model(models.cnn, 8, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_each_epoch_shows_each_example_once_and_the_cosine_ends_at_zero() -> None:
    data = Batch(torch.eye(6), torch.arange(6))
    seen = []

    class Spy(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs.argmax(1).tolist())
            return super().forward(inputs)

    model = build_model(lambda size: Spy(size, 6), 6, 0)
    optimizer = SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(0)
    scheduler = CosineAnnealingLR(optimizer, T_max=6)
    trained = train(model, optimizer, draw_batches(data, 2, 6, generator), scheduler=scheduler)
    assert len(trained.losses) == 6
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(6))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_training_stops_at_a_loss_that_is_not_finite_and_counts_as_broken() -> None:
    data = Batch(torch.full((4, 1), 1e30), torch.tensor([0, 1, 0, 1]))
    model = build_model(lambda size: nn.Linear(size, 2), 1, 0)
    trained = train(model, SGD(model.parameters(), 1e30), draw_batches(data, 4, 50, torch.Generator()))
    assert len(trained.losses) < 50
    assert not math.isfinite(trained.losses[-1])
    assert measure(model, data) == (math.inf, 0.0)


def test_training_images_are_a_subset_chosen_by_the_seed_and_test_images_are_fixed() -> None:
    one, two = load_splits(TOY, 0), load_splits(TOY, 1)
    assert len(one.train.targets) == 100
    assert not torch.equal(one.train.inputs, two.train.inputs)
    assert torch.equal(one.test.inputs, two.test.inputs)


def test_a_setting_is_chosen_on_the_meta_split_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {
        0.1: {"meta_score": 0.5, "meta_loss": 1.0, "test_score": 0.9},
        0.3: {"meta_score": 0.6, "meta_loss": 2.0, "test_score": 0.1},
        1.0: {"meta_score": 0.6, "meta_loss": 3.0, "test_score": 0.9},
    }
    monkeypatch.setattr(
        "flatopt.evaluate._training.run", lambda benchmark, who, setting, seed, cache: results[setting.lr]
    )
    assert tuned(TOY, contestant(*results), 2, RunCache(tmp_path / "runs.sqlite3")) == Setting(0.3, True)


@pytest.mark.parametrize(("best", "chosen"), [(1e-4, 1e-4), (10.0, 1e-1)])
def test_a_grid_goes_on_where_the_best_stands_at_its_edge_but_not_for_ever(
    best: float, chosen: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(benchmark: Benchmark, who: Contestant, setting: Setting, seed: int, cache: RunCache) -> dict[str, float]:
        return {"meta_score": -abs(math.log(setting.lr / best)), "meta_loss": 1.0}

    monkeypatch.setattr("flatopt.evaluate._training.run", score)
    grid, cache = contestant(1e-3, 3e-3), RunCache(tmp_path / "runs.sqlite3")
    assert tuned(TOY, replace(grid, extends=True), 1, cache).lr == chosen
    assert tuned(TOY, grid, 1, cache).lr == (1e-3 if best < 1e-3 else 3e-3)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(TOY, contestant(0.1), Setting(0.1), 0, RunCache(tmp_path / "runs.sqlite3"))
    assert run(TOY, contestant(0.1), Setting(0.1), 0, RunCache(tmp_path / "runs.sqlite3")) == first
    assert {f"{s}_{m}" for s in ("train", "meta", "test") for m in ("loss", "score")} < set(first)


def test_a_run_is_the_loop_that_anyone_would_write(tmp_path: Path) -> None:
    benchmark = replace(TOY, batch_size=50, num_steps=4, num_eval=60)
    record = run(benchmark, contestant(0.1), Setting(0.1, cosine=True), 3, RunCache(tmp_path / "runs.sqlite3"))
    train_split, meta, test = load_splits(benchmark, 3)
    model = build_model(benchmark.build, 8, 3)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for step in range(4):
        if step % 2 == 0:
            first, second = torch.randperm(100, generator=generator).split(50)
        chosen = (first, second)[step % 2]
        loss = nn.functional.cross_entropy(model(train_split.inputs[chosen]), train_split.targets[chosen])
        losses.append(loss.item())
        lr = 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        for param, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            param.data -= lr * grad
    logits = model(test.inputs[:60])
    assert record["initial_loss"] == pytest.approx(losses[0]) and record["curve"] == pytest.approx(losses, rel=1e-5)
    assert record["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, test.targets[:60]).item(), rel=1e-5)
    assert record["test_score"] == pytest.approx((logits.argmax(1) == test.targets[:60]).float().mean().item())
    assert record["test_curve"][-1][0] == 4
    assert record["meta_score"] == pytest.approx(
        (model(meta.inputs[:60]).argmax(1) == meta.targets[:60]).float().mean().item()
    )


def test_labels_are_wrong_in_training_alone_and_as_often_as_asked_for() -> None:
    clean = replace(TOY, num_train=None)
    noisy = load_splits(replace(clean, label_noise=0.1), 0)
    right = load_splits(clean, 0)
    assert torch.equal(noisy.train.inputs, right.train.inputs)
    assert (noisy.train.targets != right.train.targets).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(noisy.meta.targets, right.meta.targets) and torch.equal(noisy.test.targets, right.test.targets)


def test_runs_of_unknown_length_are_measured_at_the_average_or_at_the_last_parameters() -> None:
    benchmark = replace(TOY, num_steps=60, batch_size=50)
    contestants = {one.name: one for one in learned_contestants(default_name())}
    assert {name for name, one in contestants.items() if one.averages} == {
        "FlatOpt" + UNKNOWN,
        "untrained core" + UNKNOWN,
    }
    splits = load_splits(benchmark, 0)
    model = build_model(benchmark.build, 8, 0)
    optimizer = FlatOpt(model.parameters())
    for inputs, targets in draw_batches(splits.train, 50, 60, torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    last, _ = measure(model, splits.test)
    optimizer.eval()
    average, _ = measure(model, splits.test)
    losses = {
        name: results(benchmark, contestants["FlatOpt" + name], Setting(1.0), 0)["test_loss"]
        for name in (UNKNOWN, UNKNOWN + NO_AVERAGE)
    }
    assert losses == pytest.approx({UNKNOWN: average, UNKNOWN + NO_AVERAGE: last}, rel=1e-4)
    assert average != pytest.approx(last, rel=1e-2)


def test_a_schedule_free_model_is_measured_at_the_average_of_its_weights() -> None:
    pytest.importorskip("schedulefree")
    splits = load_splits(TOY, 0)
    model = build_model(TOY.build, 8, 0)
    optimizer = schedule_free(model.parameters(), 0.01, 20, 0)
    train(model, optimizer, draw_batches(splits.train, 50, 20, torch.Generator()))
    (state, weight) = next((optimizer.state[p], p) for p in model.parameters())
    averaged = weight.detach().clone()
    optimizer.train()  # back to y = (1 - beta) z + beta x
    assert torch.allclose(weight, 0.1 * state["z"] + 0.9 * averaged, atol=1e-6)
    assert not torch.allclose(weight, averaged, atol=1e-6)


def test_batch_norm_statistics_are_those_of_the_weights_that_are_measured() -> None:
    splits = load_splits(TOY, 0)
    model = build_model(partial(models.cnn, width=4, normalise=True), 8, 0)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_mean.fill_(5.0)  # type: ignore[union-attr]
    refresh_batch_norm(model, splits.train, num_batches=200, batch_size=1)
    expected = model[1](splits.train.inputs.unsqueeze(1)).mean((0, 2, 3))
    assert not model.training
    torch.testing.assert_close(norm.running_mean, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("benchmark", [*BENCHMARKS, *META_BENCHMARKS], ids=lambda benchmark: benchmark.name)
def test_every_benchmark_has_a_loss_and_every_parameter_a_gradient(benchmark: Benchmark) -> None:
    try:
        train_split, meta, test = load_splits(benchmark, 0)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model = build_model(benchmark.build, benchmark.size, 0)
    loss = benchmark.loss_fn(model(train_split.inputs[:8]), train_split.targets[:8])
    loss.backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
    assert benchmark.num_train is None or len(train_split.targets) == benchmark.num_train
    assert len(meta.targets) > 50 and len(test.targets) > 100


def test_the_decoder_does_not_see_what_it_predicts() -> None:
    model = build_model(models.decoder, 8, 0).eval()
    tokens = torch.arange(8).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 5] = 90
    one, two = model(tokens), model(changed)
    torch.testing.assert_close(one[0, :5], two[0, :5])
    assert not torch.allclose(one[0, 5:], two[0, 5:])


@pytest.mark.parametrize(
    "change",
    [
        {"build": partial(models.mlp, width=5)},
        {"build": partial(models.cnn, width=4)},
        {"build": partial(models.small_start, build=partial(models.mlp, width=4))},
        {"source": "digits in [0, 1]"},
        {"num_train": 99},
        {"batch_size": 32},
        {"num_steps": 6},
        {"label_noise": 0.1},
        {"num_eval": 50},
    ],
    ids=str,
)
def test_what_changes_a_benchmark_under_its_old_name_changes_the_key(change: dict[str, object]) -> None:
    changed = replace(TOY, **change)  # type: ignore[arg-type]
    assert run_key(changed, contestant(), Setting(0.1), 0) != run_key(TOY, contestant(), Setting(0.1), 0)


def test_a_new_name_keeps_the_key_and_every_setting_has_its_own() -> None:
    renamed = replace(TOY, name="another")
    assert run_key(renamed, contestant(), Setting(0.1), 0) == run_key(TOY, contestant(), Setting(0.1), 0)
    settings = [Setting(0.1), Setting(0.2), Setting(0.1, True), Setting(0.1, True, (("weight_decay", 1.0),))]
    keys = [str(run_key(TOY, contestant(), setting, seed)) for setting in settings for seed in (0, 1)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "build",
    [
        models.mlp,
        partial(models.mlp, depth=3, normalise=True),
        partial(models.cnn, depth=1),
        partial(models.cnn, depth=4, normalise=True),
        models.residual_net,
        models.transformer,
        partial(models.transformer, width=8, depth=1, normalise=False),
        models.lstm,
        partial(models.lstm, depth=2, normalise=True),
    ],
)
@pytest.mark.parametrize("size", [8, 14])
def test_every_model_gives_logits_and_every_parameter_a_gradient(build: partial[nn.Module], size: int) -> None:
    model = build_model(build, size, 0)
    images = torch.randn(5, size, size, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (5, 10)
    logits.logsumexp(1).sum().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
