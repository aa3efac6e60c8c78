"""The optimizer of the weights themselves, Adam, and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import MetaTrainConfig


def build_meta_optimizer(
    weights: dict[str, Tensor], state: dict[str, dict[str, Tensor]] | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of the weights, going on from ``state`` if given; its learning rate is set at each step."""
    optimizer = torch.optim.Adam(list(weights.values()))
    if state:
        states = {index: state[key] for index, key in enumerate(weights) if state.get(key)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the state of an optimizer by weight and key; the tensors are its own."""
    return {name: dict(optimizer.state.get(weight, {})) for name, weight in weights.items()}


def learning_rate(config: MetaTrainConfig, update: int) -> float:
    """Return the meta-learning rate of update ``update`` (from 0): linear warm-up, then a cosine.

    Example:
        >>> from flatopt.metatrain.config import TaskConfig
        >>> config = MetaTrainConfig(
        ...     recipe="", rule="adam", tasks=(TaskConfig(name="mlp"),), num_updates=6, warmup_updates=2, meta_lr=1.0
        ... )
        >>> [round(learning_rate(config, update), 3) for update in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if update < config.warmup_updates:
        return config.meta_lr * (update + 1) / config.warmup_updates
    length = config.schedule_updates or config.num_updates
    fraction = min(1.0, (update - config.warmup_updates) / max(1, length - config.warmup_updates))
    final = config.meta_lr_final_fraction
    return config.meta_lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fraction)))
