r"""Strips of matrices: what a rule that treats a matrix as a whole works on.

A matrix ``[outputs, inputs]`` is cut along its *shorter* axis into strips of :class:`StripRows`.  A strip
``X`` is as long as the longer axis, and its Gram matrix

.. math::
    G = X X^\top = \sum_{\text{columns } x} x x^\top

is a sum over that axis: pieces of a tensor, and shards of it on several processes, add up.

Legend: ``*`` models and tensors of one shape, ``k`` strips of a tensor, ``s`` rows of a Gram matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._rule import StripRows, TensorShape


class Strips(NamedTuple):
    """How a tensor is cut."""

    is_tall: bool
    """Whether the inputs are the shorter axis."""
    size: int
    """Rows of a strip, fewer in the last."""
    number: int
    """Strips of the whole tensor."""
    padded: int
    """Rows of a Gram matrix, zero beyond those of the strip, so that those of many tensors are one batch."""

    @classmethod
    def of(cls, shape: TensorShape, rows: StripRows | None) -> Strips | None:
        """Return how a tensor is cut, ``None`` for a vector or a rule without strips.

        Example:
            >>> Strips.of(TensorShape(200, 100), StripRows(usual=80, most=256, number=4))
            Strips(is_tall=True, size=50, number=2, padded=50)
        """
        if rows is None or not shape.is_matrix:
            return None
        short = min(shape[:2])
        size = rows.of(short)
        return cls(shape.num_inputs < shape.num_outputs, size, -(-short // size), size)

    def gram(self, matrix: Tensor) -> Tensor:
        """Return ``[*, k, s, s]`` for ``[*, outputs, inputs]``, for some of the strips or a part of the long axis."""
        parts = []
        for strips in self._cut(matrix):
            gram, rest = strips @ strips.mT, self.padded - strips.shape[-2]
            parts.append(F.pad(gram, (0, rest, 0, rest)) if rest else gram)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -3)

    def couple(self, factors: Tensor, matrix: Tensor) -> Tensor:
        """Multiply each strip of ``[*, outputs, inputs]`` by its factor, ``[*, k, s, s]``."""
        parts, first = [], 0
        for strips in self._cut(matrix):
            rows, k = strips.shape[-2], strips.shape[-3]
            factor = factors.narrow(-3, first, k)
            if rows < self.padded:
                factor = factor[..., :rows, :rows]
            if self.is_tall:  # of the matrix itself: the result is laid out as it is
                parts.append((strips.mT @ factor.mT).transpose(-3, -2).flatten(-2))
            else:
                parts.append((factor @ strips).flatten(-3, -2))
            first += k
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1 if self.is_tall else -2)

    def _cut(self, matrix: Tensor) -> list[Tensor]:
        """Return the whole strips, and the last one if it is smaller: ``[*, k, rows, length]`` each."""
        oriented = matrix.mT if self.is_tall else matrix
        short = oriented.shape[-2]
        whole = short // self.size
        parts = []
        if whole:
            rows = oriented.narrow(-2, 0, whole * self.size) if whole * self.size < short else oriented
            parts.append(rows.unflatten(-2, (whole, self.size)))
        if whole * self.size < short:
            parts.append(oriented.narrow(-2, whole * self.size, short - whole * self.size).unsqueeze(-3))
        return parts
