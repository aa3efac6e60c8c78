"""A rule with its weights, as it is applied to the parameters of one device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _dtensor as dtensor
from ._compile import CompiledPhases
from ._slots import Shard, Slot, bucket_of
from ._torch import is_fake
from .pretrained import LearnedRule
from .rules import Plan, State, StepContext, Update, Weights, apply_rule, plain_phases

CHUNK_SIZE = 2**16
"""Coordinates handled at once: bounds the memory of a step whatever the size of the tensors."""

COMPILED_CHUNK_SIZE = 2**18
"""The same where compiled code keeps what is between its inputs and outputs in registers."""

PACK_SIZE = 2**12
"""Tensors up to this size are handled side by side: below it a step costs calls, not arithmetic."""


class AppliedRule:
    """Brings shards, options and weights into the form that :func:`flatopt.rules.apply_rule` wants, and calls it."""

    def __init__(self, learned: LearnedRule, compile: bool):
        self.learned = learned
        self._weights: dict[tuple[torch.device, torch.dtype], Weights] = {}
        self._phases = plain_phases(learned.rule)
        self._compiled = CompiledPhases(self._phases) if compile else None
        if self._compiled is not None:
            self._phases = self._compiled.phases()

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
        device, dtype, _ = bucket_of(slots[0].param)

        def scalar(value: float | Tensor) -> Tensor:
            if isinstance(value, Tensor):
                return value.detach().to(device, dtype).reshape(())
            return torch.full((), value, device=device, dtype=dtype)  # a fill, where torch.tensor would synchronise

        def per_slot(key: str) -> Tensor:
            groups = {id(slot.group): slot.group for slot in slots}
            values = {index: scalar(group[key]) for index, group in groups.items()}
            return torch.stack([values[id(slot.group)] for slot in slots])

        rule = self.learned.rule
        shards = [Shard(slot, rule, state) for slot, state in zip(slots, states, strict=True)]
        compiled = self._compiled is not None and self._compiled.fast is not None
        decays = any(isinstance(slot.group["weight_decay"], Tensor) or slot.group["weight_decay"] for slot in slots)
        plan = Plan(
            update=Update(per_slot("lr"), per_slot("weight_decay") if decays else None),
            chunk_size=COMPILED_CHUNK_SIZE if compiled else CHUNK_SIZE,
            pack_size=PACK_SIZE,
            phases=self._phases,
            shapes=[shard.shape for shard in shards],
            first_strips=[shard.first_strip for shard in shards],
            reduce=dtensor.sum_over_shards([shard.sharding for shard in shards]),
        )
        shared = apply_rule(
            rule,
            self.weights_for(slots[0].param),
            [shard.param for shard in shards],
            [-shard.grad if shard.slot.group["maximize"] else shard.grad for shard in shards],
            [shard.state for shard in shards],
            shared,
            StepContext(*map(scalar, context)),
            plan,
        ).shared
        for shard in shards:
            shard.write_back()
        return shared
