"""The contract of inner training that backpropagation can differentiate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..rules import Weights

InnerState = Any
"""Nested dicts and named tuples of tensors."""


class Inner(ABC):
    """Inner training, cut in truncations: what the estimator differentiates."""

    @abstractmethod
    def reset(self, weights: Weights, generator: torch.Generator, num_steps: int | None = None) -> InnerState:
        """Return fresh inner problems.  Called once, before the first truncation."""

    @abstractmethod
    def refresh(
        self, weights: Weights, state: InnerState, generator: torch.Generator, num_steps: int | None = None
    ) -> InnerState:
        """Replace the problems that have reached their horizon by fresh ones.  Called before each truncation.

        Initial states that depend on the weights are differentiated through.
        """

    @abstractmethod
    def draw(self, state: InnerState, generator: torch.Generator) -> Any:
        """Draw the batches and the noise of one truncation: all its randomness."""

    @abstractmethod
    def unroll(self, weights: Weights, state: InnerState, draws: Any) -> tuple[Tensor, InnerState, dict[str, float]]:
        """Run one truncation; pure and differentiable with respect to ``weights``.

        Returns:
            The 0-D mean meta-loss over problems and steps, the state afterwards, and further numbers for the log.
        """
