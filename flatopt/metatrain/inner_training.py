"""Inner training of all families of a configuration: what the estimators and validation loop over."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from ..rules import Weights
from ..tasks import TaskDistribution
from .config import MetaTrainConfig, TaskConfig
from .families import FAMILIES, check_families
from .inner import Inner
from .runs import Draws, Runs, StepLosses, replace_runs, share_weights
from .unroll import Mode, Unroll, can_compile

Value = TypeVar("Value", Tensor, float)


@dataclass(frozen=True, kw_only=True)
class Families(Inner):
    """Runs of one or several families; as what backpropagation differentiates, all at the same weights.

    A state is a dict of :class:`Runs` by family, draws a dict of :class:`Draws`.
    """

    unrolls: Sequence[Unroll]

    @classmethod
    def from_config(cls, config: MetaTrainConfig, device: torch.device) -> Families:
        """Return the families that a configuration names; ``ValueError`` if one is unknown."""
        check_families(config)
        mode: Mode = "compiled" if config.compile and can_compile(device) else "recorded"
        if config.compile and mode == "recorded":
            warnings.warn("no C++ compiler found: the inner step is recorded but not compiled", stacklevel=2)
        return cls(
            unrolls=[
                Unroll(
                    rule=config.build_rule(),
                    distribution=_distribution(task),
                    task=task,
                    objective=config.objective,
                    truncation_length=config.truncation_length(task),
                    device=device,
                    mode=mode,
                    second_derivatives=config.estimator.second_derivatives,
                )
                for task in config.tasks
            ]
        )

    @property
    def names(self) -> list[str]:
        """Names of the families."""
        return [unroll.task.name for unroll in self.unrolls]

    def select(self, names: Sequence[str]) -> Families:
        """Return some of the families, in the given order."""
        unrolls = dict(zip(self.names, self.unrolls, strict=True))
        return replace(self, unrolls=[unrolls[name] for name in names])

    def shares(self) -> dict[str, float]:
        """Return what each family counts in a mean: its weight over the sum of all."""
        total = sum(unroll.task.weight for unroll in self.unrolls)
        return {unroll.task.name: unroll.task.weight / total for unroll in self.unrolls}

    def mean(self, values: Mapping[str, Value]) -> Value:
        """Return the mean of values by family, each by its share."""
        parts = [share * values[name] for name, share in self.shares().items()]
        return reduce(operator.add, parts)

    def reset(self, weights: Weights, generator: torch.Generator, num_steps: int | None = None) -> dict[str, Runs]:
        """Return fresh runs of every family."""
        return {
            unroll.task.name: unroll.start(
                share_weights(weights, unroll.task.num_tasks), unroll.task.num_tasks, 1, generator, num_steps
            )
            for unroll in self.unrolls
        }

    def refresh(
        self, weights: Weights, state: dict[str, Runs], generator: torch.Generator, num_steps: int | None = None
    ) -> dict[str, Runs]:
        """Start the runs anew that have reached their horizon."""
        fresh = {}
        for unroll in self.unrolls:
            weights_N = share_weights(weights, unroll.task.num_tasks)
            fresh[unroll.task.name], _ = restart(unroll, weights_N, state[unroll.task.name], 1, generator, num_steps)
        return fresh

    def draw(self, state: dict[str, Runs], generator: torch.Generator) -> dict[str, Draws]:
        """Draw the batches and the noise of every family."""
        return {unroll.task.name: unroll.draw(state[unroll.task.name], 1, generator) for unroll in self.unrolls}

    def unroll(
        self, weights: Weights, state: dict[str, Runs], draws: dict[str, Draws]
    ) -> tuple[Tensor, dict[str, Runs], dict[str, float]]:
        """Return the mean objective, families by their weights, the state afterwards, and the mean of each loss."""
        objective: dict[str, Tensor] = {}
        after: dict[str, Runs] = {}
        metrics: dict[str, float] = {}
        for unroll in self.unrolls:
            name, weights_N = unroll.task.name, share_weights(weights, unroll.task.num_tasks)
            after[name], losses = unroll.unroll(weights_N, state[name], draws[name], 1)
            objective[name] = losses.objective.mean()
            metrics.update(mean_losses(losses, name))
        return self.mean(objective), after, metrics


def restart(
    unroll: Unroll,
    weights_N: Weights,
    runs: Runs,
    copies: int,
    generator: torch.Generator,
    num_steps: int | None = None,
) -> tuple[Runs, Tensor]:
    """Start the runs anew that have reached their horizon; return all, and the indices of the new problems, int64."""
    num_problems = len(runs.step) // copies
    done = (runs.step[:num_problems] >= runs.horizon[:num_problems]).nonzero()[:, 0]
    if len(done) == 0:
        return runs, done
    where = torch.cat([done + copy * num_problems for copy in range(copies)])
    weights = {name: weight[where] for name, weight in weights_N.items()}
    return replace_runs(runs, unroll.start(weights, len(done), copies, generator, num_steps), where), done


def mean_losses(losses: StepLosses, name: str) -> dict[str, float]:
    """Return the means of all but the objective, for the log."""
    named = zip(("train", "meta", "flatness"), losses[1:], strict=True)
    return {f"{name}/{key}": float(value.detach().mean()) for key, value in named}


def _distribution(task: TaskConfig) -> TaskDistribution:
    """Return the problems of a family, with the training-set size and the random scaling that are asked for."""
    distribution = FAMILIES[task.name]
    if task.num_train is not None:
        distribution = replace(distribution, num_train_range=(task.num_train, task.num_train))
    if task.random_scaling > 0:
        bounds = (math.exp(-task.random_scaling), math.exp(task.random_scaling))
        distribution = replace(distribution, reparametrization_range=bounds)
    return distribution
