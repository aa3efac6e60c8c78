"""The average of the parameters over a run."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Step = TypeVar("Step", float, Tensor)


def average_weight(power: float, step: Step) -> Step:
    r"""Return what the newest parameters weigh in their polynomial-decay average.

    .. math::
        \bar\theta_t = (1 - w_t)\, \bar\theta_{t-1} + w_t\, \theta_t \qquad w_t = \frac{\gamma + 1}{\gamma + t}

    It is a weighted mean over the whole run, in which the parameters of step :math:`i` weigh about
    :math:`i^\gamma`: mostly the last :math:`1 / (\gamma + 1)` of the run, however long that is.

    Args:
        power: :math:`\gamma`, above 0.
        step: :math:`t`, from 1, where the weight is 1.

    Reference: Shamir and Zhang, *Stochastic gradient descent for non-smooth optimization*, 2013,
    https://arxiv.org/abs/1212.1824

    Example:
        >>> average_weight(8.0, 1.0), average_weight(8.0, 10.0)
        (1.0, 0.5)
    """
    return (power + 1) / (power + step)
