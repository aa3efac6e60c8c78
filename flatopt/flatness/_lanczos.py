"""The Lanczos iteration with full reorthogonalisation, as pure functions that vmap accepts.

    w = H q_j,   alpha_j = q_j^T w,   beta_j q_{j+1} = w - Q Q^T w,   T = tridiag(alpha, beta) = Q^T H Q

Reference: Golub and Van Loan, *Matrix Computations*, 4th edition 2013, chapter 10.

Shape legend: ``d`` coordinates, ``k`` steps taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Krylov(NamedTuple):
    """What ``k`` steps have found.  After a breakdown the rest of ``basis`` and of ``tridiagonal`` is zero."""

    tridiagonal: Tensor
    """``T``, ``[k, k]``."""
    basis: Tensor
    """``Q`` transposed, orthonormal rows, ``[k, d]``."""


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, num_steps: int) -> Iterator[Krylov]:
    """Yield the projection of a symmetric operator on Krylov spaces of dimension 1, 2, ..., ``num_steps``.

    When ``beta`` falls to rounding level, the Krylov space is invariant and ``T`` is exact on it.  Vectors after that
    are set to zero, not drawn anew: what is added to ``T`` is decoupled and has no weight in the start vector.

    Args:
        matvec: ``[d] -> [d]``.
        start: first direction ``[d]``, not necessarily normalised.
        num_steps: how many products to take at most.
    """
    vectors = [_direction(start, torch.linalg.vector_norm(start), torch.zeros_like(start[0]))]
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    scale = start.new_zeros(())
    for _ in range(num_steps):
        basis = torch.stack(vectors)
        residual = matvec(vectors[-1])
        diagonal.append(vectors[-1] @ residual)
        yield Krylov(_tridiagonal(diagonal, off_diagonal), basis)
        for _ in range(2):  # twice is enough for orthogonality to rounding error
            residual = residual - basis.mT @ (basis @ residual)
        beta = torch.linalg.vector_norm(residual)
        scale = torch.maximum(scale, torch.maximum(diagonal[-1].abs(), beta))
        threshold = 10 * torch.finfo(start.dtype).eps * scale
        off_diagonal.append(torch.where(beta > threshold, beta, 0.0))
        vectors.append(_direction(residual, beta, threshold))


def eigh(tridiagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[k]``, ascending, and eigenvectors ``[k, k]`` in columns; NaN for what is not finite.

    ``torch.linalg.eigh`` raises on NaN, and one diverged problem of a batch must not stop the others.
    """
    values, vectors = torch.linalg.eigh(torch.nan_to_num(tridiagonal))
    return torch.where(tridiagonal.isfinite().all(), values, torch.nan), vectors


def _direction(vector: Tensor, norm: Tensor, threshold: Tensor) -> Tensor:
    """Return ``vector / norm``, or zero if the norm is not above the threshold."""
    return torch.where(norm > threshold, vector / torch.where(norm > threshold, norm, 1.0), 0.0)


def _tridiagonal(diagonal: list[Tensor], off_diagonal: list[Tensor]) -> Tensor:
    matrix = torch.diag(torch.stack(diagonal))
    if not off_diagonal:
        return matrix
    beta = torch.stack(off_diagonal)
    return matrix + torch.diag(beta, 1) + torch.diag(beta, -1)
