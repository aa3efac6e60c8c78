"""The contract of a meta-gradient estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...rules import Weights

EstimatorState = Any
"""What an estimator carries from update to update, saved with the checkpoint: nested dicts and named tuples of tensors,
the latter of the types that :mod:`flatopt.metatrain.checkpoint` knows."""

Track = Callable[[Sequence[str], str], Iterable[str]]
"""``track(names, doing)`` yields the names, and may show which one is being worked on."""


def untracked(names: Sequence[str], doing: str) -> Iterable[str]:
    """Show nothing."""
    return names


class MetaGradient(NamedTuple):
    """What one meta-update learns from."""

    gradient: Weights
    """Estimated gradient of the meta-loss, one tensor per weight."""
    loss: Tensor
    """0-D mean meta-loss of this update."""
    metrics: dict[str, float]
    """Further numbers for the log."""


class GradientEstimator(ABC):
    """Estimates the gradient of the meta-loss with respect to the weights of a rule.

    Everything that changes from update to update is in the state or drawn from ``generator``, so that a run resumed
    from both goes on bit for bit.
    """

    def prepare(self, weights: Weights) -> None:  # noqa: B027, nothing to do for most
        """Do what takes long and decides nothing, such as compiling.  Called once per session, before all else.

        Args:
            weights: some weights, on the device to compute on.
        """

    @abstractmethod
    def init(self, weights: Weights, generator: torch.Generator, num_steps: int | None = None) -> EstimatorState:
        """Return the state before the first update: fresh inner problems.

        Args:
            weights: the rule's first weights, on the device to compute on.
            generator: source of all randomness, on the CPU.
            num_steps: steps of the inner runs, by the stage of a curriculum; ``None`` without one.
        """

    @abstractmethod
    def estimate(
        self, weights: Weights, state: EstimatorState, generator: torch.Generator, num_steps: int | None = None
    ) -> tuple[MetaGradient, EstimatorState]:
        """Return the meta-gradient at ``weights`` and the next state.  Called once per meta-update.

        Args:
            weights: overwritten by the meta-optimizer after the call: nothing returned may share their storage.
            state: what ``init`` or the last call returned; not changed.
            generator: source of all randomness, on the CPU.
            num_steps: steps of the inner runs that start from now on, by the stage of a curriculum.
        """
