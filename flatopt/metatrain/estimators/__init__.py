"""Estimators of the meta-gradient, one file each."""

from __future__ import annotations

import torch

from ...rules import UpdateRule
from ..config import MetaTrainConfig
from ._estimator import EstimatorState, GradientEstimator, MetaGradient, Track, untracked
from .truncated_backprop import Inner, TruncatedBackprop


def build_estimator(
    config: MetaTrainConfig, rule: UpdateRule, device: torch.device, track: Track = untracked
) -> GradientEstimator:
    """Return the estimator that a configuration names, with its inner problems; ``track`` shows what takes long."""
    # Imported here: a toy estimator needs no inner problems, which take half a second.
    from ..inner_training import Families
    from .imitation import with_imitation
    from .persistent_es import PersistentES

    families = Families.from_config(config, rule, device)
    estimator: GradientEstimator
    if config.estimator.name == "truncated-backprop":
        estimator = TruncatedBackprop(inner=families)
    else:
        estimator = PersistentES(
            families=families,
            std=config.estimator.std,
            families_per_update=config.estimator.families_per_update,
            persistent=config.estimator.name == "persistent-es",
            track=track,
        )
    return with_imitation(estimator, config, rule, device)


__all__ = [
    "EstimatorState",
    "GradientEstimator",
    "Inner",
    "MetaGradient",
    "Track",
    "TruncatedBackprop",
    "build_estimator",
    "untracked",
]
