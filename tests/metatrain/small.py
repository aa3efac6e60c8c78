"""Inner training small enough for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flatopt.metatrain import FlatnessConfig, ObjectiveConfig, TaskConfig
from flatopt.metatrain.unroll import Unroll
from flatopt.rules import OrthogonalizedMomentum, UpdateRule, Weights
from flatopt.tasks import CNN, MLP, Images, Optimizee, TaskDistribution

DIGITS = Images(sources=(("digits", 1.0),))
RULE = OrthogonalizedMomentum()
MODELS: dict[str, Optimizee] = {
    "linear": MLP(sizes=(64, 10)),
    "mlp": MLP(sizes=(64, 3, 10), activation="tanh"),
    "norm": MLP(sizes=(64, 3, 3, 10), norm="layer"),
    "cnn": CNN(channels=(2, 2), image_size=8),
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


def random_weights(rule: UpdateRule = RULE, seed: int = 0, std: float = 0.2) -> Weights:
    """Return weights whose output layers are not zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = rule.init_weights(generator)
    return {name: value + std * torch.randn(value.shape, generator=generator) for name, value in weights.items()}


def stack_weights(num_runs: int, **options: Any) -> Weights:
    """Return different weights for every run."""
    each = [random_weights(seed=seed, **options) for seed in range(num_runs)]
    return {name: torch.stack([weights[name] for weights in each]) for name in each[0]}


def by_path(tree: Any) -> dict[str, Tensor]:
    """Return the tensors of a tree by names such as ``.states['layers.0.weight']['exp_avg']``."""
    return {pytree.keystr(path): value for path, value in pytree.tree_flatten_with_path(tree)[0]}


def assert_trees_equal(one: Any, other: Any) -> None:
    """Check that two trees agree bit for bit."""
    first, second = by_path(one), by_path(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
