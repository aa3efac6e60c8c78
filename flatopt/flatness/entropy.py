"""Local entropy: how much volume of low loss there is around a point.

    G(x) = T ln INT exp( -[ f(y) + gamma/2 ||x - y||^2 ] / T ) dy

Large ``G`` means a low and wide region.  With ``mu`` the mean of the density that the integrand is proportional to,

    grad(-G)(x) = gamma (x - mu) = E[ grad f(y) ]

which stochastic gradient Langevin dynamics (SGLD) estimates from gradients of ``f`` alone.

References: Chaudhari et al., *Entropy-SGD: biasing gradient descent into wide valleys*, 2017,
https://arxiv.org/abs/1611.01838; Welling and Teh, *Bayesian learning via stochastic gradient Langevin dynamics*, 2011
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ._curvature import gradient, hessian_operator
from ._measure import FlatnessMeasure, LossFn, Noise, Params
from ._vectors import check_positive, flatten, gaussian, num_coordinates, probes, unflatten
from .spectrum import gauss_rule, spectral_quadrature


class LocalEntropy(NamedTuple):
    """Local entropy ``G`` and its gradient: both of ``+G``, the quantity to maximise."""

    value: Tensor
    """Laplace approximation of ``G``, 0-D, in nats; NaN where ``H + gamma I`` is not positive definite."""
    gradient: Params
    """SGLD estimate of ``grad G = gamma (mu - params)``."""


@dataclass(frozen=True, kw_only=True)
class EntropySurrogate(FlatnessMeasure):
    """Penalty ``gamma/2 ||params - mu||^2`` with ``mu`` held fixed.

    Its gradient ``gamma (params - mu)`` is the SGLD estimate of that of ``-G``, the negative local entropy.
    Its value is never negative, but it is not ``-G``: only the gradient means something, and evolution strategies
    should not evaluate it.  First derivatives of the loss suffice: ``num_steps`` gradients, no graph through the
    chain.

    ``-G`` contains the loss itself; ``subtract_loss`` gives ``-G - f``, flatness alone (then of any sign).

    Attributes:
        gamma: inverse squared radius of the neighbourhood, in units of loss over squared parameter.
        num_steps: steps of the chain; the mean is over its second half.
        step_size: step of the chain, below ``2 / (lambda_max + gamma)`` to be stable.
        temperature: ``T``, 1 for the entropy in nats; small values search a minimum more and sample less.
        subtract_loss: whether to subtract the loss.
        antithetic: take the mean over two chains whose noise has opposite signs, for twice the gradients.  Terms of
            odd order in the noise cancel, on a quadratic all of it: a short chain can then see a wide neighbourhood,
            which else drowns ``mu`` in noise.

    References:
        Chaudhari et al., 2017, https://arxiv.org/abs/1611.01838; for antithetic variates, Hammersley and Morton,
        1956, https://doi.org/10.1017/S0305004100031455
    """

    has_value: ClassVar[bool] = False
    as_penalty = {"subtract_loss": False}  # the difference rewards negative curvature

    gamma: float = 1.0
    num_steps: int = 20
    step_size: float = 0.01
    temperature: float = 1.0
    subtract_loss: bool = False
    antithetic: bool = False

    def __post_init__(self) -> None:
        check_positive(gamma=self.gamma, num_steps=self.num_steps, step_size=self.step_size)
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")

    def sample_noise(self, params: Params, generator: torch.Generator | None = None) -> Noise:
        """Draw the normal noise of every step of the chain."""
        return gaussian(params, self.num_steps, generator)

    def __call__(self, loss_fn: LossFn, params: Params, noise: Noise) -> Tensor:
        """Return ``gamma/2 ||params - mu||^2``, minus the loss if asked for."""
        surrogate = entropy_surrogate(params, self.mean(loss_fn, params, noise), gamma=self.gamma)
        return surrogate - loss_fn(params) if self.subtract_loss else surrogate

    def mean(self, loss_fn: LossFn, params: Params, noise: Noise) -> Params:
        """Return ``mu``, the mean over the second half of the chain, or of both chains; detached."""
        signs = (1, -1) if self.antithetic else (1,)
        first = self.num_steps // 2
        total, count = torch.zeros_like(flatten(params)), len(signs) * (self.num_steps - first)
        for sign in signs:
            for step, sample in enumerate(self.samples(loss_fn, params, noise, sign)):
                if step >= first:
                    total = total + sample / count
        return unflatten(total, params)

    def samples(self, loss_fn: LossFn, params: Params, noise: Noise, sign: int = 1) -> Iterator[Tensor]:
        """Yield the chain ``y <- y - eta (grad f(y) + gamma (y - params)) + sign sqrt(2 T eta) xi``, ``[d]`` each."""
        center = flatten(params).detach()
        sample, noise_std = center, sign * math.sqrt(2 * self.temperature * self.step_size)
        for xi in probes(noise):
            with torch.no_grad():
                drift = gradient(loss_fn, unflatten(sample, params)) + self.gamma * (sample - center)
                sample = (sample - self.step_size * drift + noise_std * xi).detach()
            yield sample


def entropy_surrogate(params: Params, mean: Params, *, gamma: float) -> Tensor:
    """Return ``gamma/2 ||params - mean||^2``, whose gradient in ``params`` is exactly ``gamma (params - mean)``.

    Args:
        params: parameters by name.
        mean: mean ``mu`` of the local density, same names and shapes; treated as a constant.
        gamma: inverse squared radius of the neighbourhood.

    Example:
        >>> entropy_surrogate({"x": torch.tensor(0.7)}, {"x": torch.tensor(0.2)}, gamma=2.0)
        tensor(0.2500)
    """
    terms = [(param - mean[name].detach()).square().sum() for name, param in params.items()]
    return 0.5 * gamma * torch.stack(terms).sum()


def local_entropy(
    loss_fn: LossFn,
    params: Params,
    chain: EntropySurrogate,
    *,
    num_matvecs: int = 10,
    num_lanczos: int = 80,
    generator: torch.Generator | None = None,
) -> LocalEntropy:
    """Estimate the local entropy ``G`` of a loss and its gradient; neither is differentiable.

    The gradient is that of ``chain`` with the opposite sign.  The value is from the quadratic around
    ``params`` with gradient ``g`` and Hessian ``H``, with Lanczos for both terms,

        G ~ -f + 1/2 g^T (H + gamma I)^-1 g - T/2 ln det(H + gamma I) + T d/2 ln(2 pi T)

    Args:
        loss_fn: twice differentiable function of the parameters, 0-D value.
        params: parameters by name.
        chain: the Langevin chain, with ``gamma`` and ``T``; of positive temperature, the value is in nats for 1.
        num_matvecs: probes for the determinant.
        num_lanczos: Hessian-vector products per probe and for the quadratic form.
        generator: source of noise and probes.

    Raises:
        ValueError: a temperature of zero, a value out of range, no parameter, or a loss that is not 0-D.

    Example:
        >>> chain = EntropySurrogate(gamma=2.0)
        >>> local_entropy(lambda params: 1.5 * params["x"] ** 2, {"x": torch.tensor(0.7)}, chain).value
        tensor(-0.1798)
    """
    gamma, temperature = chain.gamma, chain.temperature
    check_positive(temperature=temperature)
    mean = chain.mean(loss_fn, params, chain.sample_noise(params, generator))
    with torch.no_grad():
        grad, dimension = gradient(loss_fn, params), num_coordinates(params)
        quadratic_form = _inverse_quadratic_form(loss_fn, params, grad, gamma, num_lanczos)
        nodes, weights = spectral_quadrature(
            loss_fn, params, num_matvecs=num_matvecs, num_lanczos=num_lanczos, generator=generator
        )
        log_det = dimension * _weighted(weights, torch.log(nodes + gamma)).mean()
        gaussian_volume = dimension * math.log(2 * math.pi * temperature)
        value = -loss_fn(params) + 0.5 * quadratic_form + 0.5 * temperature * (gaussian_volume - log_det)
        ascent = {name: gamma * (mean[name] - param) for name, param in params.items()}
    return LocalEntropy(value.detach(), ascent)


def _inverse_quadratic_form(loss_fn: LossFn, params: Params, grad: Tensor, gamma: float, num_lanczos: int) -> Tensor:
    """Return ``g^T (H + gamma I)^-1 g``, by the quadrature that starts from ``g``."""
    num_steps = min(num_lanczos, num_coordinates(params))
    nodes, weights = gauss_rule(hessian_operator(loss_fn, params), grad, num_steps)
    return grad.square().sum() * _weighted(weights, 1 / (nodes + gamma))


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Sum the last axis; nodes without weight (those after a breakdown) do not count, be their value infinite."""
    return torch.where(weights > 1e-12, weights * values, 0.0).sum(-1)
