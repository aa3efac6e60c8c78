"""Estimators of the meta-gradient, one file each."""

from __future__ import annotations

import torch

from ...rules import UpdateRule
from ..config import MetaTrainConfig
from ._estimator import EstimatorState, GradientEstimator, MetaGradient, Track, enter_stage, untracked
from .truncated_backprop import Inner, TruncatedBackprop


def build_estimator(
    config: MetaTrainConfig, rule: UpdateRule, device: torch.device, track: Track = untracked
) -> GradientEstimator:
    """Return the estimator that a configuration names, with its inner problems; ``track`` shows what takes long."""
    # Imported here: the inner problems behind it need data, which a toy estimator does without.
    from ..imitation import with_imitation
    from ._runs import InnerRuns, build_unrolls
    from .persistent_es import PersistentES

    estimator: GradientEstimator
    if config.estimator.name == "truncated-backprop":
        estimator = TruncatedBackprop(inner=InnerRuns(unrolls=build_unrolls(config, rule, device)))
    else:
        estimator = PersistentES.from_config(config, rule, device, track)
    return with_imitation(estimator, config, rule, device)


__all__ = [
    "EstimatorState",
    "GradientEstimator",
    "Inner",
    "MetaGradient",
    "TruncatedBackprop",
    "build_estimator",
    "enter_stage",
]
