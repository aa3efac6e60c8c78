"""Parameters that are no network's, fitted directly: kernels, poses, pictures, factors.

All of the problem is in each step, and what is measured is the loss at the end.  The seed decides the problem too;
those of the ``meta`` split have other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatopt.evaluate.compare import Problem
from flatopt.tasks import Batch

from . import SEED_OF_DATA, generator


class Fitted(nn.Module):
    """Parameters by name, and the loss as a function of them."""

    def __init__(self, loss: Callable[..., Tensor], **params: Tensor) -> None:
        super().__init__()
        self.loss = loss
        self.fitted = nn.ParameterDict(params)

    def forward(self) -> Tensor:
        """Return the loss."""
        return self.loss(**self.fitted)


def _problem(model: nn.Module) -> Problem:
    everything = [Batch(torch.zeros(1), torch.zeros(1))]
    return Problem(model, everything, everything, lambda model, _: model())


def _random(seed: int, split: str) -> torch.Generator:
    return generator(seed + SEED_OF_DATA * (split != "test"))


def gaussian_process(seed: int, split: str = "test") -> Problem:
    """Return the marginal likelihood of a Gaussian process, in nats per row, by lengths, amplitude and noise."""
    random = _random(seed, split)
    inputs = 4 * torch.rand(120, 4, generator=random)
    targets = torch.sin(2 * inputs[:, 0]) + 0.3 * inputs[:, 1] + 0.1 * torch.randn(120, generator=random)

    def loss(lengths: Tensor, amplitude: Tensor, noise: Tensor) -> Tensor:
        scaled = inputs / lengths.exp()
        squares = (scaled[:, None] - scaled).square().sum(-1)
        covariance = amplitude.exp() * torch.exp(-squares / 2) + (noise.exp() + 1e-5) * torch.eye(120)
        root = torch.linalg.cholesky(covariance)
        fit = targets @ torch.cholesky_solve(targets[:, None], root)[:, 0] / 2
        return (fit + root.diagonal().log().sum()) / 120 + math.log(2 * math.pi) / 2

    return _problem(Fitted(loss, lengths=torch.zeros(4), amplitude=torch.zeros(()), noise=torch.zeros(())))


def pose(seed: int, split: str = "test") -> Problem:
    """Return rotation and translation between two clouds of 200 points."""
    random = _random(seed, split)
    points = torch.randn(200, 3, generator=random)

    def moved(turn: Tensor, shift: Tensor) -> Tensor:
        angle = turn.norm() + 1e-8
        x, y, z = turn / angle
        cross = torch.stack([0 * x, -z, y, z, 0 * x, -x, -y, x, 0 * x]).view(3, 3)
        rotation = torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) * cross @ cross
        return points @ rotation.T + shift

    target = moved(torch.randn(3, generator=random), 5 * torch.randn(3, generator=random))
    model = Fitted(lambda **found: F.mse_loss(moved(**found), target), turn=torch.full((3,), 0.1), shift=torch.zeros(3))
    return _problem(model)


def picture(seed: int, split: str = "test") -> Problem:
    """Return a picture of 32 x 32 that is to have the features of another one, under a random network."""
    random = _random(seed, split)
    filters = [torch.randn(shape, generator=random) / 5 for shape in ((16, 1, 5, 5), (32, 16, 3, 3))]

    def features(pixels: Tensor) -> Tensor:
        hidden = F.relu(F.conv2d(pixels, filters[0], stride=2, padding=2))
        return F.conv2d(hidden, filters[1], stride=2, padding=1)

    axis = torch.linspace(-3, 3, 32)
    wanted = features((torch.sin(2 * axis[:, None]) * torch.cos(3 * axis))[None, None])
    start = 0.1 * torch.randn(1, 1, 32, 32, generator=random)
    return _problem(Fitted(lambda pixels: F.mse_loss(features(pixels), wanted), pixels=start))


def banana(seed: int, split: str = "test", size: int = 50) -> Problem:
    """Return Rosenbrock's function of 50 numbers, per number."""

    def loss(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum() / size

    return _problem(Fitted(loss, x=torch.randn(size, generator=_random(seed, split))))


def scaled_logistic(seed: int, split: str = "test") -> Problem:
    """Return logistic regression on all of 500 rows; inputs have scales from 0.1 to 10."""
    random = _random(seed, split)
    inputs = torch.randn(500, 30, generator=random) * torch.logspace(-1, 1, 30)
    noise = 0.5 * torch.randn(500, generator=random)
    targets = (inputs @ torch.randn(30, generator=random) / 5 + noise > 0).float()

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        fit = F.binary_cross_entropy_with_logits(inputs @ weight + bias, targets)
        return fit + 1e-3 * weight.square().sum()

    return _problem(Fitted(loss, weight=torch.zeros(30), bias=torch.zeros(())))


def positive_factors(seed: int, split: str = "test") -> Problem:
    """Return a matrix of 60 x 80 as a product of two positive ones of rank 8."""
    random = _random(seed, split)
    target = torch.rand(60, 8, generator=random) @ torch.rand(8, 80, generator=random)

    def loss(left: Tensor, right: Tensor) -> Tensor:
        return F.mse_loss(F.softplus(left) @ F.softplus(right), target)

    left, right = torch.randn(60, 8, generator=random), torch.randn(8, 80, generator=random)
    return _problem(Fitted(loss, left=left, right=right))


def tensor_factors(seed: int, split: str = "test") -> Problem:
    """Return a tensor of 20 x 25 x 30 with noise as a sum of 5 products."""
    random = _random(seed, split)
    sizes = {"left": 20, "middle": 25, "right": 30}
    true = {name: torch.randn(size, 5, generator=random) for name, size in sizes.items()}
    start = {name: 0.5 * torch.randn(size, 5, generator=random) for name, size in sizes.items()}

    def product(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("ir,jr,kr->ijk", left, middle, right)

    target = product(**true) + 0.1 * torch.randn(20, 25, 30, generator=random)
    return _problem(Fitted(lambda **found: F.mse_loss(product(**found), target), **start))


def map_of_distances(seed: int, split: str = "test") -> Problem:
    """Return places of 100 points in the plane whose distances are as in ten dimensions, as nearly as can be."""
    random = _random(seed, split)
    points = torch.randn(100, 10, generator=random)
    distances = torch.pdist(points)
    start = torch.randn(100, 2, generator=random)
    return _problem(Fitted(lambda places: F.mse_loss(torch.pdist(places), distances), places=start))
