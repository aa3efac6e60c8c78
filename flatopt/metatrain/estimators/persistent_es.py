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

import fnmatch
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...rules import Weights
from .._ranks import Ranks
from ..inner_training import Families, mean_losses, restart
from ..runs import choose_runs, repeat_weights
from ..unroll import Unroll
from ._estimator import EstimatorState, GradientEstimator, MetaGradient, Track, untracked


@dataclass(frozen=True, kw_only=True)
class PersistentES(GradientEstimator):
    """Antithetic evolution strategy over truncations of runs that begin at different times.

    The state has the number of the family whose turn is next, and for each family its runs, the ``P`` at ``w + eps``
    first, and the sums of their perturbations; nothing where all of them are at their end.

    Args:
        families: what is trained.
        std: standard deviation of the perturbations.
        families_per_update: how many families, in turn, one update runs; all by default.
        only: names of the weights that are perturbed; all by default.
        persistent: sum the perturbations over a run (unbiased), or not (truncated ES).
        track: shows which family is being prepared.
        ranks: the processes that share the work.
    """

    families: Families
    std: float
    families_per_update: int | None = None
    only: frozenset[str] | None = None
    persistent: bool = True
    track: Track = untracked
    ranks: Ranks = Ranks()

    def prepare(self, weights: Weights) -> None:
        """Record, and compile if asked for, the step of every family."""
        for _, unroll in zip(self.track(self.families.names, "preparing"), self.families.unrolls, strict=True):
            num_pairs = len(self.ranks.own(unroll.task.num_tasks))
            if num_pairs > 0:
                unroll.prepare(repeat_weights(weights, 2 * num_pairs), num_pairs, 2)

    def init(self, weights: Weights, generator: torch.Generator, num_steps: int | None = None) -> EstimatorState:
        """Start all runs, each already somewhere between its start and its horizon, trained there by ``weights``."""
        state: EstimatorState = {"turn": torch.zeros((), dtype=torch.int64)}
        shown = self.track(self.families.names, "first inner runs")
        for name, unroll in zip(shown, self.families.unrolls, strict=True):
            if (num_steps or unroll.task.max_steps) <= unroll.truncation_length:  # every truncation is a whole run
                state[name] = {}
                continue
            num_pairs = unroll.task.num_tasks
            repeated = repeat_weights(weights, 2 * num_pairs)
            runs = unroll.start(repeated, num_pairs, 2, generator, num_steps)
            start = torch.rand(num_pairs, generator=generator).repeat(2).to(runs.horizon)
            start = (start * runs.horizon / unroll.truncation_length).floor() * unroll.truncation_length
            while bool((runs.step < start).any()):
                advanced, _ = self.ranks.run(unroll, repeated, runs, 2, generator)
                runs = choose_runs(runs.step < start, advanced, runs)
            sums = {key: weight.new_zeros(num_pairs, *weight.shape) for key, weight in weights.items()}
            state[name] = {"runs": runs, "sums": sums}
        return state

    def estimate(
        self, weights: Weights, state: EstimatorState, generator: torch.Generator, num_steps: int | None = None
    ) -> tuple[MetaGradient, EstimatorState]:
        """Run one truncation of every run of the families whose turn it is."""
        names = self.families.names
        turn, count = int(state["turn"]), self.families_per_update or len(names)
        chosen = self.families.select([names[(turn + index) % len(names)] for index in range(count)])
        found = {
            unroll.task.name: self._estimate_family(unroll, weights, state[unroll.task.name], generator, num_steps)
            for unroll in chosen.unrolls
        }
        gradient = {key: chosen.mean({name: one.gradient[key] for name, one in found.items()}) for key in weights}
        variance = sum(share**2 * found[name].variance for name, share in chosen.shares().items())
        metrics = {key: value for one in found.values() for key, value in one.metrics.items()}
        metrics["snr"] = signal_to_noise(gradient, variance)
        loss = chosen.mean({name: one.loss for name, one in found.items()})
        after = {**state, **{name: one.after for name, one in found.items()}}
        after["turn"] = torch.tensor((turn + count) % len(names))
        return MetaGradient(gradient, loss, metrics), after

    def _estimate_family(
        self,
        unroll: Unroll,
        weights: Weights,
        state: EstimatorState,
        generator: torch.Generator,
        num_steps: int | None,
    ) -> _Estimate:
        name, num_pairs = unroll.task.name, unroll.task.num_tasks
        noise_P = {
            key: self._std_of(key) * torch.randn(num_pairs, *weight.shape, generator=generator).to(weight)
            for key, weight in weights.items()
        }
        perturbed_N = {key: torch.cat([weights[key] + noise, weights[key] - noise]) for key, noise in noise_P.items()}
        if state:
            runs, fresh = restart(unroll, perturbed_N, state["runs"], 2, generator, num_steps)
            before = {key: value.index_fill(0, fresh, 0.0) * self.persistent for key, value in state["sums"].items()}
            sums_P = {key: value + noise_P[key] for key, value in before.items()}
        else:
            runs, sums_P = unroll.start(perturbed_N, num_pairs, 2, generator, num_steps), noise_P
        runs, losses = self.ranks.run(unroll, perturbed_N, runs, 2, generator)
        loss_2P = losses.objective.mean(0).view(2, num_pairs)
        slope_P = (loss_2P[0] - loss_2P[1]) / (2 * self.std**2)
        gradient = {key: torch.tensordot(slope_P, value, dims=1) / num_pairs for key, value in sums_P.items()}
        variance = variance_of_mean(slope_P, sums_P, gradient)
        metrics = {**mean_losses(losses, name), f"{name}/snr": signal_to_noise(gradient, variance)}
        is_over = bool((runs.step >= runs.horizon).all())
        return _Estimate(gradient, loss_2P.mean(), variance, metrics, {} if is_over else {"runs": runs, "sums": sums_P})

    def _std_of(self, name: str) -> float:
        return self.std if self.only is None or name in self.only else 0.0


class _Estimate(NamedTuple):
    """What one update learns from the runs of one family, and what it carries on."""

    gradient: Weights
    loss: Tensor
    variance: float
    """Of the gradient, summed over the weights."""
    metrics: dict[str, float]
    after: EstimatorState
    """Runs and sums, or nothing."""


def chosen_names(patterns: Sequence[str], names: Collection[str]) -> frozenset[str] | None:
    """Return the names that match a pattern, ``None`` for all without patterns; ``ValueError`` if one matches none.

    Example:
        >>> sorted(chosen_names(["a.*"], ["a.x", "a.y", "b.x"]))
        ['a.x', 'a.y']
    """
    found: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ValueError(f"estimator.only: no weight is called {pattern!r}: there are {', '.join(names)}")
        found.update(matching)
    return frozenset(found) if patterns else None


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
