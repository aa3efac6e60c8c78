"""The spectral density of the Hessian by stochastic Lanczos quadrature (SLQ).

    trace(f(H)) / d  =  E_z [ z^T f(H) z ]  ~  (1/n) sum_i sum_k w_ik f(lambda_ik),   ||z|| = 1

with Ritz values ``lambda_ik`` of the tridiagonal matrix of probe ``i`` and ``w_ik`` the squared first entries of its
eigenvectors.  The rule is exact in each probe for polynomials up to degree ``2 num_lanczos - 1``.

References: Ghorbani, Krishnan and Xiao, *An investigation into neural net optimization via Hessian eigenvalue
density*, 2019, https://arxiv.org/abs/1901.10159; Papyan, *Traces of class/cross-class structure pervade deep learning
spectra*, 2020, https://arxiv.org/abs/2008.11865
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ._curvature import hessian_operator
from ._lanczos import eigh, lanczos
from ._measure import FlatnessMeasure, LossFn, Noise, Params
from ._vectors import check_positive, num_coordinates, probes, rademacher

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Quadrature(NamedTuple):
    """Nodes and weights, ``[num_matvecs, num_lanczos]`` each; the weights of a row sum to 1."""

    nodes: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class SpectralPenalty(FlatnessMeasure):
    """Mean size of the eigenvalues by quadrature, ``trace(h(H)) / d`` with ``h(x) = |x|`` or ``max(x, 0)``.

    With ``s(x) = h(x) / x``, the sign or the step function, each probe of signs gives

        u = s(H) z  ~  ||z|| Q s(T) e_1,      R = u^T H z / d

    where the Lanczos iteration that finds ``u`` has no graph and ``u`` is held fixed.  The value is that of the
    quadrature rule, never negative, and as ``h`` is homogeneous its gradient ``z^T s(H) dH z / d`` is an unbiased
    estimate of that of ``trace(h(H)) / d``, as far as ``num_lanczos`` resolves the spectrum.  ``h(x) = x`` and
    ``h(x) = x^2`` need no quadrature: :class:`HutchinsonTrace`, :class:`SquaredTrace`.

    Cost: ``num_lanczos + 1`` Hessian-vector products per probe.

    Attributes:
        function: ``"magnitude"`` for ``|x|``, ``"positive"`` for ``max(x, 0)``.
        num_matvecs: number of probes.
        num_lanczos: steps of the iteration, at most ``d``.

    References:
        Ghorbani et al., 2019, https://arxiv.org/abs/1901.10159

    Example:
        >>> params = {"x": torch.tensor([1.0, -2.0])}
        >>> measure = SpectralPenalty()
        >>> measure(lambda params: (params["x"] ** 3).sum(), params, measure.sample_noise(params)).round(decimals=3)
        tensor(9.)
    """

    function: Literal["magnitude", "positive"] = "magnitude"
    num_matvecs: int = 1
    num_lanczos: int = 10

    def __post_init__(self) -> None:
        check_positive(num_matvecs=self.num_matvecs, num_lanczos=self.num_lanczos)
        if self.function not in ("magnitude", "positive"):
            raise ValueError(f"function must be 'magnitude' or 'positive', got {self.function!r}")

    def sample_noise(self, params: Params, generator: torch.Generator | None = None) -> Noise:
        """Draw ``num_matvecs`` vectors of signs."""
        return rademacher(params, self.num_matvecs, generator)

    def __call__(self, loss_fn: LossFn, params: Params, noise: Noise) -> Tensor:
        """Return the mean of ``u^T H z / d``."""
        hessian = hessian_operator(loss_fn, params)
        values = [self._filtered(loss_fn, params, z) @ hessian(z) for z in probes(noise)]
        return torch.stack(values).mean() / num_coordinates(params)

    def _filtered(self, loss_fn: LossFn, params: Params, z: Tensor) -> Tensor:
        """Return ``u``."""
        with torch.no_grad():
            num_steps = min(self.num_lanczos, num_coordinates(params))
            krylov = deque(lanczos(hessian_operator(loss_fn, params), z, num_steps), maxlen=1).pop()
            nodes, vectors = eigh(krylov.tridiagonal)
            signs = nodes.sign() if self.function == "magnitude" else (nodes > 0).to(nodes)
            # NaN nodes, of a loss that is not finite, must stay NaN.
            signs = torch.where(nodes.isfinite(), signs, nodes)
            return (torch.linalg.vector_norm(z) * ((vectors @ (signs * vectors[0])) @ krylov.basis)).detach()


class SpectralDensity(NamedTuple):
    """A density over eigenvalues that integrates to 1."""

    grid: Tensor
    """Eigenvalues, ascending and equidistant, ``[num_points]``."""
    density: Tensor
    """Share of eigenvalues per unit of eigenvalue, ``[num_points]``."""


def spectral_quadrature(
    loss_fn: LossFn,
    params: Params,
    *,
    num_matvecs: int = 10,
    num_lanczos: int = 80,
    generator: torch.Generator | None = None,
) -> Quadrature:
    """Return nodes and weights such that ``(weights * f(nodes)).sum(1).mean()`` estimates ``trace(f(H)) / d``.

    Not differentiable.  Arguments as in :func:`spectral_density`.

    Example:
        >>> params = {"x": torch.tensor([1.0, 2.0])}
        >>> nodes, weights = spectral_quadrature(lambda params: (params["x"] ** 3).sum(), params, num_matvecs=1)
        >>> nodes.round(decimals=3), weights.round(decimals=3)  # eigenvalues 6 and 12
        (tensor([[ 6., 12.]]), tensor([[0.5000, 0.5000]]))
    """
    check_positive(num_matvecs=num_matvecs, num_lanczos=num_lanczos)
    num_steps = min(num_lanczos, num_coordinates(params))
    with torch.no_grad():
        matvec = hessian_operator(loss_fn, params)
        starts = probes(rademacher(params, num_matvecs, generator))
        rules = [gauss_rule(matvec, start, num_steps) for start in starts]
    return Quadrature(*(torch.stack(parts).detach() for parts in zip(*rules, strict=True)))


def spectral_density(
    loss_fn: LossFn,
    params: Params,
    *,
    num_matvecs: int = 10,
    num_lanczos: int = 80,
    num_points: int = 1024,
    width: float = 0.01,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues of the Hessian.

    Each quadrature node becomes a Gaussian, so that peaks are ``width`` of the range wide.  Not differentiable.

    Args:
        loss_fn: twice differentiable function of the parameters, 0-D value.
        params: parameters by name.
        num_matvecs: number of random probes to average over.
        num_lanczos: Hessian-vector products per probe, at most ``d``; memory ``num_lanczos * d``.
        num_points: length of the grid.
        width: standard deviation of the Gaussians, as a share of the range of the nodes (or of ``max(1, |lambda|)``,
            if all nodes agree).
        generator: source of the probes.

    Returns:
        ``(grid, density)``; their integral by the trapezoidal rule is 1.

    Raises:
        ValueError: a value out of range, no parameter, or a loss that is not 0-D.

    Example:
        >>> params = {"x": torch.tensor([1.0, 2.0])}
        >>> grid, density = spectral_density(lambda params: (params["x"] ** 3).sum(), params)
        >>> torch.trapezoid(density, grid).round(decimals=3)
        tensor(1.)
    """
    check_positive(width=width)
    if num_points < 2:
        raise ValueError(f"num_points must be > 1, got {num_points}")
    nodes, weights = spectral_quadrature(
        loss_fn, params, num_matvecs=num_matvecs, num_lanczos=num_lanczos, generator=generator
    )
    spread, level = nodes.max() - nodes.min(), nodes.abs().max().clamp(min=1.0)
    std = width * torch.where(spread > 1e-6 * level, spread, level)
    unit = torch.linspace(0, 1, num_points, dtype=nodes.dtype, device=nodes.device)
    low, high = nodes.min() - 5 * std, nodes.max() + 5 * std
    grid = low + (high - low) * unit
    bumps = torch.exp(-0.5 * ((grid[:, None] - nodes.flatten()) / std).square())
    density = bumps @ weights.flatten()
    return SpectralDensity(grid, density / torch.trapezoid(density, grid))


def plot_spectral_density(grid: Tensor, density: Tensor, *, ax: Axes | None = None) -> Axes:
    """Plot a spectral density on a logarithmic axis, for bulk and outliers to be seen together; needs matplotlib.

    Args:
        grid: eigenvalues ``[num_points]``.
        density: their density ``[num_points]``.
        ax: where to draw; a new figure if ``None``.

    Returns:
        The axes drawn on.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        ax = plt.subplots()[1]
    ax.semilogy(grid.cpu(), density.clamp(min=1e-8 * float(density.max())).cpu())
    ax.set(xlabel="eigenvalue of the Hessian", ylabel="density")
    return ax


def gauss_rule(matvec: Callable[[Tensor], Tensor], start: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the quadrature of one probe: Ritz values and squared first entries of the eigenvectors of ``T``."""
    krylov = deque(lanczos(matvec, start, num_steps), maxlen=1).pop()
    nodes, vectors = eigh(krylov.tridiagonal)
    return nodes, vectors[0].square()
