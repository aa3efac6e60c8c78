"""How the coordinates of a model are shared out among calls of a rule; depends on shapes only.

Small tensors are handled side by side, which saves calls; large ones in pieces, which bounds memory.  A strip of a
matrix is never cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._rule import StripRows, TensorShape, size_class
from ._strips import Strips


class Run(NamedTuple):
    """Equal parts of tensors of one shape: several whole ones side by side, or a piece of one."""

    group: int
    tensors: tuple[int, ...]
    size: int
    """Coordinates of each part."""
    piece: int
    """Which piece of its tensor, 0 for all of it."""
    most: int
    """Coordinates of every piece but the last."""
    inputs: int
    """Coordinates of a row."""
    cut: Strips | None
    first_strip: int
    """Of the strips of the whole tensor."""
    num_strips: int


class Group(NamedTuple):
    """All the runs that make up some tensors: one, or the pieces of one tensor."""

    tensors: tuple[int, ...]
    cut: Strips | None


class Pack:
    """Coordinates handled in one call: a piece of one tensor, or several whole small ones; vectors or matrices."""

    def __init__(self, runs: Sequence[Run], first: int):
        self.runs = runs
        self.first = first
        """Where its first tensor stands in the order of the layout."""
        self.tensors = [tensor for run in runs for tensor in run.tensors]
        self.sizes = [run.size for run in runs for _ in run.tensors]
        self.run_sizes = [len(run.tensors) * run.size for run in runs]
        self.counts = [len(run.tensors) for run in runs]
        self.is_single = len(self.tensors) == 1
        self.is_matrix = runs[0].cut is not None

    def split(self, values_n: Tensor, dim: int = -1) -> Sequence[Tensor]:
        """Return what belongs to each part."""
        return (values_n,) if self.is_single else values_n.split_with_sizes(self.sizes, dim)

    def by_run(self, values_n: Tensor) -> Sequence[Tensor]:
        """Return what belongs to each run."""
        return (values_n,) if len(self.runs) == 1 else values_n.split_with_sizes(self.run_sizes, -1)


class Layout(NamedTuple):
    """How all coordinates are shared out; depends on shapes only."""

    packs: list[Pack]
    groups: list[Group]
    order: list[int]
    """The tensors as the packs have them."""
    places: list[int]
    """Where each tensor stands in that order."""


@lru_cache(maxsize=64)
def lay_out(
    pieces: tuple[torch.Size, ...],
    shapes: tuple[TensorShape, ...],
    first_strips: tuple[int, ...],
    rows: StripRows | None,
    chunk_size: int | None,
    pack_size: int,
) -> Layout:
    """Share out all coordinates of what is here of each tensor; an empty one is a part of size 0."""
    numels = [piece.numel() for piece in pieces]
    cuts = _padded([Strips.of(shape, rows) for shape in shapes])
    firsts = first_strips or (0,) * len(pieces)
    groups: list[Group] = []
    packs: list[Pack] = []
    order: list[int] = []

    def kind(index: int) -> tuple[Any, ...]:
        return cuts[index] is not None, pieces[index], cuts[index] or (), firsts[index]

    def add(tensors: tuple[int, ...], most: int) -> list[Run]:
        index = tensors[0]
        cut, shape, first, numel = cuts[index], pieces[index], firsts[index], numels[index]
        inputs = shape[1:].numel()
        runs = []
        for piece, start in enumerate(range(0, max(numel, 1), most)):
            size = min(most, numel - start)
            first_strip = number = 0
            if cut is not None and size:
                first_strip = first + (0 if cut.is_tall else start // inputs // cut.size)
                number = -(-(inputs if cut.is_tall else size // inputs) // cut.size)
            runs.append(Run(len(groups), tensors, size, piece, most, inputs, cut, first_strip, number))
        groups.append(Group(tensors, cut))
        order.extend(tensors)
        return runs

    small = {index: kind(index) for index, numel in enumerate(numels) if numel <= pack_size}
    for lists in _side_by_side(small, numels, chunk_size):
        first = len(order)
        packs.append(Pack([run for one in lists for run in add(tuple(one), max(1, numels[one[0]]))], first))
    for index, numel in enumerate(numels):
        if numel > pack_size:
            first = len(order)
            packs += [Pack([run], first) for run in add((index,), _most(pieces[index], cuts[index], chunk_size))]
    places = sorted(range(len(order)), key=order.__getitem__)
    return Layout(packs, groups, order, places)


def _padded(cuts: Sequence[Strips | None]) -> list[Strips | None]:
    """Return the cuts with Gram matrices as large as the largest that is one batch with them."""
    largest: dict[int, int] = {}
    for cut in cuts:
        if cut is not None:
            largest[size_class(cut.size)] = max(cut.size, largest.get(size_class(cut.size), 0))
    return [cut and cut._replace(padded=largest[size_class(cut.size)]) for cut in cuts]


def _side_by_side(
    kinds: dict[int, tuple[Any, ...]], numels: Sequence[int], chunk_size: int | None
) -> list[list[list[int]]]:
    """Return small tensors by pack and, in it, by kind; the first of a kind tells matrices from vectors.

    Tensors of one shape stand side by side: their strips are then one batch.
    """
    together: list[list[list[int]]] = []
    filled = 0
    for kind, same in groupby(sorted(kinds, key=kinds.__getitem__), kinds.__getitem__):
        is_new = True
        for index in same:
            is_full = chunk_size is not None and filled + numels[index] > chunk_size
            if not together or is_full or kind[0] != kinds[together[-1][0][0]][0]:
                together.append([])
                filled, is_new = 0, True
            if is_new:
                together[-1].append([])
                is_new = False
            together[-1][-1].append(index)
            filled += numels[index]
    return together


def _most(shape: torch.Size, cut: Strips | None, chunk_size: int | None) -> int:
    """Return the size of the pieces of one tensor: a tall matrix is cut between its rows, a wide one its strips."""
    numel = shape.numel()
    most = max(1, chunk_size or numel)
    if cut is not None and numel:
        unit = numel // shape[0] * (1 if cut.is_tall else cut.size)
        most = max(most // unit, 1) * unit
    return max(1, min(most, numel))


def reorder(values_XN: Tensor, order: list[int]) -> Tensor:
    """Bring the last axis in another order."""
    if order == list(range(len(order))):
        return values_XN
    if values_XN.is_cuda:  # which would wait for an index from the host
        columns = values_XN.unbind(-1)
        return torch.stack([columns[place] for place in order], -1)
    return values_XN.index_select(-1, torch.tensor(order, device=values_XN.device))


def spread(layout: Layout, values_XN: Tensor) -> Iterator[Tensor]:
    """Yield for each pack ``[*, X, 1]`` or ``[*, X, n]`` of what is given per tensor."""
    ordered_XN, last, values_Xn = reorder(values_XN, layout.order), -1, values_XN
    for pack in layout.packs:
        if pack.first != last:  # else another piece of the same tensor
            last, values_Xn = pack.first, ordered_XN.narrow(-1, pack.first, len(pack.tensors))
            if not pack.is_single:
                parts = values_Xn.split_with_sizes(pack.counts, -1)
                wide = [
                    part.unsqueeze(-1).expand(*part.shape, run.size).flatten(-2)
                    for run, part in zip(pack.runs, parts, strict=True)
                ]
                values_Xn = wide[0] if len(wide) == 1 else torch.cat(wide, -1)
        yield values_Xn
