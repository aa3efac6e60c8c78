r"""The meta-objective: what one step of an inner run is judged by.

.. math::
    J_t = w_t \big( \alpha\, \ell(f_\text{train}(x_t)) + \beta\, \ell(f_\text{meta}(x_{t+1}))
        + \epsilon\, e_\text{meta}(x_{t+1}) + \gamma\, s_t\, R(x_t) \big), \qquad w_t = w_0 + w_1 (t/T)^q

for a run of :math:`T` steps, whether the rule is told that or not: where it is not, runs of many lengths ask it to be
good whenever it is stopped.  The meta-loss is the mean of :math:`J_t` over steps and runs.

:math:`\ell` is the identity or, with ``transform="log"``,

.. math::
    \ell(F) = \ln \Big( \frac{F}{F_0 + 10^{-6}} + 10^{-6} \Big)

with :math:`F_0` the loss at the start of the run, on its first batch; :math:`e` is the fraction of wrong classes, or
the mean squared error.  :math:`R` is a measure of flatness of the loss on the training batch, at the parameters before
the step, and :math:`s_t` is 1 where its schedule is on, else 0.  Of a rule that keeps an average of the parameters,
:math:`f_\text{meta}`, :math:`e` and :math:`R` are those of the average; :math:`f_\text{train}`, whose gradient the rule
sees, is not.  Truncated backpropagation differentiates :math:`R` in
:math:`x_t`; evolution strategies only evaluate it.

References:
    Wichrowska et al., 2017, https://arxiv.org/abs/1703.04813, for the logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import FlatnessConfig, ObjectiveConfig

LOG_EPS = 1e-6


def schedule_mask(config: FlatnessConfig, num_taken: Tensor, horizon: Tensor) -> Tensor:
    """Return whether a penalty is on in the step after ``num_taken`` of ``horizon``, bool of their common shape.

    Example:
        >>> config = FlatnessConfig(schedule="last", fraction=0.25)
        >>> schedule_mask(config, torch.arange(8.0), torch.tensor(8.0)).long()
        tensor([0, 0, 0, 0, 0, 0, 1, 1])
    """
    if config.schedule == "first":
        return num_taken < config.fraction * horizon
    if config.schedule == "last":
        return num_taken >= (1 - config.fraction) * horizon
    if config.schedule == "every":
        # The last step of a period, not its first: in the first step of a truncation nothing depends on the weights.
        return (num_taken + 1) % config.every == 0
    return torch.ones_like(num_taken, dtype=torch.bool)


def penalty(config: FlatnessConfig, measured: Tensor, num_taken: Tensor, horizon: Tensor) -> Tensor:
    """Return the measured flatness where it counts: bounded, not negative unless ``signed``, 0 where it is off."""
    value = clip_loss(measured, config.clip)
    value = value if config.signed else value.clamp(min=0)
    if config.schedule == "always":
        return value
    return torch.where(schedule_mask(config, num_taken, horizon), value, torch.zeros_like(value))


def transform_loss(config: ObjectiveConfig, loss: Tensor, initial_loss: Tensor) -> Tensor:
    """Return ``l(F)`` for a loss of a run that began at ``initial_loss``."""
    if config.transform == "none":
        return loss
    return (loss.clamp(min=0) / (initial_loss + LOG_EPS) + LOG_EPS).log()


def step_weight(config: ObjectiveConfig, step: Tensor, horizon: Tensor) -> Tensor:
    """Return ``w_t``, 0-D, for step ``step`` of ``horizon``."""
    return config.base_weight + config.final_weight * (step / horizon) ** config.final_power


def clip_loss(loss: Tensor, bound: float) -> Tensor:
    """Return the loss, or ``bound`` where it is larger or not a number: a diverged run counts as very bad, once."""
    return torch.where(torch.isfinite(loss), loss, torch.full_like(loss, bound)).clamp(-bound, bound)
