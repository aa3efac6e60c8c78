from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from flatopt.evaluate import models
from flatopt.evaluate._report import RunCache
from flatopt.evaluate._training import Benchmark, build_model, load_splits, measure, run, train, tuned_lr
from flatopt.evaluate.baselines import Contestant
from flatopt.tasks import Batch

pytest.importorskip("sklearn")

TOY = Benchmark(name="toy", source="digits", size=8, num_train=100, build=partial(models.mlp, width=4), num_steps=5)


def contestant(*lrs: float) -> Contestant:
    return Contestant(name="SGD", build=lambda params, lr, *_: SGD(params, lr), lrs=lrs, cosine=True)


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
    trained = train(model, optimizer, data, batch_size=2, num_steps=6, generator=generator, cosine=True)
    assert len(trained.losses) == 6
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(6))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_training_stops_at_a_loss_that_is_not_finite_and_counts_as_broken() -> None:
    data = Batch(torch.full((4, 1), 1e30), torch.tensor([0, 1, 0, 1]))
    model = build_model(lambda size: nn.Linear(size, 2), 1, 0)
    trained = train(model, SGD(model.parameters(), 1e30), data, batch_size=4, num_steps=50, generator=torch.Generator())
    assert len(trained.losses) < 50
    assert not math.isfinite(trained.losses[-1])
    assert measure(model, data) == (math.inf, 0.0)


def test_training_images_are_a_subset_chosen_by_the_seed_and_test_images_are_fixed() -> None:
    one, two = load_splits(TOY, 0), load_splits(TOY, 1)
    assert len(one.train.targets) == 100
    assert not torch.equal(one.train.inputs, two.train.inputs)
    assert torch.equal(one.test.inputs, two.test.inputs)


def test_learning_rate_is_chosen_on_the_meta_split_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {
        0.1: {"meta_accuracy": 0.5, "meta_loss": 1.0, "test_accuracy": 0.9},
        0.2: {"meta_accuracy": 0.6, "meta_loss": 2.0, "test_accuracy": 0.1},
        0.3: {"meta_accuracy": 0.6, "meta_loss": 3.0, "test_accuracy": 0.9},
    }
    monkeypatch.setattr("flatopt.evaluate._training.run", lambda benchmark, who, lr, seed, cache: results[lr])
    assert tuned_lr(TOY, contestant(*results), 2, RunCache(tmp_path / "runs.jsonl")) == 0.2


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(TOY, contestant(0.1), 0.1, 0, RunCache(tmp_path / "runs.jsonl"))
    assert run(TOY, contestant(0.1), 0.1, 0, RunCache(tmp_path / "runs.jsonl")) == first  # seconds included
    assert set(first) == {"seconds"} | {f"{s}_{m}" for s in ("train", "meta", "test") for m in ("loss", "accuracy")}


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
