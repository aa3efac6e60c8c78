"""The contract of an inner problem: an optimizee (a pure model), batches from three splits, and losses.

Everything is a pure function of dicts of tensors, so ``torch.func.vmap`` runs many problems at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Parameters of an optimizee by name, with the names and shapes that the ``torch.nn`` modules use."""

Split = Literal["train", "meta", "test"]
"""``train`` for inner steps, ``meta`` for meta-objectives, ``test`` for reported results; disjoint."""

SPLITS: tuple[Split, ...] = ("train", "meta", "test")


class Batch(NamedTuple):
    """Inputs and what should be predicted from them."""

    inputs: Tensor
    """``[B, ...]``."""
    targets: Tensor
    """``[B, ...]``: int64 classes, or float values."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True, kw_only=True)
class Optimizee(ABC):
    """A model as two pure functions; fields are its static shape."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> Params:
        """Return fresh float32 parameters on the generator's device."""

    @abstractmethod
    def predict(self, params: Params, inputs: Tensor) -> Tensor:
        """Return outputs ``[B, ..., K]`` for inputs ``[B, ...]``; accepted by ``vmap``, ``grad`` and ``compile``."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over ``[...]`` targets of ``-log softmax(logits)[target]`` for logits ``[..., K]``.

    Example:
        >>> cross_entropy(torch.zeros(3, 10), torch.tensor([0, 5, 9]))
        tensor(2.3026)
    """
    # A comparison, not a gather: the backward pass of a gather is a scatter, which is slow under vmap on CPUs.
    chosen = targets.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)
    return -torch.where(chosen, torch.log_softmax(logits, -1), 0.0).sum(-1).mean()


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the fraction of the ``[...]`` targets that are the largest of the logits ``[..., K]``."""
    return (logits.argmax(-1) == targets).to(logits.dtype).mean()


def mean_squared_error(values: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of ``(values - targets)^2``."""
    return (values - targets).square().mean()
