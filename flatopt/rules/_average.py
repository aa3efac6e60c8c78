"""The average of the parameters over a run, and how a run of known length ends on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Strides = TypeVar("Strides", float, Tensor)


@dataclass(frozen=True)
class PolynomialAverage:
    r"""A weighted mean of the parameters of a run, in which those of step :math:`i` weigh about :math:`i^\gamma`.

    .. math::
        \bar\theta_j = (1 - w_j)\, \bar\theta_{j-1} + w_j\, \theta_{jd} \qquad w_j = \frac{\gamma + 1}{\gamma + j}

    It is mostly the mean of the last :math:`1 / (\gamma + 1)` of the run, however long that is.  It takes in every
    :math:`d`-th step: every step at first, every second after ``all_steps``, every fourth after twice as many, and so
    on, so that its cost falls as a run goes on.

    Args:
        power: :math:`\gamma`, above 0.
        all_steps: where :math:`d` becomes 2.
        landing: part of a run of known length, at its end, in which the parameters move to their average.

    Reference: Shamir and Zhang, *Stochastic gradient descent for non-smooth optimization*, 2013,
    https://arxiv.org/abs/1212.1824
    """

    power: float
    all_steps: int = 256
    landing: float = 1 / 20

    def stride(self, step: float) -> int:
        """Return :math:`d`, of which the steps that the average takes in are multiples.

        Example:
            >>> [PolynomialAverage(8.0).stride(step) for step in (1, 255, 256, 512, 3000)]
            [1, 1, 2, 4, 16]
        """
        return 2 ** int(math.log2(2 * step / self.all_steps)) if step >= self.all_steps else 1

    def weight(self, strides: Strides) -> Strides:
        """Return what the newest parameters weigh.

        Args:
            strides: :math:`j`, steps taken divided by the stride; from 1, where the weight is 1.

        Example:
            >>> PolynomialAverage(8.0).weight(1.0), PolynomialAverage(8.0).weight(10.0)
            (1.0, 0.5)
        """
        return (self.power + 1) / (self.power + strides)

    def landing_share(self, step: float, num_steps: float) -> float:
        """Return by which part of the way that is left the parameters move to their average after a step.

        It rises to 1 over the end of a run, not at once, so that statistics of BatchNorm can follow; it is 0 where the
        length is not known.  The shares compound: in a long run most of the way is done soon.

        Example:
            >>> [round(PolynomialAverage(8.0).landing_share(step, 100), 6) for step in (95, 96, 99, 100)]
            [0.0, 0.2, 0.8, 1.0]
        """
        return 0.0 if math.isinf(num_steps) else max(0.0, 1 - (num_steps - step) / (self.landing * num_steps))
