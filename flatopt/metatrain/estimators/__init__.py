"""Estimators of the meta-gradient, one file each."""

from __future__ import annotations

import torch

from ...rules import UpdateRule
from ..config import EVOLUTION_STRATEGIES, MetaTrainConfig
from ._estimator import EstimatorState, GradientEstimator, MetaGradient, enter_stage
from .truncated_backprop import Inner, TruncatedBackprop

ESTIMATORS = (*EVOLUTION_STRATEGIES, "truncated-backprop")
"""Names that ``estimator.name`` of a configuration may have."""


def build_estimator(config: MetaTrainConfig, rule: UpdateRule, device: torch.device) -> GradientEstimator:
    """Return the estimator that a configuration names, with its inner problems.

    Raises:
        ValueError: for an unknown name; the message lists the valid ones.
    """
    if config.estimator.name not in ESTIMATORS:
        valid = ", ".join(ESTIMATORS)
        raise ValueError(f"unknown estimator.name {config.estimator.name!r}: valid are {valid}")
    # Imported here: the inner problems behind it need data, which a toy estimator does without.
    from ..imitation import with_imitation
    from ._runs import InnerRuns, build_unrolls
    from .persistent_es import PersistentES

    estimator: GradientEstimator
    if config.estimator.name == "truncated-backprop":
        estimator = TruncatedBackprop(inner=InnerRuns(unrolls=build_unrolls(config, rule, device)))
    else:
        estimator = PersistentES.from_config(config, rule, device)
    return with_imitation(estimator, config, rule, device)


__all__ = [
    "ESTIMATORS",
    "EstimatorState",
    "GradientEstimator",
    "Inner",
    "MetaGradient",
    "TruncatedBackprop",
    "build_estimator",
    "enter_stage",
]
