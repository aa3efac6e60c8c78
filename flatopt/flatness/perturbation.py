"""How much the loss rises nearby: against the gradient's direction (SAM), or at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._curvature import gradient
from ._measure import FlatnessMeasure, LossFn, Noise, Params
from ._vectors import check_positive, gaussian, num_coordinates, unflatten


@dataclass(frozen=True, kw_only=True)
class SamGap(FlatnessMeasure):
    """Rise of the loss along its gradient, ``f(params + rho g / ||g||) - f(params)``.

    ``rho ||g||`` to first order; not negative where the loss is convex.  Differentiable with the perturbation held
    fixed, as sharpness-aware minimisation does: the gradient is ``grad f(perturbed) - grad f``, without second
    derivatives.  It is 0 where the gradient vanishes, whatever the curvature.  No randomness.

    Attributes:
        rho: length of the perturbation over all parameters jointly, in units of parameters.

    References:
        Foret et al., *Sharpness-aware minimization*, 2021, https://arxiv.org/abs/2010.01412

    Example:
        >>> SamGap(rho=0.5)(lambda params: params["x"] ** 2, {"x": torch.tensor(1.0)}, {})
        tensor(1.2500)
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        check_positive(rho=self.rho)

    def __call__(self, loss_fn: LossFn, params: Params, noise: Noise) -> Tensor:
        """Return ``f(params + rho g / ||g||) - f(params)``."""
        num_coordinates(params)
        with torch.no_grad():
            grad = gradient(loss_fn, params)
            norm = torch.linalg.vector_norm(grad)
            step = unflatten((self.rho * grad / norm.clamp(min=torch.finfo(grad.dtype).tiny)).detach(), params)
        return loss_fn({name: param + step[name] for name, param in params.items()}) - loss_fn(params)


@dataclass(frozen=True, kw_only=True)
class PerturbationGap(FlatnessMeasure):
    """Mean rise of the loss under random perturbations, ``mean_i f(params + radius rms(params) xi_i) - f(params)``.

    ``rms`` is taken per tensor, so the measure does not change with the scale of a layer whose output is normalised.
    To second order it is ``radius^2/2 sum_tensors rms^2 trace(H_tensor)``; a tensor of zeros is not perturbed.  Two
    or more evaluations of the loss and no derivative: made for evolution strategies.  Of any sign.  Differentiable
    with the perturbation held fixed.

    Attributes:
        radius: size of the perturbation relative to the root mean square of each tensor.
        num_perturbations: number of perturbed evaluations.

    Example:
        >>> measure = PerturbationGap(radius=0.1)
        >>> loss_fn = lambda params: params["x"].sum()
        >>> measure(loss_fn, {"x": torch.full((4,), 2.0)}, {"x": torch.ones(1, 4)})  # 4 * 0.1 * 2
        tensor(0.8000)
    """

    radius: float = 0.1
    num_perturbations: int = 1

    def __post_init__(self) -> None:
        check_positive(radius=self.radius, num_perturbations=self.num_perturbations)

    def sample_noise(self, params: Params, generator: torch.Generator | None = None) -> Noise:
        """Draw normal directions."""
        return gaussian(params, self.num_perturbations, generator)

    def __call__(self, loss_fn: LossFn, params: Params, noise: Noise) -> Tensor:
        """Return the mean of the perturbed losses minus the loss."""
        scale = {name: self.radius * param.detach().square().mean().sqrt() for name, param in params.items()}
        perturbed = [
            loss_fn({name: param + scale[name] * noise[name][index] for name, param in params.items()})
            for index in range(self.num_perturbations)
        ]
        return torch.stack(perturbed).mean() - loss_fn(params)


def sam_gap(loss_fn: LossFn, params: Params, *, rho: float = 0.05) -> Tensor:
    """Return ``f(params + rho g / ||g||) - f(params)``, 0-D, in units of loss; see :class:`SamGap`.

    Args:
        loss_fn: differentiable function of the parameters, 0-D value.
        params: parameters by name.
        rho: length of the perturbation.

    Raises:
        ValueError: ``rho <= 0``, there is no parameter, or the loss is not 0-D.

    Example:
        >>> sam_gap(lambda params: params["x"] ** 2, {"x": torch.tensor(-1.0)}, rho=0.5)
        tensor(1.2500)
    """
    return SamGap(rho=rho)(loss_fn, params, {})
