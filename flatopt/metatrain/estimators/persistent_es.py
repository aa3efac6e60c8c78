r"""Persistent evolution strategies, and truncated ones as a control.

Each problem is run twice, at weights :math:`w \pm \epsilon_{i,k}` with :math:`\epsilon \sim N(0, \sigma^2)` drawn anew
for every truncation :math:`k`.  With the losses :math:`L^\pm_{i,k}` of the truncation and the perturbations summed
since the run began,

.. math::
    \hat g_k = \frac{1}{P} \sum_i \frac{\xi_{i,k}}{2 \sigma^2} \big( L^+_{i,k} - L^-_{i,k} \big), \qquad
    \xi_{i,k} = \sum_{j \le k} \epsilon_{i,j}.

Unlike truncated backpropagation this counts what earlier steps did to the current state: it is unbiased for the
smoothed objective.  ``persistent=False`` uses :math:`\epsilon_{i,k}` in place of the sum: truncated ES, biased.

The signal-to-noise ratio of the mean of the pairs :math:`\hat g = \frac{1}{P} \sum_i g_i` is logged as ``NAME/snr``:

.. math::
    \frac{\|\hat g\|^2}{S/P} - 1, \qquad S = \frac{1}{P-1} \sum_i \|g_i - \hat g\|^2,

which is 0 in the mean where there is nothing but noise, since :math:`E \|\hat g\|^2 = \|E \hat g\|^2 + E S/P`.  ``snr``
is that of the whole update: families with the squares of their shares.

Reference: Vicol, Metz and Sohl-Dickstein, *Unbiased gradient estimation in unrolled computation graphs with persistent
evolution strategies*, 2021, https://arxiv.org/abs/2112.13835

Legend: ``P`` pairs, ``D`` scalars of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...rules import UpdateRule, Weights
from ..config import MetaTrainConfig
from ..unroll import Runs, Unroll, flatten_tree, merge_trees, replace_runs, restore_runs
from ._estimator import EstimatorState, GradientEstimator, MetaGradient, Track, stage_steps, untracked
from ._runs import build_unrolls, mean_losses


@dataclass(frozen=True, kw_only=True)
class PersistentES(GradientEstimator):
    """Antithetic evolution strategy over truncations of runs that begin at different times.

    Args:
        unrolls: one per family of problems.
        std: standard deviation of the perturbations.
        families_per_update: how many families, in turn, one update runs; all by default.
        persistent: sum the perturbations over a run (unbiased), or not (truncated ES).
        track: shows which family is being prepared.
    """

    unrolls: Sequence[Unroll]
    std: float
    families_per_update: int | None = None
    persistent: bool = True
    track: Track = untracked

    @classmethod
    def from_config(
        cls, config: MetaTrainConfig, rule: UpdateRule, device: torch.device, track: Track = untracked
    ) -> PersistentES:
        """Return the estimator of a configuration.

        Raises:
            ValueError: for an unknown family; the message lists the valid ones.
        """
        return cls(
            unrolls=build_unrolls(config, rule, device),
            std=config.estimator.std,
            families_per_update=config.estimator.families_per_update,
            persistent=config.estimator.name == "persistent-es",
            track=track,
        )

    def prepare(self, weights: Weights) -> None:
        """Record, and compile if asked for, the step of every family."""
        unrolls = {unroll.task.name: unroll for unroll in self.unrolls}
        for name in self.track(list(unrolls), "preparing"):
            num_pairs = unrolls[name].task.num_tasks
            unrolls[name].prepare(_repeat(weights, 2 * num_pairs), num_pairs, 2)

    def init(self, weights: Weights, generator: torch.Generator) -> EstimatorState:
        """Start all runs, each already somewhere between its start and its horizon, trained there by ``weights``."""
        state: EstimatorState = {"turn": torch.zeros((), dtype=torch.int64)}
        unrolls = {unroll.task.name: unroll for unroll in self.unrolls}
        for family in self.track(list(unrolls), "first inner runs"):
            unroll = unrolls[family]
            num_pairs = unroll.task.num_tasks
            repeated = _repeat(weights, 2 * num_pairs)
            runs = unroll.start(repeated, num_pairs, 2, generator)
            start = torch.rand(num_pairs, generator=generator).repeat(2).to(runs.horizon)
            start = (start * runs.horizon / unroll.truncation_length).floor() * unroll.truncation_length
            while bool((runs.step < start).any()):
                advanced, _ = unroll.run(repeated, runs, 2, generator)
                runs = merge_trees(partial(_choose, runs.step < start), advanced, runs)
            sums = {name: weight.new_zeros(num_pairs, *weight.shape) for name, weight in weights.items()}
            state.update(_name_state(unroll, runs, sums))
        return state

    def estimate(
        self, weights: Weights, state: EstimatorState, generator: torch.Generator
    ) -> tuple[MetaGradient, EstimatorState]:
        """Run one truncation of every run of the families whose turn it is."""
        turn, count = int(state["turn"]), self.families_per_update or len(self.unrolls)
        chosen = [self.unrolls[(turn + index) % len(self.unrolls)] for index in range(count)]
        total_weight = sum(unroll.task.weight for unroll in chosen)
        gradient = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        loss = next(iter(weights.values())).new_zeros(())
        metrics: dict[str, float] = {}
        variance = 0.0
        new_state = state | {"turn": torch.tensor((turn + count) % len(self.unrolls))}
        for unroll in chosen:
            share = unroll.task.weight / total_weight
            one = self._estimate_family(unroll, weights, state, generator)
            gradient = {name: value + share * one.gradient[name] for name, value in gradient.items()}
            loss = loss + share * one.loss
            variance += share**2 * one.variance
            metrics.update(one.metrics)
            metrics[f"{unroll.task.name}/snr"] = signal_to_noise(one.gradient, one.variance)
            new_state.update(one.state)
        metrics["snr"] = signal_to_noise(gradient, variance)
        return MetaGradient(gradient, loss, metrics), new_state

    def _estimate_family(
        self,
        unroll: Unroll,
        weights: Weights,
        state: EstimatorState,
        generator: torch.Generator,
    ) -> _Family:
        name, num_pairs = unroll.task.name, unroll.task.num_tasks
        runs = restore_runs(state, f"{name}/runs")
        noise_P = {
            key: self.std * torch.randn(num_pairs, *weight.shape, generator=generator).to(weight)
            for key, weight in weights.items()
        }
        perturbed_N = {key: torch.cat([weights[key] + noise, weights[key] - noise]) for key, noise in noise_P.items()}
        done = (runs.step[:num_pairs] >= runs.horizon[:num_pairs]).nonzero()[:, 0]
        sums_P = {key: state[f"{name}/sums/{key}"] for key in weights}
        if len(done) > 0:
            both = torch.cat([done, done + num_pairs])
            fresh = {key: value[both] for key, value in perturbed_N.items()}
            runs = replace_runs(runs, unroll.start(fresh, len(done), 2, generator, stage_steps(state)), both)
            sums_P = {key: value.index_fill(0, done, 0.0) for key, value in sums_P.items()}
        sums_P = {key: value * self.persistent + noise_P[key] for key, value in sums_P.items()}

        runs, losses = unroll.run(perturbed_N, runs, 2, generator)
        loss_2P = losses.objective.mean(0).view(2, num_pairs)
        slope_P = (loss_2P[0] - loss_2P[1]) / (2 * self.std**2)
        gradient = {key: torch.tensordot(slope_P, value, dims=1) / num_pairs for key, value in sums_P.items()}
        variance = variance_of_mean(slope_P, sums_P, gradient)
        metrics = mean_losses(losses, name)
        return _Family(gradient, loss_2P.mean(), variance, metrics, _name_state(unroll, runs, sums_P))


class _Family(NamedTuple):
    """What one update learns from the runs of one family."""

    gradient: Weights
    loss: Tensor
    variance: float
    """Of the gradient, summed over the weights."""
    metrics: dict[str, float]
    state: EstimatorState


def variance_of_mean(slope_P: Tensor, sums_P: Weights, mean: Weights) -> float:
    """Return ``S/P`` of the estimates ``g_i = slope_i sums_i``, of which ``mean`` is the mean; NaN for a single one."""
    num_pairs = len(slope_P)
    if num_pairs == 1:
        return math.nan
    squares_P = (
        sum(value.double().reshape(num_pairs, -1).square().sum(1) for value in sums_P.values())
        * slope_P.double().square()
    )
    deviation = float(squares_P.sum()) - num_pairs * squared_norm(mean)
    return max(deviation, 0.0) / (num_pairs - 1) / num_pairs


def signal_to_noise(mean: Weights, variance: float) -> float:
    """Return ``||mean||^2 / variance - 1``, with the variance of the mean summed over the weights.

    Example:
        >>> signal_to_noise({"w": torch.tensor([3.0, 4.0])}, 5.0)
        4.0
    """
    return squared_norm(mean) / variance - 1 if variance > 0 else math.nan


def squared_norm(gradient: Weights) -> float:
    """Return the squared Euclidean norm over all weights, summed in double."""
    return float(torch.stack([value.double().square().sum() for value in gradient.values()]).sum())


def _name_state(unroll: Unroll, runs: Runs, sums_P: Weights) -> EstimatorState:
    """Name the tensors of one family."""
    name = unroll.task.name
    return flatten_tree(runs, f"{name}/runs") | {f"{name}/sums/{key}": value for key, value in sums_P.items()}


def _repeat(weights: Weights, num_runs: int) -> Weights:
    """Return a copy of the weights for every run."""
    return {name: weight.repeat(num_runs, *(1,) * weight.dim()) for name, weight in weights.items()}


def _choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Choose by run."""
    return torch.where(condition.view(-1, *(1,) * (yes.dim() - 1)), yes, no)
