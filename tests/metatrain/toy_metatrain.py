"""Noisy quadratics trained by gradient descent with a learned step size: inner training without the package's own.

Run as a program, it trains on them with the trainer: ``python toy_metatrain.py OUT [resume] [key=value ...]``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from flatopt.metatrain import MetaTrainConfig, TaskConfig, TrainingInterrupted, train
from flatopt.metatrain.estimators import GradientEstimator, Inner, TruncatedBackprop
from flatopt.rules import RULES, UpdateRule

NUM_PROBLEMS, NUM_COORDINATES = 3, 2


@dataclass(frozen=True, kw_only=True)
class StepSize(UpdateRule):
    """Gradient descent with a learned step size: ``exp(z)``, and a learned start."""

    name: ClassVar[str] = "toy"
    initial_step: float = 0.05

    def init_weights(self, generator=None):
        # Names out of alphabetical order, one of them nested: a checkpoint must keep both.
        start = 0.1 * torch.randn(NUM_COORDINATES, generator=generator)
        return {"start": start, "log/step": torch.tensor(self.initial_step).log()}

    def init_state(self, weights, param, generator=None):
        return {}

    def observe(self, weights, state, grad, param, context):
        return {}, []

    def propose(self, weights, state, grad, param, control, context):
        return {}, -weights["log/step"].exp() * grad

    def step_size(self, weights, control, context):
        return weights["log/step"].exp()


@dataclass(frozen=True, kw_only=True)
class Quadratics(Inner):
    """``f(x) = sum h (x - noise)^2 / 2``; problem ``i`` starts again every ``horizon + i`` truncations."""

    length: int = 4
    horizon: int = 3

    def reset(self, weights, generator, num_steps=None):
        x = weights["start"].expand(NUM_PROBLEMS, NUM_COORDINATES)
        h = torch.rand(x.shape, generator=generator, dtype=x.dtype) + 0.5
        return {"x": x + 1.0, "h": h, "age": torch.zeros(NUM_PROBLEMS, dtype=torch.int64)}

    def refresh(self, weights, state, generator, num_steps=None):
        fresh = self.reset(weights, generator)
        done = state["age"] >= self.horizon + torch.arange(NUM_PROBLEMS)
        return {
            key: torch.where(done if value.dim() == 1 else done[:, None], fresh[key], value)
            for key, value in state.items()
        }

    def draw(self, state, generator):
        shape = (self.length, NUM_PROBLEMS, NUM_COORDINATES)
        return {"noise": 0.1 * torch.randn(shape, generator=generator, dtype=state["x"].dtype)}

    def unroll(self, weights, state, draws):
        x, h, losses = state["x"], state["h"], []
        for noise in draws["noise"]:
            x = x - weights["log/step"].exp() * h * (x - noise)
            losses.append((0.5 * h * x.square()).sum(1).mean())
        return torch.stack(losses).mean(), {"x": x, "h": h, "age": state["age"] + 1}, {}


@dataclass(frozen=True, kw_only=True)
class Slow(GradientEstimator):
    """Another estimator, slowed down: time for a signal to arrive."""

    estimator: GradientEstimator
    seconds: float

    def init(self, weights, generator, num_steps=None):
        return self.estimator.init(weights, generator, num_steps)

    def estimate(self, weights, state, generator, num_steps=None):
        time.sleep(self.seconds)
        return self.estimator.estimate(weights, state, generator, num_steps)


def toy_config(**changes) -> MetaTrainConfig:
    RULES["toy"] = StepSize
    defaults = {
        "recipe": "toy",
        "rule": "toy",
        "tasks": (TaskConfig(name="quadratics"),),
        "num_updates": 30,
        "meta_lr": 0.05,
        "warmup_updates": 3,
        "ema_decay": 0.9,
        "checkpoint_every": 7,
        "log_every": 1,
    }
    return MetaTrainConfig(**{**defaults, **changes})


def toy_estimator(seconds: float = 0.0) -> GradientEstimator:
    return Slow(estimator=TruncatedBackprop(inner=Quadratics()), seconds=seconds)


if __name__ == "__main__":
    out, *rest = sys.argv[1:]
    resume = "resume" in rest
    config = toy_config().override([one for one in rest if "=" in one])
    try:
        train(config, Path(out), estimator=toy_estimator(0.03), resume=resume)
    except TrainingInterrupted as interruption:
        sys.exit(128 + interruption.signal_number)
