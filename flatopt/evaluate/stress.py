"""Hard ways to train one small network, for the table of divergence: extreme batches, scales, noise, odd parameters.

Each changes one thing about a perceptron on digits.  Losses are those before any scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ._data import SOURCES
from ._training import build_model, cross_entropy
from .contestants import Contestant, Setting
from .models import NUM_CLASSES, mlp

TAIL = 1.5
"""Exponent of the tail of the noise."""

VOCABULARY = 5000


@dataclass(frozen=True, kw_only=True)
class Stress:
    """One hard way to train.

    Args:
        name: name in the table.
        build: makes the model of the side of the images.
        batch_size: examples per step, drawn with replacement.
        num_steps: length of the run.
        loss_scale: what the loss is multiplied by before its gradient is taken.
        noise: heavy-tailed noise on the gradient of each tensor, as a multiple of its root mean square.
        change_data: replace each class by the next one in the middle of the run.
    """

    name: str
    build: Callable[[int], nn.Module] = mlp
    batch_size: int = 64
    num_steps: int = 150
    loss_scale: float = 1.0
    noise: float = 0.0
    change_data: bool = False


class Tied(nn.Module):
    """Two layers that share a square matrix, the second one transposed."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(size * size, size * size), nn.Linear(size * size, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, 10]``."""
        hidden = torch.relu(self.first(images.flatten(1)))
        return self.last(torch.relu(hidden @ self.first.weight.T.contiguous()))


class SparseEmbedding(nn.Module):
    """A table of embeddings of which a step sees few rows: each pixel and its grey level is a word."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 32)
        self.last = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, 10]``."""
        pixels = images.flatten(1)
        levels = (8 * pixels).round().long().clamp(-30, 30) + 30
        places = torch.arange(pixels.shape[1]) * 61
        logits: Tensor = self.last(self.words((places + levels) % VOCABULARY).mean(1))
        return logits


def frozen(size: int) -> nn.Module:
    """Build a perceptron whose first layer is not trained, and gets no gradient."""
    model = mlp(size)
    for param in model[1].parameters():
        param.requires_grad_(False)
    return model


def odd_shapes(size: int) -> nn.Module:
    """Build a network with one-row, one-column and 1x1 weights."""
    narrow = [nn.Linear(size * size, 1), nn.Tanh(), nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES)]
    return nn.Sequential(nn.Unflatten(1, (1, size)), nn.Conv2d(1, 1, 1), nn.Flatten(), *narrow)


STRESSES: tuple[Stress, ...] = (
    *(Stress(name=f"batch {size}", batch_size=size) for size in (1, 4, 512, 4096)),
    *(Stress(name=f"loss times {scale:g}", loss_scale=scale) for scale in (1e-6, 1e-3, 1e3, 1e6)),
    *(Stress(name=f"heavy-tailed noise, {noise:g}", noise=noise) for noise in (0.3, 1.0)),
    Stress(name="other data from the middle on", change_data=True, num_steps=300),
    Stress(name="tied weights", build=Tied),
    Stress(name="frozen first layer", build=frozen),
    Stress(name="embeddings seldom seen", build=SparseEmbedding, num_steps=300),
    Stress(name="one row, one column, 1x1", build=odd_shapes),
    Stress(name="20,000 steps", batch_size=16, num_steps=20_000),
)


def stress_losses(stress: Stress, contestant: Contestant, setting: Setting, seed: int) -> list[float]:
    """Return the loss of each step; stops at the first one that is not finite."""
    train = SOURCES["digits"](8).train
    model = build_model(stress.build, 8, seed)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = contestant.build(model.parameters(), setting.lr, stress.num_steps, seed, **dict(setting.options))
    scheduler = CosineAnnealingLR(optimizer, stress.num_steps) if setting.cosine else None
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(stress.num_steps):
        chosen = torch.randint(len(train.targets), (stress.batch_size,), generator=generator)
        shift = 1 if stress.change_data and step >= stress.num_steps // 2 else 0
        targets = (train.targets[chosen] + shift) % NUM_CLASSES
        optimizer.zero_grad()
        loss = cross_entropy(model(train.inputs[chosen]), targets)
        (stress.loss_scale * loss).backward()
        if stress.noise:
            add_noise(params, stress.noise, generator)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return losses


def add_noise(params: list[nn.Parameter], multiple: float, generator: torch.Generator) -> None:
    """Add to each gradient ``multiple`` times its root mean square times a normal and a Pareto number.

    The tail of the product falls as ``|x|^-TAIL``: with an exponent below 2 it has no variance.
    """
    for param in params:
        if param.grad is None:
            continue
        normal = torch.randn(param.shape, generator=generator)
        heavy = torch.rand(param.shape, generator=generator).clamp_min(1e-7) ** (-1 / TAIL)
        param.grad.add_(multiple * param.grad.square().mean().sqrt() * normal * heavy)
