r"""Held-out runs: how good weights are on problems and data that meta-training does not see.

Fresh problems are trained by the rule, and judged by the loss :math:`F` on the ``meta`` split, averaged over the last
truncation of each run.  Problems and batches come from a seed of their own and are the same at every call, so that two
losses differ by the weights alone.

Lengths of runs are rounded to truncations: those of training, or of at most 20 steps where validation is relative.

The validation loss is the mean of :math:`F` over families by their weights or, with ``validation.relative``, that of

.. math::
    \frac{1}{|T|} \sum_{T} \Big( (1-p) \ln \frac{F(w, T)}{F(w_0, T)} + p \ln \frac{F^?(w, T)}{F^?(w_0, T)} \Big)

with :math:`w_0` the rule's initial weights of seed 0 on the same problems and batches, measured once; :math:`T` the
lengths of the runs; :math:`F` the mean loss of runs that are told their horizon, :math:`F^?` of the same ones without;
and :math:`p` the ``unknown_horizon_probability`` of the family.  No family dominates for the size of its loss.

Cost: :math:`\sum T` steps of ``num_tasks`` runs per family, of twice as many where :math:`0 < p < 1`, and all of it
once more at the first validation of a session.  A step is recorded, which takes seconds per family, and then three to
five times slower than a compiled one.  With ``validation.compile`` it is compiled as in training; where a family has
as many runs in both (``num_tasks`` equal, :math:`0 < p < 1`), the compiler finds the step of training in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..rules import Weights
from ._ranks import Ranks
from .config import CurriculumConfig, MetaTrainConfig, ObjectiveConfig
from .curriculum import Verdict
from .inner_training import Families
from .runs import share_weights
from .unroll import Unroll

WINDOW = 20
"""Steps at the end of a run that its loss is averaged over, at most, where validation is relative."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation loss of weights.

    Args:
        families: what is trained.
        num_steps: length of the runs where a call does not say; the longest horizon of each family if ``None``.
        seed: seed of problems and batches.
        relative: compare with the rule's initial weights, with horizons told and not told.
        num_lengths: without ``num_steps``, how many lengths, from a family's shortest horizon to its longest.
        ranks: the processes that share the families.
    """

    families: Families
    num_steps: int | None
    seed: int
    relative: bool = False
    num_lengths: int = 1
    ranks: Ranks = Ranks()
    _untrained: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __call__(self, weights: Weights, num_steps: int | None = None) -> Verdict:
        """Return the mean loss at the end of the runs, families by their weights."""
        found = torch.zeros(len(self.families.unrolls), dtype=torch.float64)
        with torch.no_grad():
            for index in self.ranks.own(len(found)).tolist():
                unroll = self.families.unrolls[index]
                judge = self._relative_loss if self.relative else self._loss
                lengths = self._lengths(unroll, num_steps or self.num_steps)
                found[index] = sum(judge(weights, unroll, length, self.seed + index) for length in lengths) / len(
                    lengths
                )
        device = next(iter(weights.values())).device
        losses = dict(zip(self.families.names, self.ranks.sum(found.to(device)).tolist(), strict=True))
        return Verdict(self.families.mean(losses), losses)

    def _lengths(self, unroll: Unroll, num_steps: int | None) -> list[int]:
        """Return the lengths of the runs of a family, each once."""
        shortest, longest = unroll.task.min_steps, unroll.task.max_steps
        if num_steps is not None or self.num_lengths == 1:
            return [num_steps or longest]
        ratio = (longest / shortest) ** (1 / (self.num_lengths - 1))
        return sorted({round(shortest * ratio**index) for index in range(self.num_lengths)})

    def _loss(self, weights: Weights, unroll: Unroll, length: int, seed: int) -> float:
        return float(_end_losses(weights, unroll, length, seed).mean())

    def _relative_loss(self, weights: Weights, unroll: Unroll, length: int, seed: int) -> float:
        key = (unroll.task.name, length)
        if key not in self._untrained:
            first = unroll.rule.init_weights(torch.Generator().manual_seed(0))
            untrained = {name: first[name].to(weight) for name, weight in weights.items()}
            self._untrained[key] = _told_and_untold(untrained, unroll, length, seed)
        ratios = _told_and_untold(weights, unroll, length, seed) / self._untrained[key]
        untold = unroll.task.unknown_horizon_probability
        shares = [share for share in (1 - untold, untold) if share > 0]
        return sum(share * float(ratio.log()) for share, ratio in zip(shares, ratios, strict=True))


def _told_and_untold(weights: Weights, unroll: Unroll, length: int, seed: int) -> Tensor:
    """Return the mean losses of the same runs with and without their horizon, of one kind where the other is unused."""
    untold = unroll.task.unknown_horizon_probability
    told = [is_told for is_told, share in ((True, 1 - untold), (False, untold)) if share > 0]
    losses = _end_losses(weights, unroll, length, seed, told)
    return losses.unflatten(1, (len(told), -1)).mean((0, 2)).clamp(min=torch.finfo(losses.dtype).tiny)


def _end_losses(weights: Weights, unroll: Unroll, length: int, seed: int, told: Sequence[bool] | None = None) -> Tensor:
    """Train runs to their end; return the meta losses of the last truncation, ``[L, N]``.

    There is a copy of each run for each of ``told``, whether it is told its horizon; at random without.
    """
    generator, copies = torch.Generator().manual_seed(seed), 1 if told is None else len(told)
    weights_N = share_weights(weights, copies * unroll.task.num_tasks)
    runs = unroll.start(weights_N, unroll.task.num_tasks, copies, generator, length)
    if told is not None:
        is_told = torch.tensor(told, device=unroll.device).repeat_interleave(unroll.task.num_tasks)
        runs = runs._replace(num_steps=torch.where(is_told, runs.horizon, math.inf))
    for _ in range(int(runs.horizon[0]) // unroll.truncation_length):
        runs, losses = unroll.run(weights_N, runs, copies, generator)
    return losses.meta


def build_validation(config: MetaTrainConfig, device: torch.device, ranks: Ranks | None = None) -> Validation:
    """Return the validation of a configuration: its families without random scaling, its inner loss, no penalties."""
    validation, compiled = config.validation, config.compile and bool(config.validation.compile)
    tasks = tuple(replace(task, num_tasks=validation.num_tasks, random_scaling=0.0) for task in config.tasks)
    if validation.relative:
        tasks = tuple(replace(task, truncation_length=min(WINDOW, config.truncation_length(task))) for task in tasks)
    objective = _objective(config.objective, as_in_training=compiled)
    held_out = replace(config, objective=objective, tasks=tasks, curriculum=CurriculumConfig(), compile=compiled)
    return Validation(
        families=Families.from_config(held_out, device),
        num_steps=validation.num_steps,
        seed=validation.seed,
        relative=bool(validation.relative),
        num_lengths=validation.num_lengths or 1,
        ranks=ranks or Ranks(),
    )


def _objective(objective: ObjectiveConfig, *, as_in_training: bool) -> ObjectiveConfig:
    """Return an objective whose meta loss is that of the ``meta`` split; nothing else of it is used."""
    if as_in_training and objective.meta_weight and objective.meta_split == "meta":
        return objective
    return ObjectiveConfig(meta_weight=1.0, inner_flatness=objective.inner_flatness, clip=objective.clip)
