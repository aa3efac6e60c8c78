"""Inner runs as the estimators take them: built from a configuration, and as what backpropagation differentiates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...rules import UpdateRule, Weights
from ..config import MetaTrainConfig
from ..families import FAMILIES
from ..unroll import Mode, Unroll, can_compile, flatten_tree, replace_runs, restore_draws, restore_runs
from .truncated_backprop import Draws, Inner, InnerState


def build_unrolls(config: MetaTrainConfig, rule: UpdateRule, device: torch.device) -> list[Unroll]:
    """Return the inner training of every family that a configuration names.

    Raises:
        ValueError: for an unknown family; the message lists the valid ones.
    """
    for task in config.tasks:
        if task.name not in FAMILIES:
            raise ValueError(f"unknown task {task.name!r}: valid are {', '.join(FAMILIES)}")
    mode: Mode = "compiled" if config.compile and can_compile(device) else "recorded"
    if config.compile and mode == "recorded":
        warnings.warn("no C++ compiler found: the inner step is recorded but not compiled", stacklevel=2)
    return [
        Unroll(
            rule=rule,
            distribution=FAMILIES[task.name](),
            task=task,
            objective=config.objective,
            truncation_length=config.estimator.truncation_length,
            device=device,
            mode=mode,
            second_derivatives=config.estimator.second_derivatives,
        )
        for task in config.tasks
    ]


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
            runs = unroll.start(_repeat(weights, num_tasks), num_tasks, 1, generator)
            state.update(flatten_tree(runs, unroll.task.name))
        return state

    def refresh(self, weights: Weights, state: InnerState, generator: torch.Generator) -> InnerState:
        """Start the runs anew that have reached their horizon."""
        state = dict(state)
        for unroll in self.unrolls:
            runs = restore_runs(state, unroll.task.name)
            done = (runs.step >= runs.horizon).nonzero()[:, 0]
            if len(done) > 0:
                fresh = unroll.start(_repeat(weights, len(done)), len(done), 1, generator)
                state.update(flatten_tree(replace_runs(runs, fresh, done), unroll.task.name))
        return state

    def draw(self, state: InnerState, generator: torch.Generator) -> Draws:
        """Draw the batches and the noise of every family."""
        draws: Draws = {}
        for unroll in self.unrolls:
            runs = restore_runs(state, unroll.task.name)
            draws.update(flatten_tree(unroll.draw(runs, 1, generator), unroll.task.name))
        return draws

    def unroll(self, weights: Weights, state: InnerState, draws: Draws) -> tuple[Tensor, InnerState]:
        """Return the mean objective, families by their weights, and the state afterwards."""
        total_weight = sum(unroll.task.weight for unroll in self.unrolls)
        loss = next(iter(weights.values())).new_zeros(())
        new_state: InnerState = {}
        for unroll in self.unrolls:
            name = unroll.task.name
            weights_N = _repeat(weights, unroll.task.num_tasks)
            runs, losses = unroll.unroll(weights_N, restore_runs(state, name), restore_draws(draws, name), 1)
            loss = loss + unroll.task.weight / total_weight * losses.objective.mean()
            new_state.update(flatten_tree(runs, name))
        return loss, new_state


def _repeat(weights: Weights, num_runs: int) -> Weights:
    """Return the same weights for every run."""
    return {name: weight.expand(num_runs, *weight.shape) for name, weight in weights.items()}
