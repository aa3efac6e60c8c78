"""Estimators of the meta-gradient, one file each."""

from __future__ import annotations

import torch

from .._ranks import Ranks
from ..config import MetaTrainConfig
from ..inner import Inner as Inner
from ..inner_training import Families
from ._estimator import GradientEstimator as GradientEstimator
from ._estimator import MetaGradient as MetaGradient
from ._estimator import Track
from ._estimator import untracked as untracked
from .imitation import with_imitation
from .persistent_es import PersistentES, chosen_names
from .truncated_backprop import TruncatedBackprop as TruncatedBackprop


def build_estimator(
    config: MetaTrainConfig,
    device: torch.device,
    track: Track = untracked,
    ranks: Ranks | None = None,
) -> GradientEstimator:
    """Return the estimator that a configuration names, with its inner problems on a device.

    The ``ranks`` share the work of an evolution strategy; backpropagation does all of it in each.
    """
    families = Families.from_config(config, device)
    estimator: GradientEstimator
    if config.estimator.name == "truncated-backprop":
        estimator = TruncatedBackprop(inner=families)
    else:
        estimator = PersistentES(
            families=families,
            std=config.estimator.std,
            families_per_update=config.estimator.families_per_update,
            only=chosen_names(config.estimator.only, config.build_rule().init_weights()),
            persistent=config.estimator.name == "persistent-es",
            track=track,
            ranks=ranks or Ranks(),
        )
    return with_imitation(estimator, config, device)
