"""Several processes at one meta-training run: each trains a part of the problems, and all know all results.

Every rank draws all randomness, from the same generator, and trains the problems ``i`` with ``i % size == rank``.  What
their runs became, and their losses, are then added up over the ranks, each of which has zeros in place of the others'
runs.  So every rank has the whole state, a checkpoint does not depend on the number of ranks, and the meta-gradient is
that of a single process up to the rounding of its steps.  It is averaged over the ranks, that none may drift.

Started by ``torchrun``, whose environment says which rank this is.  When a process dies, ``torchrun`` starts all of
them anew with the same command, and the run goes on from its last checkpoint.
"""

from __future__ import annotations

import importlib
import os
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import pytree
from ..rules import Weights
from .runs import Draws, Runs, StepLosses, join_losses, map_tree
from .unroll import Unroll

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: gloo's default, where NCCL's of 10 may be less than one compilation."""

POLL_SECONDS = 0.05


class LostProcessError(RuntimeError):
    """Another process of the run is gone."""


class RefusedByFirstError(ValueError):
    """The first process refuses a request, and says why."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, and which one this is; a single one by default."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def own(self, count: int) -> Tensor:
        """Return the problems that this process trains, int64."""
        return torch.tensor(range(self.rank, count, self.size), dtype=torch.int64)

    def run(
        self, unroll: Unroll, weights_N: Weights, runs: Runs, copies: int, generator: torch.Generator
    ) -> tuple[Runs, StepLosses]:
        """Run one truncation of all runs, each by the process that owns its problem."""
        if self.size == 1:
            return unroll.run(weights_N, runs, copies, generator)
        num_problems = len(runs.step) // copies
        own = self.own(num_problems).to(runs.step.device)
        where = torch.cat([own + copy * num_problems for copy in range(copies)])
        weights, mine = map_tree(lambda value: value[where], (weights_N, runs))
        parts = []
        for length in unroll.lengths():
            draws = _select(unroll.draw(runs, copies, generator, length), own)
            if len(own) > 0:
                mine, losses = unroll.unroll(weights, mine, draws, copies)
                parts.append(losses)
        shape = (len(StepLosses._fields), unroll.truncation_length, len(runs.step))
        after, all_losses = map_tree(torch.zeros_like, runs), StepLosses(*torch.zeros(shape, device=runs.step.device))
        if len(own) > 0:
            after = map_tree(lambda whole, part: whole.index_copy(0, where, part), after, mine)
            all_losses = map_tree(lambda whole, part: whole.index_copy(1, where, part), all_losses, join_losses(parts))
        return self.sum((after, all_losses))

    def sum(self, tree: T) -> T:
        """Return the sum of a tree over all processes."""
        if self.size == 1:
            return tree
        leaves, form = pytree.tree_flatten(tree)
        summed: dict[torch.dtype, Iterator[Tensor]] = {}
        for dtype in sorted({leaf.dtype for leaf in leaves}, key=str):  # one transfer for each
            chosen = [leaf for leaf in leaves if leaf.dtype == dtype]
            packed = torch.cat([leaf.reshape(-1) for leaf in chosen])
            with _together():
                dist.all_reduce(packed)
            summed[dtype] = iter(packed.split([leaf.numel() for leaf in chosen]))
        return pytree.tree_unflatten([next(summed[leaf.dtype]).view(leaf.shape) for leaf in leaves], form)

    def share(self, make: Callable[[], T]) -> T:
        """Return what the first process makes; where it refuses with ``ValueError`` or ``OSError``, all do.

        Raises:
            RefusedByFirstError: in the others, where the first refuses.
            LostProcessError: in the others, where the first fails in any other way.
        """
        if self.size == 1:
            return make()
        made: list[Any] = [None]
        try:
            if self.is_main:
                made = [make()]
        except (ValueError, OSError) as error:
            made = [RefusedByFirstError(str(error))]
            raise
        except BaseException as error:
            made = [LostProcessError(f"the first process of this run failed ({type(error).__name__})")]
            raise
        finally:
            with _together():
                dist.broadcast_object_list(made)
        if isinstance(made[0], RefusedByFirstError | LostProcessError):
            raise made[0]
        return made[0]


@contextmanager
def _together() -> Iterator[None]:
    """Say what it means where a call to all processes fails."""
    try:
        yield
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 160)
        raise LostProcessError(f"another process of this run is gone ({reason})") from error


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, each computing on a device, and leave them at the end."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where kernels are captured, and NCCL keeps what it broadcasts
    if _num_processes() == 1:
        yield Ranks()
        return
    # The compiler imports this module, whose functions take the group of then as a default and so keep it: its threads
    # would be alive when the process ends, which now and then aborts it.  Imported first, it finds no group.
    importlib.import_module("torch.distributed.nn.functional")
    # The store of torchrun outlives the processes, and still has the addresses of those that it replaces
    # (pytorch/pytorch#135712): gloo would try to connect to the dead, NCCL would take their identifier.
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    prefix = agree(store, rank, size)
    dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Ranks(rank=rank, size=size)
    finally:
        dist.destroy_process_group()


def agree(store: dist.Store, rank: int, size: int) -> str:
    """Return a name that no process had before, the same on all ranks, whatever earlier ones left in the store.

    Every rank leaves a random number; the first answers each with the name, until all have taken it.  What it answers
    to the number of a dead process, nobody reads.
    """
    if rank > 0:
        number = uuid.uuid4().hex
        store.set(f"flatopt/{rank}", number)
        name = str(store.get(f"flatopt/{number}").decode())
        store.set(f"flatopt/{name}/{rank}", "taken")
        return name
    name, missing, end = uuid.uuid4().hex, set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise LostProcessError(f"no word of the processes {sorted(missing)} of {size}")
        for other in tuple(missing):
            if store.check([f"flatopt/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"flatopt/{other}"]):
                store.set(f"flatopt/{store.get(f'flatopt/{other}').decode()}", name)
        time.sleep(POLL_SECONDS)
    return name


def own_device(device: str | torch.device) -> str | torch.device:
    """Return the device of this process: of several on one machine each has a GPU of its own."""
    if str(device) == "cuda" and _num_processes() > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def is_main_process() -> bool:
    """Return whether this process writes and prints, also before the others are joined."""
    return os.environ.get("RANK", "0") == "0"


def job() -> str | None:
    """Return what is common to all processes that one ``torchrun`` starts, also after the loss of one."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _select(draws: Draws, pairs: Tensor) -> Draws:
    """Return the draws of some of the problems."""

    def choose(value: Any, dim: int) -> Any:
        return map_tree(lambda one: one.index_select(dim, pairs), value)

    return Draws(choose(draws.train, 1), choose(draws.meta, 1), choose(draws.noise, 2), choose(draws.inner_noise, 2))
