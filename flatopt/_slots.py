"""One step's view of the parameters: gradients, shards, and what is updated together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dtensor as dtensor
from ._abstract import is_abstract
from ._groups import highest_lr
from ._state import CLOCK, NUMEL, compute_dtype, real_view, shape_of
from ._torch import foreach_norm
from .rules import State, Strips, UpdateRule

OVERFLOW_MARGIN = 1e-4
"""Gradients up to this fraction of the square root of the largest number can be squared and summed 1e8 times."""


class Bucket(NamedTuple):
    """What parameters have in common that are updated together."""

    device: torch.device
    dtype: torch.dtype
    """The one to compute in."""
    is_of_one_rank: bool
    """Whether other ranks have other parameters, such as experts.  Those that are replicas never depend on these."""


@dataclass(eq=False)
class Slot:
    """A parameter with a gradient."""

    param: Tensor
    grad: Tensor
    group: dict[str, Any]
    is_new: bool
    local: Tensor = field(init=False)
    """Real, contiguous gradient of the local shard, in the layout of the parameter."""
    norm: float = math.inf
    """Largest absolute value of the whole gradient."""
    step: float = 0.0
    """Steps that the parameter has taken."""
    made_for: float | None = None
    """Coordinates that the state was made for, ``None`` where that is not known."""

    def clock(self, step: float, num_steps: float) -> tuple[float, float, float]:
        """Return steps taken, number of the step, and length of the run, as if unknown where ``lr=0`` holds in place.

        A tensor on a device is not looked at.
        """
        is_held = num_steps < math.inf and highest_lr([self.group]) == 0
        return self.step + 1, step, math.inf if is_held else num_steps


class Shard:
    """What this process holds of a parameter, as the driver takes it: real and contiguous.

    Where shards cut through the strips of a matrix, every rank gathers and updates the whole, and keeps its part.
    """

    def __init__(self, slot: Slot, grad: Tensor, rule: UpdateRule, state: State):
        self.slot = slot
        param = slot.param
        self.shape = shape_of(param)
        is_plain = not dtensor.is_dtensor(param)
        first_strip = 0 if is_plain else dtensor.first_strip(param, Strips.of(self.shape, rule.strip_rows))
        self.first_strip = first_strip or 0
        self.is_gathered = first_strip is None
        if is_plain:
            self.sharding = None
            self.target = real_view(param.detach())
            self.param, self.grad, self.state = self.target.contiguous(), grad, state
        elif self.is_gathered:
            self.sharding = None
            self.whole = dtensor.whole_copy(param)
            self.param, self.grad = real_view(self.whole), real_view(dtensor.whole_copy(slot.grad))
            self.state = {key: dtensor.whole_copy(value) for key, value in state.items()}
            self.kept = state
        else:
            self.sharding = dtensor.sharding(param)
            self.target = local_values(param)
            self.param, self.grad = self.target.contiguous(), grad
            self.state = {key: dtensor.local_view(value) for key, value in state.items()}

    def write_back(self) -> None:
        """Write what is not in the storage of the parameter and its state yet."""
        if self.is_gathered:
            dtensor.write_part_of_whole(self.whole, self.slot.param)
            for key, value in self.state.items():
                dtensor.write_part_of_whole(value, self.kept[key])
        elif self.param is not self.target:
            self.target.copy_(self.param)


def measure(
    slots: Sequence[Slot], states: Mapping[Tensor, State], groups: Sequence[Mapping[str, Any]], *, are_stamped: bool
) -> dict[Bucket, tuple[list[Slot], float]]:
    """Fill in what a step has to know of the slots; return those that are updated together, and their step.

    One transfer to the host for each bucket.  The step is one after the last of the run, and of all tensors; replicas
    do not count those of one rank.

    Args:
        slots: parameters with a gradient.
        states: of these parameters and all others.
        groups: all parameter groups, whose clock counts.
        are_stamped: whether states say how many coordinates they were made for.
    """
    buckets: dict[Bucket, list[Slot]] = {}
    states_of: dict[Bucket, dict[Tensor, State]] = {}
    for param, state in states.items():
        states_of.setdefault(bucket_of(param), {})[param] = state
    for slot in slots:
        buckets.setdefault(bucket_of(slot.param), []).append(slot)
    last_steps = {key: _measure(buckets.get(key, []), own, key.dtype, are_stamped) for key, own in states_of.items()}
    last = max(last_steps.values(), default=0.0)
    if last:  # without states the run begins anew
        clock = max((group.get(CLOCK, 0) for group in groups), default=0)
        last_steps = {key: max(step, clock) for key, step in last_steps.items()}
        last = max(last_steps.values())
    last_of_replicas = max((step for key, step in last_steps.items() if not key.is_of_one_rank), default=0.0)
    return {key: (members, 1 + (last if key.is_of_one_rank else last_of_replicas)) for key, members in buckets.items()}


def advance_clock(groups: Sequence[dict[str, Any]], clocks: Mapping[Tensor, tuple[float, float, float]]) -> None:
    """Write the number of the step that was just taken into every group; of parameters of one rank it does not count.

    Args:
        groups: all parameter groups.
        clocks: of the parameters that took it; the second number is that of the step.
    """
    step = max((step for param, (_, step, _) in clocks.items() if not is_of_one_rank(param)), default=0)
    for group in groups if step else ():
        group[CLOCK] = int(step)


def _measure(slots: Sequence[Slot], states: Mapping[Tensor, State], dtype: torch.dtype, are_stamped: bool) -> float:
    """Fill in gradients, their largest absolute values (inf for NaN) and steps of a bucket; return its last step.

    A step counter on another device is moved to its parameter's.
    """
    for slot in slots:
        slot.local = real_view(dtensor.local_grad(slot.grad, slot.param)).contiguous()
    for param, state in states.items():
        if state["step"].device != param.device:  # Lightning moves all of a state but this
            state["step"] = state["step"].to(param.device)
    stamped = slots if are_stamped else []
    steps = [state["step"] for state in states.values()]
    values = _largest(slots, dtype) + steps + [states[slot.param][NUMEL] for slot in stamped]
    if not values:
        return 0.0
    stacked = torch.stack(values)
    has_values = not is_abstract(stacked)
    measured = iter(stacked.tolist() if has_values else [1.0] * len(values))
    for slot in slots:
        slot.norm = next(measured)
    last_steps = {param: next(measured) for param in states}
    for slot in slots:
        slot.step = last_steps[slot.param]
    for slot in stamped:
        slot.made_for = next(measured) if has_values else None
    return max(last_steps.values())


def _largest(slots: Sequence[Slot], dtype: torch.dtype) -> list[Tensor]:
    """Return the largest absolute value of each gradient, inf for NaN, 0-D."""
    if not slots:
        return []
    local = (slot.local for slot in slots)
    grads = [grad if grad.numel() else grad.new_zeros(1) for grad in local]  # an empty one has no largest value
    if grads[0].is_cuda:
        norms = torch.stack([norm.to(dtype) for norm in foreach_norm(grads, math.inf)])
    else:  # both ends, which is much faster there
        ends = [end for grad in grads for end in torch.aminmax(grad)]
        norms = torch.stack([end.to(dtype) for end in ends]).view(-1, 2).abs().amax(1)
    norms = torch.nan_to_num(norms, nan=math.inf, posinf=math.inf)  # a maximum over ranks may lose a NaN
    shardings = [dtensor.sharding(slot.param) for slot in slots]
    if any(sharding is not None for sharding in shardings):
        return [value[0] for value in dtensor.all_reduce(norms.split(1), shardings, torch.distributed.ReduceOp.MAX)]
    return list(norms.unbind())


def bucket_of(param: Tensor) -> Bucket:
    """Return what a parameter is updated together with."""
    return Bucket(param.device, compute_dtype(param), is_of_one_rank(param))


def is_of_one_rank(param: Tensor) -> bool:
    """Tell if a parameter is no replica, by the mark of DDP, or that of Megatron and DeepSpeed."""
    return getattr(param, "_ddp_ignored", False) or not getattr(param, "allreduce", True)


def local_values(param: Tensor) -> Tensor:
    """Return what this process holds of a parameter, real and in the same storage."""
    return real_view(dtensor.local_view(param))


def positions_in(groups: Sequence[dict[str, Any]]) -> dict[Tensor, int]:
    """Return where parameters stand among all; replicas are counted among themselves, alike on every rank."""
    params = [param for group in groups for param in group["params"]]
    replicas = [param for param in params if not is_of_one_rank(param)]
    return {param: index for found in (params, replicas) for index, param in enumerate(found)}
