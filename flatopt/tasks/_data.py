"""The contract of data: examples of one or several sources, in three splits each, as rows of one table.

Legend: ``[...]`` is any shape of row numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._optimizee import Batch


class Splits(NamedTuple):
    """Three disjoint sets of examples: to train on, to choose by, to report."""

    train: Batch
    meta: Batch
    test: Batch


class Table(NamedTuple):
    """All splits of all sources, one after another."""

    inputs: Tensor
    """``[rows, ...]``."""
    targets: Tensor
    """Classes ``[rows]``, or values ``[rows, ...]``."""
    starts: Tensor
    """First row of each split and source, int64 ``[splits, sources]``."""
    sizes: Tensor
    """Number of examples of each split and source, int64 ``[splits, sources]``."""

    def to(self, device: torch.device | str) -> Table:
        """Return the table on ``device``."""
        return Table(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True, kw_only=True)
class Data(ABC):
    """What batches are made of; fields say which examples, so that equal data are built once.

    A problem takes its training set from consecutive rows of one source, and any rows of the other splits of it.
    """

    @property
    @abstractmethod
    def probabilities(self) -> tuple[float, ...]:
        """Share of the problems that each source has."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes that targets are of; 0 if they are real values."""

    @abstractmethod
    def build(self) -> Table:
        """Return the table, on the CPU; called once for each device."""

    def table(self, device: torch.device | str = "cpu") -> Table:
        """Return the table; repeated calls return the same tensors."""
        return _cached_table(self, str(device))

    def gather(self, table: Table, rows: Tensor) -> Batch:
        """Return fresh tensors with the examples that begin at rows ``[...]``: ``[..., *]`` both."""
        flat = rows.reshape(-1)
        inputs, targets = (part.index_select(0, flat) for part in (table.inputs, table.targets))
        return Batch(inputs.view(*rows.shape, *inputs.shape[1:]), targets.view(*rows.shape, *targets.shape[1:]))


@lru_cache(maxsize=16)
def _cached_table(data: Data, device: str) -> Table:
    return data.build().to(device)


def stack_splits(splits: Sequence[Batch], num_sources: int) -> Table:
    """Return the table of all splits.

    Args:
        splits: ``train`` of each source, then ``meta`` of each source, then ``test`` of each source.
        num_sources: number of sources.

    Example:
        >>> splits = [Batch(torch.zeros(size, 2), torch.zeros(size)) for size in (5, 3, 2)]
        >>> stack_splits(splits, num_sources=1).starts.T
        tensor([[0, 5, 8]])
    """
    sizes = torch.tensor([len(split.targets) for split in splits])
    starts = sizes.cumsum(0) - sizes
    inputs, targets = (torch.cat(parts) for parts in zip(*splits, strict=True))
    return Table(inputs, targets, starts.view(-1, num_sources), sizes.view(-1, num_sources))
