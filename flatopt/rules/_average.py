"""The average of the parameters over a run, and how a run of known length ends on it."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

Step = TypeVar("Step", float, Tensor)

LANDING = 1 / 20
"""Part of a run of known length, at its end, in which the parameters move to their average."""

ALL_STEPS = 256
"""Up to here the average takes in every step, then every second, from twice as many on every fourth, and so on."""


def average_weight(power: float, step: Step) -> Step:
    r"""Return what the newest parameters weigh in their polynomial-decay average.

    .. math::
        \bar\theta_t = (1 - w_t)\, \bar\theta_{t-1} + w_t\, \theta_t \qquad w_t = \frac{\gamma + 1}{\gamma + t}

    It is a weighted mean over the whole run, in which the parameters of step :math:`i` weigh about
    :math:`i^\gamma`: mostly the last :math:`1 / (\gamma + 1)` of the run, however long that is.

    Args:
        power: :math:`\gamma`, above 0.
        step: :math:`t`, from 1, where the weight is 1; counted in strides.

    Reference: Shamir and Zhang, *Stochastic gradient descent for non-smooth optimization*, 2013,
    https://arxiv.org/abs/1212.1824

    Example:
        >>> average_weight(8.0, 1.0), average_weight(8.0, 10.0)
        (1.0, 0.5)
    """
    return (power + 1) / (power + step)


def average_stride(step: float) -> int:
    """Return how many steps lie between those that the average takes in, so that its cost falls as a run goes on.

    Example:
        >>> [average_stride(step) for step in (1, 255, 256, 512, 3000)]
        [1, 1, 2, 4, 16]
    """
    return max(1, 2 ** int(math.log2(2 * step / ALL_STEPS))) if step >= ALL_STEPS else 1


def landing_share(step: float, num_steps: float) -> float:
    """Return by which part of the way the parameters move to their average after a step.

    It rises from 0 to 1 over the last twentieth of a run, so that statistics of BatchNorm follow; it is 0 where the
    length is not known.

    Example:
        >>> [round(landing_share(step, 100), 6) for step in (95, 96, 99, 100)]
        [0.0, 0.2, 0.8, 1.0]
    """
    return 0.0 if math.isinf(num_steps) else max(0.0, 1 - (num_steps - step) / (LANDING * num_steps))
