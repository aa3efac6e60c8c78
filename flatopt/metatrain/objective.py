r"""The meta-objective: what one step of an inner run is judged by.

.. math::
    J_t = w_t \big( \alpha\, f_\text{train}(x_t) + \beta\, f_\text{meta}(x_{t+1}) + \gamma\, R(x_t) \big), \qquad
    w_t = w_0 + w_1 (t/T)^q

for a known horizon :math:`T`, and the mean of the same weights, :math:`w_0 + w_1/(q+1)`, at every step of a run whose
horizon the rule is not told: such a run has to be good whenever it is stopped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flatness import FlatnessMeasure, PerturbationGap
from .config import ObjectiveConfig


def build_flatness(config: ObjectiveConfig) -> FlatnessMeasure | None:
    """Return the flatness term that a configuration names, or ``None``.

    Raises:
        ValueError: for an unknown name.
    """
    if config.flatness is None:
        return None
    if config.flatness != "perturbation-gap":
        raise ValueError(f"unknown objective.flatness {config.flatness!r}: valid are none, perturbation-gap")
    return PerturbationGap(radius=config.flatness_radius)


def step_weight(config: ObjectiveConfig, step: Tensor, horizon: Tensor, num_steps: Tensor) -> Tensor:
    """Return ``w_t``, 0-D, for step ``step`` of ``horizon``, of which the rule is told ``num_steps``."""
    known = config.base_weight + config.final_weight * (step / horizon) ** config.final_power
    anytime = config.base_weight + config.final_weight / (config.final_power + 1)
    return torch.where(torch.isfinite(num_steps), known, torch.full_like(known, anytime))


def clip_loss(loss: Tensor, bound: float) -> Tensor:
    """Return the loss, or ``bound`` where it is larger or not a number: a diverged run counts as very bad, once."""
    return torch.where(torch.isfinite(loss), loss, torch.full_like(loss, bound)).clamp(-bound, bound)
