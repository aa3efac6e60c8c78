"""Gradients and Hessian-vector products, the only derivatives that the measures take.

Reverse mode over reverse mode, with ``torch.func``: it accepts every twice differentiable operation, nests in vmap,
and stays differentiable from outside.  (``torch.autograd.grad`` does not run under vmap, and forward mode lacks
operations.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ._measure import LossFn, Params
from ._vectors import flatten, num_coordinates, unflatten


@dataclass(frozen=True, kw_only=True)
class MeanLoss:
    """A weighted sum of loss functions, differentiated one term after the other.

    It is what :func:`flatopt.flatness.module_loss` makes of a data loader: memory holds the graph of one batch only, as
    long as nothing is differentiated from outside.
    """

    terms: Sequence[LossFn]
    weights: Sequence[float]

    def __call__(self, params: Params) -> Tensor:
        """Return ``sum_i weights[i] * terms[i](params)``."""
        return torch.stack([weight * term(params) for weight, term in self._pairs()]).sum()

    def map(self, function: Callable[[LossFn], Tensor]) -> Tensor:
        """Return ``sum_i weights[i] * function(terms[i])``, for functions linear in the loss."""
        return reduce(torch.add, (weight * function(term) for weight, term in self._pairs()))

    def _pairs(self) -> list[tuple[float, LossFn]]:
        return list(zip(self.weights, self.terms, strict=True))


def scalar(loss_fn: LossFn) -> LossFn:
    """Return ``loss_fn`` with a check that its value is 0-D."""

    def checked(params: Params) -> Tensor:
        loss = loss_fn(params)
        if not isinstance(loss, Tensor) or loss.shape != ():
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a 0-D tensor, got {got}")
        return loss

    return checked


def gradient(loss_fn: LossFn, params: Params) -> Tensor:
    """Return the gradient as a vector ``[d]``."""
    if isinstance(loss_fn, MeanLoss):
        return loss_fn.map(lambda term: gradient(term, params))
    return flatten(torch.func.grad(scalar(loss_fn))(params))


def hessian_operator(loss_fn: LossFn, params: Params) -> Callable[[Tensor], Tensor]:
    """Return ``v -> H v`` on vectors ``[d]``.

    The loss is linearised once, and each product costs one more backward pass; terms of a :class:`MeanLoss` are
    linearised again in each product, which is slower but keeps one batch in memory at a time.
    """
    if isinstance(loss_fn, MeanLoss):
        return lambda vector: loss_fn.map(lambda term: hessian_operator(term, params)(vector))
    product = torch.func.vjp(torch.func.grad(scalar(loss_fn)), params)[1]
    return lambda vector: flatten(product(unflatten(vector, params))[0])  # H is symmetric: H^T v = H v


def hvp(loss_fn: LossFn, params: Params, vector: Params) -> Params:
    """Return the product of the Hessian of ``loss_fn`` at ``params`` with ``vector``.

    Differentiable in ``params``, in ``vector``, and in what ``loss_fn`` closes over.

    Args:
        loss_fn: twice differentiable function of the parameters, 0-D value.
        params: parameters by name, any shapes.
        vector: tensors with the names and shapes of ``params``.

    Returns:
        ``H v``, with the names and shapes of ``params``.

    Raises:
        ValueError: names or shapes differ, there is no parameter, or the loss is not 0-D.

    Example:
        >>> hvp(lambda params: (params["x"] ** 3).sum(), {"x": torch.tensor([1.0, 2.0])}, {"x": torch.ones(2)})
        {'x': tensor([ 6., 12.])}

    References:
        Pearlmutter, *Fast exact multiplication by the Hessian*, 1994, https://doi.org/10.1162/neco.1994.6.1.147
    """
    num_coordinates(params)
    shapes, expected = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (vector, params))
    if shapes != expected:
        raise ValueError(f"vector must have the names and shapes of params, {expected}, got {shapes}")
    ordered = flatten({name: vector[name] for name in params})
    return unflatten(hessian_operator(loss_fn, params)(ordered), params)
