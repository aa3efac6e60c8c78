"""Traces of the Hessian by random probes: ``E[z^T H z] = trace(H)`` and ``E[||H z||^2] = trace(H^2)``.

Both hold for probes ``z`` with independent entries of mean 0 and variance 1; random signs have the least variance.

Reference: Hutchinson, *A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines*,
1989, https://doi.org/10.1080/03610918908812806
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._curvature import hessian_operator
from ._measure import FlatnessMeasure, LossFn, Noise, Params
from ._vectors import check_positive, num_coordinates, probes, rademacher


@dataclass(frozen=True, kw_only=True)
class HutchinsonTrace(FlatnessMeasure):
    """Unbiased estimate of the mean eigenvalue ``trace(H) / d``.

    ``(1/m) sum_i z_i^T H z_i / d`` over ``m = num_matvecs`` vectors of signs: ``m`` Hessian-vector products.  Exact
    for diagonal ``H``; the variance of one probe is ``2 sum_{i != j} H_ij^2 / d^2``.  Fully differentiable (third
    derivatives of the loss).  Signed: as a penalty it rewards negative curvature, which :class:`SquaredTrace` cannot.

    References:
        Hutchinson, 1989, https://doi.org/10.1080/03610918908812806

    Example:
        >>> measure = HutchinsonTrace(num_matvecs=1)
        >>> params = {"x": torch.tensor([1.0, 2.0])}
        >>> measure(lambda params: (params["x"] ** 3).sum(), params, measure.sample_noise(params))
        tensor(9.)
    """

    num_matvecs: int = 1

    def __post_init__(self) -> None:
        check_positive(num_matvecs=self.num_matvecs)

    def sample_noise(self, params: Params, generator: torch.Generator | None = None) -> Noise:
        """Draw ``num_matvecs`` vectors of signs."""
        return rademacher(params, self.num_matvecs, generator)

    def __call__(self, loss_fn: LossFn, params: Params, noise: Noise) -> Tensor:
        """Return the mean of ``z^T H z / d``."""
        hessian = hessian_operator(loss_fn, params)
        return torch.stack([z @ hessian(z) for z in probes(noise)]).mean() / num_coordinates(params)


@dataclass(frozen=True, kw_only=True)
class SquaredTrace(FlatnessMeasure):
    """Unbiased estimate of the mean squared eigenvalue ``trace(H^2) / d``.

    ``(1/m) sum_i ||H z_i||^2 / d``: never negative, and zero only for a vanishing Hessian (of the probed directions),
    so as a penalty it shrinks negative curvature as well as positive.  Cost and differentiability as
    :class:`HutchinsonTrace`.

    Example:
        >>> measure = SquaredTrace()
        >>> params = {"x": torch.tensor([1.0, -2.0])}
        >>> measure(lambda params: (params["x"] ** 3).sum(), params, measure.sample_noise(params))
        tensor(90.)
    """

    num_matvecs: int = 1

    def __post_init__(self) -> None:
        check_positive(num_matvecs=self.num_matvecs)

    def sample_noise(self, params: Params, generator: torch.Generator | None = None) -> Noise:
        """Draw ``num_matvecs`` vectors of signs."""
        return rademacher(params, self.num_matvecs, generator)

    def __call__(self, loss_fn: LossFn, params: Params, noise: Noise) -> Tensor:
        """Return the mean of ``||H z||^2 / d``."""
        hessian = hessian_operator(loss_fn, params)
        return torch.stack([hessian(z).square().sum() for z in probes(noise)]).mean() / num_coordinates(params)


def hutchinson_trace(
    loss_fn: LossFn, params: Params, *, num_matvecs: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    """Estimate ``trace(H)``, the sum of all eigenvalues (not divided by their number ``d``), 0-D.

    Unbiased; see :class:`HutchinsonTrace`.  The probes take ``num_matvecs * d`` numbers of memory.

    Args:
        loss_fn: twice differentiable function of the parameters, 0-D value.
        params: parameters by name.
        num_matvecs: number of probes, hence of Hessian-vector products.
        generator: source of the probes; fresh ones in each call.

    Raises:
        ValueError: ``num_matvecs < 1``, there is no parameter, or the loss is not 0-D.

    Example:
        >>> hutchinson_trace(lambda params: (params["x"] ** 3).sum(), {"x": torch.tensor([1.0, 2.0])})
        tensor(18.)
    """
    measure = HutchinsonTrace(num_matvecs=num_matvecs)
    return num_coordinates(params) * measure(loss_fn, params, measure.sample_noise(params, generator))
