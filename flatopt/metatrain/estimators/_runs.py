"""Inner runs as the estimators take them: built from a configuration, and as what backpropagation differentiates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...rules import UpdateRule, Weights
from ...tasks import TaskDistribution
from ..config import MetaTrainConfig, TaskConfig
from ..families import FAMILIES, check_families
from ..unroll import Mode, StepLosses, Unroll, can_compile, flatten_tree, replace_runs, restore_draws, restore_runs
from ._estimator import stage_steps
from .truncated_backprop import Draws, Inner, InnerState


def build_unrolls(config: MetaTrainConfig, rule: UpdateRule, device: torch.device) -> list[Unroll]:
    """Return the inner training of every family that a configuration names.

    Raises:
        ValueError: for an unknown family; the message lists the valid ones.
    """
    check_families(task.name for task in config.tasks)
    mode: Mode = "compiled" if config.compile and can_compile(device) else "recorded"
    if config.compile and mode == "recorded":
        warnings.warn("no C++ compiler found: the inner step is recorded but not compiled", stacklevel=2)
    return [
        Unroll(
            rule=rule,
            distribution=_distribution(task),
            task=_first_stage(task, config.curriculum.stages),
            objective=config.objective,
            truncation_length=task.truncation_length or config.estimator.truncation_length,
            device=device,
            mode=mode,
            second_derivatives=config.estimator.second_derivatives,
        )
        for task in config.tasks
    ]


def _distribution(task: TaskConfig) -> TaskDistribution:
    """Return the problems of a family, with the training-set size and the random scaling that are asked for."""
    distribution = FAMILIES[task.name]
    if task.num_train is not None:
        distribution = replace(distribution, num_train_range=(task.num_train, task.num_train))
    if task.random_scaling > 0:
        bounds = (math.exp(-task.random_scaling), math.exp(task.random_scaling))
        distribution = replace(distribution, reparametrization_range=bounds, reparametrization="coordinate")
    return distribution


def _first_stage(task: TaskConfig, stages: Sequence[int]) -> TaskConfig:
    """Return the task with the horizon of the first stage of a curriculum, where there is one."""
    return replace(task, min_steps=stages[0], max_steps=stages[0]) if stages else task


@dataclass(frozen=True, kw_only=True)
class InnerRuns(Inner):
    """Runs of one or several families, all at the same weights.

    Args:
        unrolls: one per family of problems.
    """

    unrolls: Sequence[Unroll]

    def reset(self, weights: Weights, generator: torch.Generator) -> InnerState:
        """Return fresh runs of every family."""
        state: InnerState = {}
        for unroll in self.unrolls:
            num_tasks = unroll.task.num_tasks
            runs = unroll.start(repeat(weights, num_tasks), num_tasks, 1, generator)
            state.update(flatten_tree(runs, unroll.task.name))
        return state

    def refresh(self, weights: Weights, state: InnerState, generator: torch.Generator) -> InnerState:
        """Start the runs anew that have reached their horizon."""
        state = dict(state)
        for unroll in self.unrolls:
            runs = restore_runs(state, unroll.task.name)
            done = (runs.step >= runs.horizon).nonzero()[:, 0]
            if len(done) > 0:
                fresh = unroll.start(repeat(weights, len(done)), len(done), 1, generator, stage_steps(state))
                state.update(flatten_tree(replace_runs(runs, fresh, done), unroll.task.name))
        return state

    def draw(self, state: InnerState, generator: torch.Generator) -> Draws:
        """Draw the batches and the noise of every family."""
        draws: Draws = {}
        for unroll in self.unrolls:
            runs = restore_runs(state, unroll.task.name)
            draws.update(flatten_tree(unroll.draw(runs, 1, generator), unroll.task.name))
        return draws

    def unroll(self, weights: Weights, state: InnerState, draws: Draws) -> tuple[Tensor, InnerState, dict[str, float]]:
        """Return the mean objective, families by their weights, the state afterwards, and the mean of each loss."""
        total_weight = sum(unroll.task.weight for unroll in self.unrolls)
        loss = next(iter(weights.values())).new_zeros(())
        new_state = dict(state)
        metrics: dict[str, float] = {}
        for unroll in self.unrolls:
            name = unroll.task.name
            weights_N = repeat(weights, unroll.task.num_tasks)
            runs, losses = unroll.unroll(weights_N, restore_runs(state, name), restore_draws(draws, name), 1)
            loss = loss + unroll.task.weight / total_weight * losses.objective.mean()
            new_state.update(flatten_tree(runs, name))
            metrics.update(mean_losses(losses, name))
        return loss, new_state, metrics


def mean_losses(losses: StepLosses, name: str) -> dict[str, float]:
    """Return the means of all but the objective, for the log."""
    named = zip(("train", "meta", "flatness"), losses[1:], strict=True)
    return {f"{name}/{key}": float(value.detach().mean()) for key, value in named}


def repeat(weights: Weights, num_runs: int) -> Weights:
    """Return the same weights for every run."""
    return {name: weight.expand(num_runs, *weight.shape) for name, weight in weights.items()}
