"""Several processes at one meta-training run: each trains a part of the problems, and all know all results.

Every rank draws all randomness, from the same generator, and trains the problems ``i`` with ``i % size == rank``.  What
their runs became, and their losses, are then added up over the ranks, each of which has zeros in place of the others'
runs.  So every rank has the whole state, a checkpoint does not depend on the number of ranks, and the meta-gradient is
that of a single process up to the rounding of its steps.  It is averaged over the ranks, that none may drift.

Started by ``torchrun``, whose environment says which rank this is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ..rules import Weights
from .runs import Draws, Runs, StepLosses, join_losses, map_tree

if TYPE_CHECKING:  # which takes half a second
    from .unroll import Unroll

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, and which one this is; a single one by default."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def own(self, num_pairs: int) -> Tensor:
        """Return the problems that this process trains, int64."""
        return torch.tensor(range(self.rank, num_pairs, self.size), dtype=torch.int64)

    def run(
        self, unroll: Unroll, weights_N: Weights, runs: Runs, copies: int, generator: torch.Generator
    ) -> tuple[Runs, StepLosses]:
        """Run one truncation of all runs, each by the process that owns its problem."""
        if self.size == 1:
            return unroll.run(weights_N, runs, copies, generator)
        num_pairs = len(runs.step) // copies
        pairs = self.own(num_pairs).to(runs.step.device)
        where = torch.cat([pairs + copy * num_pairs for copy in range(copies)])
        weights, mine = map_tree(lambda value: value[where], (weights_N, runs))
        parts = []
        for length in unroll.lengths():
            draws = _select(unroll.draw(runs, copies, generator, length), pairs)
            if len(pairs) > 0:
                mine, losses = unroll.unroll(weights, mine, draws, copies)
                parts.append(losses)
        like = torch.zeros(unroll.truncation_length, len(runs.step), device=runs.step.device)
        all_losses = StepLosses(*(like.clone() for _ in StepLosses._fields))
        after = map_tree(torch.zeros_like, runs)
        if len(pairs) > 0:
            after = map_tree(lambda whole, part: whole.index_copy(0, where, part), after, mine)
            all_losses = map_tree(lambda whole, part: whole.index_copy(1, where, part), all_losses, join_losses(parts))
        return self.sum((after, all_losses))

    def sum(self, tree: T) -> T:
        """Return the sum of a tree over all processes."""
        if self.size == 1:
            return tree
        leaves, form = pytree.tree_flatten(tree)
        summed: dict[int, Tensor] = {}
        for dtype in sorted({leaf.dtype for leaf in leaves}, key=str):  # one transfer for each
            chosen = [index for index, leaf in enumerate(leaves) if leaf.dtype == dtype]
            packed = torch.cat([leaves[index].reshape(-1) for index in chosen])
            dist.all_reduce(packed)
            for index, part in zip(chosen, packed.split([leaves[index].numel() for index in chosen]), strict=True):
                summed[index] = part.view(leaves[index].shape)
        result: T = pytree.tree_unflatten([summed[index] for index in range(len(leaves))], form)
        return result

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that ``torchrun`` started, and leave them at the end; yield also the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(), device
        return
    if str(device) == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


def was_restarted() -> bool:
    """Return whether ``torchrun`` has started this process anew, after the loss of a rank."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _select(draws: Draws, pairs: Tensor) -> Draws:
    """Return the draws of some of the problems."""

    def choose(value: Any, dim: int) -> Any:
        return map_tree(lambda one: one.index_select(dim, pairs), value)

    return Draws(choose(draws.train, 1), choose(draws.meta, 1), choose(draws.noise, 2), choose(draws.inner_noise, 2))
