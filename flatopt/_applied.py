"""A rule with its weights, as it is applied to the parameters of one device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _dtensor as dtensor
from ._compile import CompiledPhases
from ._graphs import Relaunched
from ._slots import Bucket, Shard, Slot, bucket_of
from ._torch import is_fake
from .pretrained import LearnedRule
from .rules import Phases, Plan, State, StepContext, Update, Weights, apply_rule, plain_phases


class Sizes(NamedTuple):
    """How the coordinates of a model are shared out among calls."""

    chunk: int
    """Coordinates handled at once: bounds the memory of a step whatever the size of the tensors."""
    pack: int
    """Tensors up to this size are handled side by side: below it a step costs calls, not arithmetic."""


EAGER = Sizes(chunk=2**16, pack=2**12)
COMPILED = Sizes(chunk=2**18, pack=2**12)
"""Compiled code keeps what is between its inputs and outputs in registers."""
ON_GPU = Sizes(chunk=2**21, pack=2**18)
"""A call costs more there, and memory less."""

MOST_BYTES_COPIED = 2**28
"""A CUDA graph keeps a copy of the gradients; beyond this it has to be asked for."""


class AppliedRule:
    """Brings shards, options and weights into the form that :func:`flatopt.rules.apply_rule` wants, and calls it.

    Args:
        learned: the rule and its weights.
        compile: as for :class:`flatopt.FlatOpt`.
    """

    def __init__(self, learned: LearnedRule, compile: bool | None):
        self.learned = learned
        self._compile = compile
        self._weights: dict[tuple[torch.device, torch.dtype], Weights] = {}
        self._plain = plain_phases(learned.rule)
        self._compiled = CompiledPhases(self._plain) if compile else None
        self._relaunched: dict[Bucket, Relaunched] = {}

    def weights_for(self, param: Tensor) -> Weights:
        """Return the weights on the device of a parameter, in the dtype to compute in."""
        device, dtype, _ = bucket_of(param)
        if is_fake(param):
            return {
                key: torch.empty(value.shape, device=device, dtype=dtype) for key, value in self.learned.weights.items()
            }
        if (device, dtype) not in self._weights:
            moved = {key: value.to(device, dtype) for key, value in self.learned.weights.items()}
            self._weights[device, dtype] = moved
        return self._weights[device, dtype]

    def step(
        self, slots: Sequence[Slot], states: Sequence[State], shared: State, context: tuple[float, float]
    ) -> State:
        """Step parameters and states in place; return the new shared state.

        Args:
            slots: parameters of one device and dtype.
            states: what the rule keeps of each.
            shared: what it keeps of all.
            context: number of the step, and the length of the run.
        """
        device, dtype, _ = bucket = bucket_of(slots[0].param)

        def scalar(value: float | Tensor) -> Tensor:
            if isinstance(value, Tensor):
                return value.detach().to(device, dtype).reshape(())
            return torch.full((), value, device=device, dtype=dtype)  # a fill, where torch.tensor would synchronise

        def per_slot(key: str) -> Tensor:
            groups = {id(slot.group): slot.group for slot in slots}
            values = {index: scalar(group[key]) for index, group in groups.items()}
            return torch.stack([values[id(slot.group)] for slot in slots])

        decays = any(isinstance(slot.group["weight_decay"], Tensor) or slot.group["weight_decay"] for slot in slots)
        options = [per_slot("lr"), *([per_slot("weight_decay")] if decays else [])]
        # What changes from step to step, in one list: a CUDA graph keeps copies of these.
        values = [*(slot.local for slot in slots), *map(scalar, context), *options]
        if not self._is_launched_together(slots):
            results = self._take(slots, states, shared, *values)
        else:
            key = decays, tuple(map(_describe, slots, states)), tuple(value.data_ptr() for value in shared.values())
            take = partial(self._take, slots, states, shared)
            results = self._relaunched.setdefault(bucket, Relaunched())(key, take, values)
            increment_version([slot.param for slot in slots])  # which autograd checks, and a graph does not tell
        return dict(zip(shared, results, strict=True))

    def _is_launched_together(self, slots: Sequence[Slot]) -> bool:
        """Return whether the kernels of a step are to become one CUDA graph."""
        grads = [slot.local for slot in slots]
        if not grads[0].is_cuda or not all(_has_address(slot.param) for slot in slots):
            return False
        if self._compile is not None:
            return self._compile
        # One optimizer per parameter would have as many graphs.
        return len(grads) > 1 and sum(grad.nbytes for grad in grads) <= MOST_BYTES_COPIED

    def _take(self, slots: Sequence[Slot], states: Sequence[State], shared: State, *values: Tensor) -> list[Tensor]:
        """Take a step; return the new shared state.

        Args:
            slots: as for :meth:`step`.
            states: as there.
            shared: as there.
            values: local gradients, number of the step, length of the run, learning rates, and weight decays if any.
        """
        rule, size = self.learned.rule, len(slots)
        grads, (step, num_steps, *options) = values[:size], values[size:]
        shards = [Shard(slot, grad, rule, state) for slot, grad, state in zip(slots, grads, states, strict=True)]
        sizes, phases = self._ways(slots[0].param)
        plan = Plan(
            update=Update(*options),
            chunk_size=sizes.chunk,
            pack_size=sizes.pack,
            phases=phases,
            shapes=[shard.shape for shard in shards],
            first_strips=[shard.first_strip for shard in shards],
            reduce=dtensor.sum_over_shards([shard.sharding for shard in shards]),
        )
        new = apply_rule(
            rule,
            self.weights_for(slots[0].param),
            [shard.param for shard in shards],
            [-shard.grad if shard.slot.group["maximize"] else shard.grad for shard in shards],
            [shard.state for shard in shards],
            shared,
            StepContext(step, num_steps),
            plan,
        ).shared
        for shard in shards:
            shard.write_back()
        return [new[key] for key in shared]

    def _ways(self, param: Tensor) -> tuple[Sizes, Phases]:
        """Return how to share out coordinates, and how to call the rule."""
        on_cpu = param.device.type in ("cpu", "meta")
        is_captured = param.is_cuda and _has_address(param)
        if is_captured or self._compiled is None or self._compiled.fast is None:
            return EAGER if on_cpu else ON_GPU, self._plain
        return COMPILED if on_cpu else ON_GPU, self._compiled.phases()


def _has_address(param: Tensor) -> bool:
    """Return whether a parameter is its own storage, and not sharded, wrapped or fake."""
    return not (dtensor.is_dtensor(param) or is_fake(param)) and (param.data_ptr() != 0 or not param.numel())


def _describe(slot: Slot, state: State) -> tuple[Any, ...]:
    """Return what a step of a parameter depends on besides the values of tensors."""
    param, grad = slot.param, slot.local
    addresses = tuple((value.data_ptr(), value.dtype) for value in state.values())
    return param.data_ptr(), param.dtype, param.shape, param.stride(), grad.dtype, slot.group["maximize"], addresses
