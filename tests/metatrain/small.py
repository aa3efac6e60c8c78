"""Inner training small enough for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatopt.metatrain import FlatnessConfig, ObjectiveConfig, TaskConfig
from flatopt.metatrain.unroll import Unroll
from flatopt.rules import OrthogonalizedMomentum, UpdateRule, Weights
from flatopt.tasks import CNN, MLP, Images, Optimizee, TaskDistribution

DIGITS = Images(sources=(("digits", 1.0),))
RULE = OrthogonalizedMomentum(controller_hidden=4)
MODELS: dict[str, Optimizee] = {
    "linear": MLP(sizes=(64, 10)),
    "mlp": MLP(sizes=(64, 3, 10), activation="tanh"),
    "norm": MLP(sizes=(64, 3, 3, 10), norm="layer"),
    "cnn": CNN(channels=(2, 2), image_size=8, activation="tanh"),
}
WITH_FLATNESS = ObjectiveConfig(
    train_weight=0.5, flatness=FlatnessConfig(name="perturbation-gap", coefficient=0.3, signed=True)
)


def make_unroll(name: str = "mlp", *, rule: UpdateRule = RULE, task: Sequence[Any] = (), **changes: Any) -> Unroll:
    """Return inner training of a small model on digits; ``task`` are changed fields of its configuration."""
    fields = {"num_tasks": 3, "min_steps": 6, "max_steps": 24, "unknown_horizon_probability": 0.5, **dict(task)}
    defaults: dict[str, Any] = {
        "rule": rule,
        "distribution": TaskDistribution(
            model=MODELS[name], data=DIGITS, batch_size=6, label_noise_probability=0.5, label_noise_range=(0.1, 0.1)
        ),
        "task": TaskConfig(name=name, **fields),
        "objective": WITH_FLATNESS,
        "truncation_length": 3,
        "device": torch.device("cpu"),
    }
    return Unroll(**{**defaults, **changes})


def random_weights(rule: UpdateRule = RULE, seed: int = 0, std: float = 0.3) -> Weights:
    """Return weights whose output layers are not zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = rule.init_weights(generator)
    return {name: value + std * torch.randn(value.shape, generator=generator) for name, value in weights.items()}


def stack_weights(num_runs: int, **options: Any) -> Weights:
    """Return different weights for every run."""
    each = [random_weights(seed=seed, **options) for seed in range(num_runs)]
    return {name: torch.stack([weights[name] for weights in each]) for name in each[0]}


def assert_trees_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Check that two flat trees agree bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
