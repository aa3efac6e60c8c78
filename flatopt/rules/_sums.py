"""What is summed over the coordinates of each tensor, and the strips that are coupled by such sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ._layout import Layout, Pack, Run, reorder
from ._phases import Phases
from ._rule import UpdateRule, Weights
from ._strips import Strips

Reduce = Callable[[list[Tensor]], list[Tensor]]
"""Sums one vector per tensor over the processes that hold shards of the tensor; others come back as they are."""


class Sums:
    """What was summed over the coordinates of the tensors of each group."""

    def __init__(self, layout: Layout, dim: int):
        self.layout, self.dim = layout, dim
        self.terms: list[list[Tensor]] = [[] for _ in layout.groups]
        self.grams: list[list[Tensor]] = [[] for _ in layout.groups]

    def add_terms(self, pack: Pack, terms_Sn: Tensor) -> None:
        if pack.is_single:  # summed already
            self.terms[pack.runs[0].group].append(terms_Sn)
            return
        for run, terms in zip(pack.runs, pack.by_run(terms_Sn), strict=True):
            self.terms[run.group].append(terms.unflatten(-1, (len(run.tensors), run.size)).sum(-1))

    def add_grams(self, pack: Pack, matrix_n: Tensor) -> None:
        for run, cut, matrices in _matrices(pack, matrix_n):
            self.grams[run.group].append(cut.gram(matrices))

    def total_terms(self) -> Tensor:
        """Return the sums ``[*, S, N]``, in the order of the layout."""
        totals = [parts[0] if len(parts) == 1 else torch.cat(parts, -1).sum(-1, keepdim=True) for parts in self.terms]
        return totals[0] if len(totals) == 1 else torch.cat(totals, -1)

    def total_grams(self) -> dict[int, Tensor]:
        """Return the Gram matrices ``[*, tensors, k, s, s]`` of the groups of matrices."""
        totals = {}
        for index, parts in enumerate(self.grams):
            if len(parts) == 1:
                totals[index] = parts[0]
            elif parts:
                cut = self.layout.groups[index].cut
                assert cut is not None
                totals[index] = torch.stack(parts).sum(0) if cut.is_tall else torch.cat(parts, self.dim + 1)
        return totals


def couple_strips(
    sums: Sums, rule: UpdateRule, phases: Phases, weights: Weights, reduce: Reduce | None, most: int | None = None
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the factors ``[*, tensors, k, s, s]`` of each group of matrices, and the sums of all ``[*, N, S]``.

    About ``most`` coordinates of Gram matrices are handled at once.
    """
    layout, dim = sums.layout, sums.dim
    terms_SN, grams = sums.total_terms(), sums.total_grams()
    if reduce is not None:
        terms_SN, grams = _reduce(reduce, terms_SN, grams, layout)
    if rule.strip_rows is None:
        return {}, reorder(terms_SN, layout.places).mT
    factors: dict[int, Tensor] = {}
    more_TN: dict[int, Tensor] = {}
    nothing = terms_SN.new_zeros(*terms_SN.shape[:dim], 0, rule.strip_rows.usual, rule.strip_rows.usual)
    for batch in _batches(grams, dim, most) or [{}]:
        flat = [gram.flatten(dim, dim + 1) for gram in batch.values()] or [nothing]
        factors_Kss, terms = phases.couple(weights, flat[0] if len(flat) == 1 else torch.cat(flat, dim))
        terms_TK, numbers = torch.stack(terms, dim), [gram.shape[dim] for gram in flat]
        parts = zip(batch.items(), factors_Kss.split(numbers, dim), terms_TK.split(numbers, -1), strict=False)
        for (index, gram), factor_kss, terms_Tk in parts:
            factors[index] = factor_kss.unflatten(dim, gram.shape[dim : dim + 2])
            more_TN[index] = terms_Tk.unflatten(-1, gram.shape[dim : dim + 2]).sum(-1)
    for index, (tensors, _) in enumerate(layout.groups):
        if index not in more_TN:  # zero, for vectors
            more_TN[index] = terms_TK.new_zeros(*terms_TK.shape[:-1], len(tensors))
    in_order = [more_TN[index] for index in range(len(layout.groups))]
    summaries_SN = torch.cat([terms_SN, torch.cat(in_order, -1)], -2)
    return factors, reorder(summaries_SN, layout.places).mT


def multiply_strips(pack: Pack, factors: dict[int, Tensor], matrix_n: Tensor, dim: int) -> Tensor:
    """Return the strips of a pack times their factors, ``[*, n]``; zero for vectors."""
    coupled = []
    for run, cut, matrices in _matrices(pack, matrix_n):
        chosen = factors[run.group]
        if chosen.shape[dim + 1] != run.num_strips:
            chosen = chosen.narrow(dim + 1, run.first_strip, run.num_strips)
        coupled.append(cut.couple(chosen, matrices).flatten(-3))
    if not coupled:
        return torch.zeros_like(matrix_n)
    return coupled[0] if len(coupled) == 1 else torch.cat(coupled, -1)


def _batches(grams: dict[int, Tensor], dim: int, most: int | None) -> list[dict[int, Tensor]]:
    """Share out the groups: Gram matrices of one size together, in few calls, but few enough to stay in a cache."""
    batches: list[dict[int, Tensor]] = []
    for size in dict.fromkeys(gram.shape[-1] for gram in grams.values()):
        filled = 0
        for index, gram in grams.items():
            if gram.shape[-1] == size:
                numel = gram.shape[dim:].numel()
                if not filled or (most is not None and filled + numel > most):
                    batches.append({})
                    filled = 0
                batches[-1][index] = gram
                filled += numel
    return batches


def _reduce(
    reduce: Reduce, terms_SN: Tensor, grams: dict[int, Tensor], layout: Layout
) -> tuple[Tensor, dict[int, Tensor]]:
    """Sum over shards; a shard puts the Gram matrices of its strips in their places among those of the tensor."""
    rows = list(reorder(terms_SN, layout.places).unbind(-1))
    first_strips = {run.group: run.first_strip for pack in layout.packs for run in pack.runs if not run.piece}
    for index, (tensors, cut) in enumerate(layout.groups):
        for position, tensor in enumerate(tensors if cut is not None else ()):
            assert cut is not None
            placed = terms_SN.new_zeros(cut.number, cut.padded, cut.padded)
            if index in grams:
                first, gram = first_strips[index], grams[index][position]
                placed[first : first + len(gram)] = gram
            rows[tensor] = torch.cat([rows[tensor], placed.flatten()])
    rows = reduce(rows)
    size = len(terms_SN)
    whole = {
        index: torch.stack([rows[tensor][size:].view(cut.number, cut.padded, cut.padded) for tensor in tensors])
        for index, (tensors, cut) in enumerate(layout.groups)
        if cut is not None
    }
    return torch.stack([rows[tensor][:size] for tensor in layout.order], -1), whole


def _matrices(pack: Pack, matrix_n: Tensor) -> Iterable[tuple[Run, Strips, Tensor]]:
    """Return the runs of a pack of matrices, and their coordinates as ``[*, tensors, outputs, inputs]``."""
    for run, coordinates in zip(pack.runs, pack.by_run(matrix_n), strict=True):
        if run.cut is not None and run.size:
            shape = (*coordinates.shape[:-1], len(run.tensors), run.size // run.inputs, run.inputs)
            yield run, run.cut, coordinates.reshape(shape)
