"""Parameters sharded as ``DTensor`` (FSDP2, HSDP, tensor parallel): all of this leaves plain tensors as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch import fsdp_modules
from .rules import Strips


class Sharding(NamedTuple):
    """How a DTensor is cut: the mesh, and those of its dimensions along which ranks hold different parts."""

    mesh: Any
    dims: tuple[int, ...]


def is_dtensor(tensor: Any) -> bool:
    """Tell if a tensor is a DTensor, without importing that machinery (a second) where nobody else did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_view(tensor: Any) -> Tensor:
    """Return the local shard, in the same storage."""
    if is_dtensor(tensor):
        return tensor.to_local()
    return tensor.detach() if tensor.requires_grad else tensor


def local_copy(tensor: Any) -> Tensor:
    """Return an own, contiguous copy of the local shard."""
    return local_view(tensor).clone(memory_format=torch.contiguous_format)


def local_grad(grad: Any, param: Any) -> Tensor:
    """Return the local gradient, in the layout of its parameter."""
    if is_dtensor(grad) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_view(grad)


def whole_copy(tensor: Any) -> Tensor:
    """Return an own copy of the whole tensor, gathered from all ranks."""
    return (tensor.full_tensor() if is_dtensor(tensor) else tensor.detach()).clone()


def write_part_of_whole(whole: Tensor, target: Any) -> None:
    """Overwrite a tensor, or a shard, from the whole."""
    local_view(target).copy_(local_view(placed_like(whole, target)))


def placed_like(value: Any, param: Any) -> Tensor:
    """Return an own copy of a per-coordinate value, sharded as its parameter is."""
    if not is_dtensor(param):
        return local_copy(value)
    tensor = sys.modules["torch.distributed.tensor"]
    if not is_dtensor(value):
        value = tensor.DTensor.from_local(value, param.device_mesh, [tensor.Replicate()] * param.device_mesh.ndim)
    value = value.redistribute(param.device_mesh, param.placements)
    return tensor.DTensor.from_local(
        local_copy(value), param.device_mesh, param.placements, shape=value.shape, stride=value.stride()
    )


def forget_gathered(params: Iterable[Any]) -> None:
    """Let FSDP2 gather anew parameters that changed between two forward passes.

    It keeps what it gathered for a pass until the backward one, which evaluation has not.
    """
    for module in fsdp_modules() if any(map(is_dtensor, params)) else ():
        module.reshard()


def replicated_weights(param: Tensor) -> AbstractContextManager[Any]:
    """Let a rule combine its plain weights with a DTensor."""
    if not is_dtensor(param):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def sharding(param: Any) -> Sharding | None:
    """Return how a parameter is sharded, ``None`` if every rank holds all of it."""
    if not is_dtensor(param):
        return None
    dims = tuple(dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())
    return Sharding(param.device_mesh, dims) if dims else None


def first_strip(param: Any, cut: Strips | None) -> int | None:
    """Return how many strips of a matrix come before this rank's; ``None`` where shards cut through strips.

    The answer is ``None`` on all ranks or on none.
    """
    if cut is None or not is_dtensor(param):
        return 0
    first = 0
    for dim, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not sys.modules["torch.distributed.tensor"].Shard:
            return None
        axis = placement.dim % param.dim()
        if cut.is_tall != (axis > 0):
            continue  # along the longer axis: Gram matrices are sums over it
        rows = -(-param.shape[axis] // param.device_mesh.size(dim))
        if first or rows % cut.size or (cut.is_tall and (param.dim() > 2 or param.is_complex())):
            return None
        first = min(param.device_mesh.get_local_rank(dim) * rows // cut.size, cut.number)
    return first


def all_reduce(values: Sequence[Tensor], shardings: Sequence[Sharding | None], op: Any) -> list[Tensor]:
    """Reduce the vectors of sharded tensors over the ranks that share them, in one call; leave others as they are."""
    reduced = list(values)
    for one in dict.fromkeys(one for one in shardings if one is not None):
        where = [index for index, other in enumerate(shardings) if other == one]
        together = torch.cat([values[index] for index in where])
        for dim in one.dims:
            torch.distributed.all_reduce(together, op=op, group=one.mesh.get_group(dim))
        parts = together.split([len(values[index]) for index in where])
        for index, part in zip(where, parts, strict=True):
            reduced[index] = part
    return reduced


def sum_over_shards(shardings: Sequence[Sharding | None]) -> Callable[[list[Tensor]], list[Tensor]] | None:
    """Return what sums one vector per tensor over its shards, ``None`` where nothing is sharded."""
    if all(one is None for one in shardings):
        return None
    return lambda values: all_reduce(values, shardings, torch.distributed.ReduceOp.SUM)
