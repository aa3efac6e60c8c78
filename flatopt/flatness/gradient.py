"""The norm of the gradient: ``||g||`` and, as a penalty, the mean square ``||g||^2 / d``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._curvature import gradient
from ._measure import FlatnessMeasure, LossFn, Noise, Params
from ._vectors import num_coordinates


@dataclass(frozen=True, kw_only=True)
class GradientNorm(FlatnessMeasure):
    """Mean squared gradient ``||g||^2 / d``, with gradient ``2 H g / d``.

    Never negative, no randomness; one gradient to evaluate.  Fully differentiable.

    References:
        Barrett and Dherin, *Implicit gradient regularization*, 2021, https://arxiv.org/abs/2009.11162

    Example:
        >>> GradientNorm()(lambda params: params["x"].square().sum(), {"x": torch.tensor([1.0, 3.0])}, {})
        tensor(20.)
    """

    def __call__(self, loss_fn: LossFn, params: Params, noise: Noise) -> Tensor:
        """Return ``||g||^2 / d``."""
        return gradient(loss_fn, params).square().sum() / num_coordinates(params)


def gradient_norm(loss_fn: LossFn, params: Params) -> Tensor:
    """Return the Euclidean norm ``||g||`` of the gradient over all parameters jointly, 0-D, in units of loss.

    Differentiable (with derivative 0 where the gradient vanishes).

    Args:
        loss_fn: differentiable function of the parameters, 0-D value.
        params: parameters by name.

    Raises:
        ValueError: there is no parameter, or the loss is not 0-D.

    Example:
        >>> gradient_norm(lambda params: params["x"].square().sum(), {"x": torch.tensor([3.0, 4.0])})
        tensor(10.)
    """
    num_coordinates(params)
    return torch.linalg.vector_norm(gradient(loss_fn, params))
