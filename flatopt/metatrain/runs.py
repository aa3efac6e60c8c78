"""Inner runs and what goes with them: trees, that is nested dicts and named tuples of tensors.

Legend: ``N`` runs, ``P`` problems, ``L`` steps of a truncation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._torch import pytree
from ..rules import State, Weights
from ..tasks import Batch, Problems

T = TypeVar("T")


class Runs(NamedTuple):
    """``N`` inner runs; every tensor has them on its first axis."""

    problem: Problems
    """What is trained on; its initial parameters have been moved to ``params``."""
    params: dict[str, Tensor]
    states: dict[str, State]
    shared: State
    step: Tensor
    """Steps taken, ``[N]``."""
    horizon: Tensor
    """Steps to take, ``[N]``."""
    num_steps: Tensor
    """What the rule is told of the horizon: the same, or ``inf``, ``[N]``."""
    initial_loss: Tensor
    """Loss before the first step, on its batch, ``[N]``; 0 until then."""
    average: dict[str, Tensor]
    """Average of the parameters, by which runs are judged; empty if the rule has none."""


class Draws(NamedTuple):
    """All randomness of one truncation of ``P`` problems; of one step of ``N`` runs, without ``L`` and with ``N``."""

    train: Batch
    """What is trained on, ``[L, P, ...]``."""
    meta: Batch
    """What the runs are judged on, ``[L, P, ...]``."""
    noise: dict[str, Tensor]
    """Noise of the flatness term, ``[L, perturbations, P, ...]`` by parameter; empty without one."""
    inner_noise: dict[str, Tensor]
    """The same for the flatness term of the inner loss."""

    def at(self, index: int, copies: int, terms: Terms) -> Draws:
        """Return the draws of one step for all copies, with the noise of the terms that are on."""
        train, meta = (Batch(*(_copies(part[index], copies) for part in batch)) for batch in self[:2])
        noise, inner_noise = (
            {name: _copies(value[index], copies, dim=1) for name, value in drawn.items() if is_on}
            for drawn, is_on in zip(self[2:], terms, strict=True)
        )
        return Draws(train, meta, noise, inner_noise)


class Terms(NamedTuple):
    """Which flatness terms any run counts in a step: what is off costs nothing."""

    flatness: bool
    inner_flatness: bool


class StepLosses(NamedTuple):
    """What one step tells about the runs, ``[N]`` each."""

    objective: Tensor
    train: Tensor
    """Loss before the step, without the flatness term of the inner loss."""
    meta: Tensor
    flatness: Tensor
    """The measure, 0 where its schedule is off."""


def map_tree(function: Callable[..., Tensor], tree: T, *others: Any) -> T:
    """Apply a function to every tensor of a tree, and to those at the same places of other trees.

    Dicts go together by their keys; the result has the order of the first tree.

    Example:
        >>> one, other = {"a": torch.tensor(3), "b": torch.tensor(5)}, {"b": torch.tensor(1), "a": torch.tensor(2)}
        >>> map_tree(torch.sub, one, other)
        {'a': tensor(1), 'b': tensor(4)}
    """
    return pytree.tree_map(function, tree, *others)


def stack_losses(losses: Iterable[Iterable[Tensor]]) -> StepLosses:
    """Return the losses of ``L`` steps as ``[L, N]`` each."""
    return StepLosses(*(torch.stack(values) for values in zip(*losses, strict=True)))


def join_losses(parts: Iterable[StepLosses]) -> StepLosses:
    """Return the losses of consecutive parts of a truncation as ``[L, N]`` each."""
    return StepLosses(*(torch.cat(values) for values in zip(*parts, strict=True)))


def replace_runs(old: Runs, new: Runs, where: Tensor) -> Runs:
    """Return ``old`` with the runs ``where`` (int64 indices) taken from ``new``, one after another."""
    return map_tree(lambda a, b: a.index_copy(0, where, b.to(a)), old, new)


def choose_runs(where: Tensor, yes: T, no: T) -> T:
    """Return what ``yes`` has of the runs where ``where``, bool ``[N]``, is true, and ``no`` elsewhere."""
    return map_tree(lambda a, b: torch.where(where.view(-1, *(1,) * (a.dim() - 1)), a, b), yes, no)


def share_weights(weights: Weights, num_runs: int) -> Weights:
    """Return the same weights for every run, ``[N, ...]``."""
    return {name: weight.expand(num_runs, *weight.shape) for name, weight in weights.items()}


def repeat_weights(weights: Weights, num_runs: int) -> Weights:
    """Return a copy of the weights for every run, ``[N, ...]``."""
    return {name: weight.repeat(num_runs, *(1,) * weight.dim()) for name, weight in weights.items()}


def _copies(value: Tensor, copies: int, dim: int = 0) -> Tensor:
    return torch.cat([value] * copies, dim) if copies > 1 else value
