r"""When validation ends a stage of ever longer runs, and when it ends meta-training.

With :math:`n` validations made in this stage, the last one included, and the best loss so far in it,

    loss < best                      keep these weights, go on
    else n >= min_num_eval, and      advance: go back to the best weights, take the next stage, n = 0
         the stage has improved
    else n >= min_num_eval           stop

A stage begins with the best loss of the weights it starts from, at its own length of validation, so that losses of
different lengths are never compared; the first one begins with infinity.  After the last stage comes itself again, and
runs of validation, which elsewhere have the length of the next stage, have its own.

Without stages the best weights are kept, and meta-training stops after ``validation.patience`` validations without
improvement.

Reference: Chen et al., *Training Stronger Baselines for Learning to Optimize*, 2020, https://arxiv.org/abs/2010.09089
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .config import CurriculumConfig, MetaTrainConfig

Decision = Literal["keep", "go on", "advance", "stop"]


class Verdict(NamedTuple):
    """What validation says of weights; lower is better."""

    loss: float
    families: dict[str, float] = {}
    """The loss of each family by its name."""


class Progress(NamedTuple):
    """Where in the curriculum a run is; plain values, saved with its checkpoint."""

    stage: int = 0
    num_evals: int = 0
    """Validations in this stage."""
    improved: bool = False
    """Whether one of them was the best."""
    num_worse: int = 0
    """Validations since the best."""
    finished: bool = False
    """Whether validation has ended meta-training."""


def validation_steps(config: CurriculumConfig, stage: int) -> int | None:
    """Return the length of the validation runs of a stage; ``None``, the configured one, without a curriculum.

    Example:
        >>> [validation_steps(CurriculumConfig(stages=(100, 200, 500)), stage) for stage in range(3)]
        [200, 500, 500]
    """
    return config.stages[min(stage + 1, len(config.stages) - 1)] if config.stages else None


def decide(
    config: MetaTrainConfig, progress: Progress, loss: float, best_loss: float | None
) -> tuple[Progress, Decision]:
    """Return where the run is after a validation, and what to do.

    Args:
        config: of the run.
        progress: before the validation.
        loss: what it gave; not a number is never the best.
        best_loss: the best loss so far that it can be compared with, ``None`` before the first.
    """
    progress = progress._replace(num_evals=progress.num_evals + 1)
    if loss < (float("inf") if best_loss is None else best_loss):
        return progress._replace(improved=True, num_worse=0), "keep"
    progress = progress._replace(num_worse=progress.num_worse + 1)
    stages, patience = config.curriculum.stages, config.validation.patience
    if not stages:
        stop = patience is not None and progress.num_worse >= patience
        return progress._replace(finished=stop), "stop" if stop else "go on"
    if progress.num_evals < config.curriculum.min_num_eval:
        return progress, "go on"
    if progress.improved:
        return Progress(stage=min(progress.stage + 1, len(stages) - 1)), "advance"
    return progress._replace(finished=True), "stop"
