"""The extreme eigenvalue of the Hessian, by Lanczos without a graph and one differentiable Rayleigh quotient.

    lambda = v^T H v,   d lambda = v^T (dH) v   for a normalised eigenvector v of a simple eigenvalue

so that a detached ``v`` gives the first-order gradient exactly, without a derivative of the iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ._curvature import hessian_operator
from ._lanczos import Krylov, eigh, lanczos
from ._measure import FlatnessMeasure, LossFn, Noise, Params
from ._vectors import check_positive, gaussian, num_coordinates, probes

Which = Literal["magnitude", "algebraic"]


@dataclass(frozen=True, kw_only=True)
class TopEigenvalue(FlatnessMeasure):
    """Spectral norm ``|lambda|`` of the Hessian: the largest magnitude of an eigenvalue, never negative.

    Lanczos with full reorthogonalisation from a random start, stopped after ``num_iterations`` products, or once the
    Ritz value changes by less than ``tol`` of itself; under vmap the batch runs until its last member has stopped,
    and members that have stopped are left as they are.  ``tol=0`` never looks at values (no device synchronisation).
    Memory: ``num_iterations * d``.  The estimate is a Rayleigh quotient, hence never above the truth.

    The gradient is the exact one of the Rayleigh quotient with ``v`` held fixed; it is that of the eigenvalue as far as
    ``v`` has converged and the eigenvalue is simple.

    References:
        Lanczos, 1950, https://doi.org/10.6028/jres.045.026; Yao et al., *PyHessian*, 2020,
        https://arxiv.org/abs/1912.07145

    Example:
        >>> measure = TopEigenvalue()
        >>> params = {"x": torch.tensor([1.0, -2.0])}
        >>> measure(lambda params: (params["x"] ** 3).sum(), params, measure.sample_noise(params)).round(decimals=3)
        tensor(12.)
    """

    as_penalty = {"tol": 0.0}  # an early stop looks at values, which a recorded step cannot

    num_iterations: int = 20
    tol: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(num_iterations=self.num_iterations)
        if not self.tol >= 0:
            raise ValueError(f"tol must be >= 0, got {self.tol}")

    def sample_noise(self, params: Params, generator: torch.Generator | None = None) -> Noise:
        """Draw a normal start vector."""
        return gaussian(params, 1, generator)

    def __call__(self, loss_fn: LossFn, params: Params, noise: Noise) -> Tensor:
        """Return ``|v^T H v|``."""
        return self.rayleigh_quotient(loss_fn, params, noise).abs()

    def rayleigh_quotient(self, loss_fn: LossFn, params: Params, noise: Noise, which: Which = "magnitude") -> Tensor:
        """Return the signed ``v^T H v`` of the eigenvalue that is extreme in magnitude, or the largest one."""
        with torch.no_grad():
            vector = self._eigenvector(loss_fn, params, probes(noise)[0], which).detach()
        return vector @ hessian_operator(loss_fn, params)(vector)

    def _eigenvector(self, loss_fn: LossFn, params: Params, start: Tensor, which: Which) -> Tensor:
        num_steps = min(self.num_iterations, num_coordinates(params))
        vector, value = torch.zeros_like(start), start.new_tensor(torch.inf)
        done = torch.zeros_like(value, dtype=torch.bool)
        for krylov in lanczos(hessian_operator(loss_fn, params), start, num_steps):
            new_value, new_vector = _extreme_ritz_pair(krylov, which)
            vector = torch.where(done, vector, new_vector)
            done = done | ((new_value - value).abs() <= self.tol * new_value.abs())
            value = new_value
            if self.tol > 0 and bool(_All.apply(done)):
                break
        return vector


def top_eigenvalue(
    loss_fn: LossFn,
    params: Params,
    *,
    num_iterations: int = 100,
    tol: float = 1e-3,
    which: Which = "magnitude",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate an extreme eigenvalue of the Hessian, signed, 0-D, in units of loss over squared parameter.

    With ``which="magnitude"`` the eigenvalue largest in absolute value: it is negative where the strongest curvature
    is. With ``which="algebraic"`` the largest eigenvalue.  At a minimum both agree.  See :class:`TopEigenvalue` for
    the method and for what its gradient is.

    Args:
        loss_fn: twice differentiable function of the parameters, 0-D value.
        params: parameters by name.
        num_iterations: largest number of Hessian-vector products; one more is taken with a graph.
        tol: relative change of the Ritz value at which to stop.
        which: "magnitude" or "algebraic".
        generator: source of the start vector.

    Raises:
        ValueError: a value out of range, no parameter, or a loss that is not 0-D.

    Example:
        >>> def loss_fn(params):
        ...     return (params["x"] ** 3).sum()
        >>> params = {"x": torch.tensor([1.0, -2.0])}
        >>> top_eigenvalue(loss_fn, params).round(decimals=3)
        tensor(-12.)
        >>> top_eigenvalue(loss_fn, params, which="algebraic").round(decimals=3)
        tensor(6.)
    """
    if which not in ("magnitude", "algebraic"):
        raise ValueError(f"which must be 'magnitude' or 'algebraic', got {which!r}")
    measure = TopEigenvalue(num_iterations=num_iterations, tol=tol)
    return measure.rayleigh_quotient(loss_fn, params, measure.sample_noise(params, generator), which)


def _extreme_ritz_pair(krylov: Krylov, which: Which) -> tuple[Tensor, Tensor]:
    matrix = krylov.tridiagonal
    if which == "algebraic":  # below the first Rayleigh quotient, the zeros that follow a breakdown cannot win
        floor = 2 * matrix[0, 0].clamp(max=0)
        matrix = matrix + torch.diag(torch.where((krylov.basis == 0).all(1), floor, 0.0))
    values, vectors = eigh(matrix)
    index = torch.argmax(values.abs() if which == "magnitude" else values).reshape(1)
    vector = torch.index_select(vectors, 1, index)[:, 0] @ krylov.basis
    return torch.index_select(values, 0, index)[0], vector


class _All(torch.autograd.Function):
    """``all`` over a tensor and over every vmap axis around it, which makes the result a plain tensor."""

    @staticmethod
    def forward(done: Tensor) -> Tensor:
        return done.all()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], done: Tensor) -> tuple[Tensor, None]:
        return _All.apply(done), None
