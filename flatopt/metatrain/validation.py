"""Held-out runs: how good weights are on problems and data that meta-training does not see.

Fresh problems are trained by the rule, and judged by the loss on the ``meta`` split, averaged over the last truncation
of each run.  Problems and batches come from a seed of their own and are the same at every call, so that two losses
differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..rules import UpdateRule, Weights
from .config import FlatnessConfig, MetaTrainConfig
from .estimators._runs import build_unrolls, repeat
from .unroll import Unroll


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation loss of weights, lower is better.

    Args:
        unrolls: one per family of problems.
        num_steps: length of the runs where a call does not say; the longest horizon of each family if ``None``.
        seed: seed of problems and batches.
    """

    unrolls: Sequence[Unroll]
    num_steps: int | None
    seed: int

    def __call__(self, weights: Weights, num_steps: int | None = None) -> float:
        """Return the mean loss at the end of the runs, families by their weights.

        Args:
            weights: of the rule, on the device of the runs.
            num_steps: length of the runs.
        """
        total_weight = sum(unroll.task.weight for unroll in self.unrolls)
        loss = 0.0
        with torch.no_grad():
            for index, unroll in enumerate(self.unrolls):
                generator = torch.Generator().manual_seed(self.seed + index)
                count = unroll.task.num_tasks
                weights_N = repeat({name: weight.detach() for name, weight in weights.items()}, count)
                length = num_steps or self.num_steps or unroll.task.max_steps
                runs = unroll.start(weights_N, count, 1, generator, length)
                for _ in range(int(runs.horizon[0]) // unroll.truncation_length):
                    runs, losses = unroll.run(weights_N, runs, 1, generator)
                loss += unroll.task.weight / total_weight * float(losses.meta.mean())
        return loss


def build_validation(config: MetaTrainConfig, rule: UpdateRule, device: torch.device) -> Validation:
    """Return the validation of a configuration: its families without random scaling, its inner loss, no penalties.

    Raises:
        ValueError: for an unknown family; the message lists the valid ones.
    """
    plain = replace(
        config.objective,
        train_weight=0.0,
        meta_weight=1.0,
        meta_split="meta",
        transform="none",
        flatness=FlatnessConfig(),
    )
    tasks = tuple(replace(task, num_tasks=config.validation.num_tasks, random_scaling=0.0) for task in config.tasks)
    held_out = replace(config, objective=plain, tasks=tasks, compile=False)
    return Validation(
        unrolls=build_unrolls(held_out, rule, device),
        num_steps=config.validation.num_steps,
        seed=config.validation.seed,
    )
