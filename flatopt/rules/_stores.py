"""Where the driver reads from and writes to: the only thing that differs between its two uses.

:class:`Pure` collects new tensors; :class:`InPlace` overwrites parameters and states, part by part, so that its memory
is bounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import foreach_copy_
from ._layout import Pack, Run
from ._phases import Coordinates, move_param
from ._rule import State, TensorShape, UpdateRule

WRITES_ARE_KEPT = torch.__version__ >= "2.8"
"""Earlier, what a compiled phase writes on a GPU is lost if its piece starts off a multiple of 16 bytes
(pytorch/pytorch#154442): phases then return what is new."""


class RuleResult(NamedTuple):
    """What one step of a rule gives."""

    deltas: list[Tensor]
    """Step to add, one per parameter, in its shape; empty where parameters were updated in place."""
    states: list[State]
    """New state, one per parameter."""
    shared: State
    """New shared state."""


class Update(NamedTuple):
    """How steps are applied in place: ``x <- x (1 - lr step_size weight_decay) + lr step``."""

    lrs_N: Tensor
    weight_decays_N: Tensor | None = None
    """``None`` for none at all."""

    def factors(self, step_sizes_N: Tensor) -> Tensor:
        """Return what multiplies the step and, unless that is 1, the parameter: ``[N, 1 or 2]``."""
        factors = [self.lrs_N]
        if self.weight_decays_N is not None:
            factors.append(1 - self.lrs_N * step_sizes_N * self.weight_decays_N)
        return torch.stack(factors, -1)


class Store(ABC):
    """What the driver reads from and writes to, pack by pack."""

    def __init__(
        self,
        rule: UpdateRule,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        shapes: Sequence[TensorShape],
        dim: int,
    ):
        self.params, self.states, self.dim = params, states, dim
        self.dtype = states[0]["step"].dtype
        self.memory = rule.memory
        self.param_field, self.grad_field = (_Field(dict(enumerate(own)), params, dim) for own in (params, grads))
        kept: dict[str, dict[int, Tensor]] = {}
        for index, (state, shape) in enumerate(zip(states, shapes, strict=True)):
            others = {"step", *rule.memory, *rule.unkept(shape)}
            for key, value in state.items():
                if key not in others:
                    kept.setdefault(key, {})[index] = value
        self.state_fields = {key: _Field(tensors, params, dim) for key, tensors in kept.items()}
        self.is_viewed = False
        """Whether what is read of a single part is the storage itself."""
        self.held: dict[Pack, Coordinates] = {}

    @abstractmethod
    def read(self, pack: Pack) -> Coordinates:
        """Return state, gradient and parameter, flat and in the dtype to compute in."""

    @abstractmethod
    def write(self, pack: Pack, new: State) -> None:
        """Take over the state that a phase changed."""

    @abstractmethod
    def move(self, pack: Pack, param: Tensor, delta: Tensor | None, factors_Xn: Tensor) -> None:
        """Take over the step, the last of a pack; ``None`` where ``propose`` took it already."""

    @abstractmethod
    def result(self, steps_N: Tensor, memory_NM: Tensor, shared: State) -> RuleResult:
        """Take over what there is once per tensor, and return what the driver does."""

    def gather(self, pack: Pack) -> Coordinates:
        fields = {key: field for key, field in self.state_fields.items() if pack.tensors[0] in field.tensors}
        state = {key: field.gather(pack, self.dtype) for key, field in fields.items()}
        return Coordinates(state, self.grad_field.gather(pack, self.dtype), self.param_field.gather(pack, self.dtype))


class Pure(Store):
    """Collects new states and steps; nothing given is modified."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.deltas: list[list[Tensor]] = [[] for _ in self.params]
        self.updates: list[dict[str, list[Tensor]]] = [{} for _ in self.params]

    def read(self, pack: Pack) -> Coordinates:
        if pack not in self.held:
            self.held[pack] = self.gather(pack)
        return self.held[pack]

    def write(self, pack: Pack, new: State) -> None:
        held = self.held[pack]
        self.held[pack] = held._replace(state=held.state | new)

    def move(self, pack: Pack, param: Tensor, delta: Tensor | None, factors_Xn: Tensor) -> None:
        assert delta is not None
        for tensor, piece in zip(pack.tensors, pack.split(delta), strict=True):
            self.deltas[tensor].append(piece)
        for key, value in self.held.pop(pack).state.items():
            for tensor, piece in zip(pack.tensors, pack.split(value, self.dim), strict=True):
                self.updates[tensor].setdefault(key, []).append(piece)

    def result(self, steps_N: Tensor, memory_NM: Tensor, shared: State) -> RuleResult:
        once = _unstack_memory(self.memory, self.states[0], steps_N, memory_NM, self.dim)
        states = []
        for index, state in enumerate(self.states):
            update = {key: _join(pieces, state[key], self.dim) for key, pieces in self.updates[index].items()}
            states.append(state | update | {key: values[index] for key, values in once.items()})
        deltas = [_join(pieces, param, self.dim) for pieces, param in zip(self.deltas, self.params, strict=True)]
        return RuleResult(deltas, states, shared)


class InPlace(Store):
    """Overwrites states and parameters, part by part; small tensors are gathered once."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        fields = (self.param_field, self.grad_field, *self.state_fields.values())
        self.is_viewed = WRITES_ARE_KEPT and all(
            tensor.dtype == self.dtype for field in fields for tensor in field.tensors.values()
        )

    def read(self, pack: Pack) -> Coordinates:
        if pack in self.held:
            return self.held[pack]
        values = self.gather(pack)
        if not pack.is_single or self.is_viewed:
            self.held[pack] = values
        return values

    def write(self, pack: Pack, new: State) -> None:
        for key, value in new.items():
            self._scatter(pack, self.state_fields[key], value)
        if new and not pack.is_single:  # what is held of a single part is a view of what was written
            held = self.held[pack]
            first = self.states[pack.tensors[0]]
            kept = {key: value.to(first[key].dtype).to(self.dtype) for key, value in new.items()}
            self.held[pack] = held._replace(state=held.state | kept)

    def _scatter(self, pack: Pack, field: _Field, value: Tensor) -> None:
        """Write in the dtype that is kept."""
        if pack.is_single:
            field.of(pack)[0].copy_(value)
        else:
            foreach_copy_(field.of(pack), list(pack.split(value, 0)))

    def move(self, pack: Pack, param: Tensor, delta: Tensor | None, factors_Xn: Tensor) -> None:
        # What was read is the parameter itself, or a copy of the driver's own.
        if delta is not None:
            move_param(param, delta, factors_Xn)
        if not (self.is_viewed and pack.is_single):
            self._scatter(pack, self.param_field, param)
        self.held.pop(pack, None)

    def result(self, steps_N: Tensor, memory_NM: Tensor, shared: State) -> RuleResult:
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for key, rows in _unstack_memory(self.memory, self.states[0], steps_N, memory_NM, 0).items():
            targets += [state[key] for state in self.states]
            values += rows
        foreach_copy_(targets, values)
        return RuleResult([], list(self.states), shared)


class _Field:
    """One tensor per parameter, or for some of them, as the flat views that packs are made of."""

    def __init__(self, tensors: Mapping[int, Tensor], params: Sequence[Tensor], dim: int):
        self.tensors, self.dim = tensors, dim
        index, value = next(iter(tensors.items()))
        self.extra_dims = value.dim() - params[index].dim()
        """What stands behind the shape of the parameter: the width of a network's state, say."""
        self.views: dict[int, list[list[Tensor]]] = {}

    def of(self, pack: Pack) -> list[Tensor]:
        """Return one view per part, flat on axis ``dim``; the last ``extra_dims`` axes stay."""
        return [view for run in pack.runs for view in self._of_run(run)]

    def gather(self, pack: Pack, dtype: torch.dtype) -> Tensor:
        """Return the coordinates of a pack, in the dtype to compute in; of a single part a view, if it has that."""
        value = self._of_run(pack.runs[0])[0] if pack.is_single else torch.cat(self.of(pack), self.dim)
        return value if value.dtype == dtype else value.to(dtype)

    def _of_run(self, run: Run) -> list[Tensor]:
        if run.group not in self.views:
            flat = [self._flat(self.tensors[index]) for index in run.tensors]
            is_cut = len(run.tensors) == 1 and flat[0].shape[self.dim] > run.most
            self.views[run.group] = [[view] for view in flat[0].split(run.most, self.dim)] if is_cut else [flat]
        return self.views[run.group][run.piece]

    def _flat(self, tensor: Tensor) -> Tensor:
        kept = tensor.dim() - self.extra_dims
        if kept == self.dim + 1:
            return tensor
        if self.dim == self.extra_dims == 0:
            return tensor.reshape(-1)
        return tensor.reshape(*tensor.shape[: self.dim], tensor.shape[self.dim : kept].numel(), *tensor.shape[kept:])


def stack_memory(rule: UpdateRule, states: Sequence[State], steps_N: Tensor, dim: int) -> Tensor:
    """Return ``[*, N, M]``."""
    columns = []
    for key in rule.memory:
        column = torch.stack([state[key] for state in states], dim)
        columns.append(column if column.dim() == dim + 2 else column.unsqueeze(-1))
    return torch.cat(columns, -1) if columns else steps_N.unsqueeze(-1)[..., :0]


def _unstack_memory(
    keys: Sequence[str], like: State, steps_N: Tensor, memory_NM: Tensor, dim: int
) -> dict[str, tuple[Tensor, ...]]:
    """Undo :func:`stack_memory`; return what there is once per tensor, for each, by key."""
    values, start = {"step": steps_N.unbind(dim)}, 0
    for key in keys:
        if like[key].dim() > dim:
            column = memory_NM.narrow(-1, start, like[key].shape[-1])
            start += like[key].shape[-1]
        else:
            column = memory_NM.select(-1, start)
            start += 1
        values[key] = column.unbind(dim)
    return values


def _join(pieces: list[Tensor], like: Tensor, dim: int) -> Tensor:
    """Put the parts of one tensor together in its shape."""
    return (torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]).reshape(like.shape)
