"""The contract of a learned update rule, and the one driver that applies a rule to tensors.

A learned optimizer is a pure :class:`UpdateRule` plus a dict of weights.  A rule works in three phases,
so that whole-tensor statistics cost one small reduction per step and large tensors can be cut in pieces:

1. ``observe``  coordinates: advance their accumulators, return a list of terms whose *sums* over a tensor describe it;
2. ``mix``      tensors: turn the sums of all tensors into a few control numbers per tensor;
3. ``propose``  coordinates: turn accumulators and control numbers into a step.

A rule may add ``prepare`` before them, which turns what is remembered of the earlier steps into a few numbers per
tensor for the coordinates: bias corrections, say, or what accumulators need to know of the tensor as a whole.

:func:`apply_rule` drives them: it forms the sums, cuts large tensors and joins small ones.  The optimizer, the
meta-trainer and the benchmarks all call it.

Shape legend: ``N`` tensors, ``S`` sums per tensor, ``M`` memory per tensor, ``C`` controls per tensor, ``G``
numbers per tensor given to ``observe``, ``n`` coordinates of one call: a tensor, a part of a large one, or several
small ones side by side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""Meta-parameters of a rule by name: what is learned and shipped."""

State = dict[str, Tensor]
"""Accumulators of one parameter by name, or the state that all parameters share."""


class StepContext(NamedTuple):
    """Where in the run a step is taken; 0-D float tensors, so that vmap can batch them and nothing recompiles."""

    step: Tensor
    """Number of this step, 1 at the first."""
    num_steps: Tensor
    """Length of the run, ``inf`` when unknown."""


@dataclass(frozen=True, kw_only=True)
class UpdateRule(ABC):
    """A pure update rule: fields are static hyper-parameters, tensors are arguments.

    Rules are out of place, draw no random numbers outside ``init_*``, and branch on shapes only, never on
    values, so that ``torch.func.vmap`` and ``torch.compile`` accept them.  ``observe`` and ``propose`` act on each
    coordinate by itself: per-tensor numbers come to them with a last axis of 1 or ``n``, for broadcasting.

    A rule never sees the learning rate, weight decay or the sign of ``maximize``: those belong to the caller.
    """

    name: ClassVar[str]
    """Identifier in ``config.json`` and on the command line."""

    tensor_state: ClassVar[frozenset[str]] = frozenset({"step", "memory"})
    """Keys of the state that exist once per tensor; every other value has shape ``(*param.shape, ...)``.

    ``step`` is advanced by the driver, ``memory`` by ``mix``; any other is a constant."""

    compressible_state: ClassVar[frozenset[str]] = frozenset()
    """Keys of the per-coordinate state that may be *kept* in ``bfloat16``; all is computed in ``float32`` at least.

    For the state of networks, most of which is replaced in each step, not for averages that advance by little."""

    @abstractmethod
    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Return fresh float32 weights on the CPU; a rule without learned weights returns an empty dict."""

    @abstractmethod
    def init_state(self, weights: Weights, param: Tensor, generator: torch.Generator | None = None) -> State:
        """Return the state of one parameter before its first step.

        Args:
            weights: the rule's weights (some rules start from learned vectors).
            param: the whole parameter, any shape, real floating dtype; defines device and dtype.
                The driver counts in ``state["step"]``; every rule starts it at zero.
            generator: source of the random initial values of the rules that have any.
        """

    def init_shared(self, weights: Weights) -> State:
        """Return the state that all parameters of one model share, before the first step; usually empty."""
        return {}

    def prepare(
        self, weights: Weights, steps_N: Tensor, memory_NM: Tensor, shared: State, context: StepContext
    ) -> Tensor:
        """Return ``[N, G]`` numbers for ``observe`` and ``propose``, before this step's gradients are looked at.

        Called once per step, before every ``observe``, with the step counters ``[N]`` (1 at the first step) and the
        memory of all tensors that take this step; ``G`` is 0 by default.
        """
        return memory_NM.new_zeros(memory_NM.shape[0], 0)

    @abstractmethod
    def observe(
        self, weights: Weights, state: State, grad: Tensor, param: Tensor, context: StepContext
    ) -> tuple[State, list[Tensor]]:
        """Advance the accumulators of some coordinates by one gradient.

        Args:
            weights: the rule's weights.
            state: per-coordinate values ``[n, ...]`` and per-tensor values ``[1]`` or ``[n]``; ``step`` is this step's,
                and ``given`` what ``prepare`` returned, as ``[G, 1]`` or ``[G, n]``.
            grad: gradient, ``[n]``.
            param: parameter, ``[n]``.
            context: where in the run the step is taken.

        Returns:
            The new per-coordinate state, and terms that the caller sums over each tensor: each ``[n]``, or ``[K, n]``
            for ``K`` of the ``S`` sums; the list may be empty.
        """

    def mix(
        self, weights: Weights, summaries_NS: Tensor, memory_NM: Tensor, shared: State, context: StepContext
    ) -> tuple[Tensor, Tensor, State]:
        """Combine the sums of all tensors of a model.  Called once per step, after every ``observe``.

        Returns:
            ``[N, C]`` controls (``C`` may be 0), the new ``[N, M]`` memory and the new shared state.
        """
        return summaries_NS.new_zeros(summaries_NS.shape[0], 0), memory_NM, shared

    @abstractmethod
    def propose(
        self, weights: Weights, state: State, grad: Tensor, param: Tensor, control: Tensor, context: StepContext
    ) -> tuple[State, Tensor]:
        """Return the per-coordinate state that changes now, and the step ``[n]`` to *add*.

        ``state`` is what ``observe`` returned, with the per-tensor values; ``control`` is what ``mix`` returned, as
        ``[C, 1]`` or ``[C, n]``.
        """

    @abstractmethod
    def step_size(self, weights: Weights, control_NC: Tensor, context: StepContext) -> Tensor:
        """Return ``[N]`` scales of the step per coordinate: what AdamW calls ``lr``, for decoupled weight decay."""


class RuleResult(NamedTuple):
    """What one step of a rule gives."""

    deltas: list[Tensor]
    """Step to add, one per parameter, in its shape; empty when the steps went to ``emit``."""
    states: list[State]
    """New state, one per parameter."""
    shared: State
    """New shared state."""


Emit = Callable[[int, slice, Tensor, Tensor], None]
"""``emit(index, where, delta, step_size)`` receives the step of the coordinates ``where`` of tensor ``index``."""


class Phases(NamedTuple):
    """The three phases of a rule as the driver calls them: plainly, or vectorised over many models and compiled.

    With ``batch_dims=1`` every tensor, weights included, has an axis of models in front, ``[*]`` below.
    """

    observe: Callable[[Weights, State, Tensor, Tensor, StepContext, bool], tuple[State, Tensor]]
    """``UpdateRule.observe``, followed by :func:`observe_phase`'s sum if the last argument is True."""
    prepare: Callable[[Weights, Tensor, Tensor, State, StepContext], Tensor]
    mix: Callable[[Weights, Tensor, Tensor, State, StepContext], tuple[Tensor, Tensor, State]]
    propose: Callable[[Weights, State, Tensor, Tensor, Tensor, StepContext], tuple[State, Tensor]]
    batch_dims: int = 0


def observe_phase(
    rule: UpdateRule, weights: Weights, state: State, grad: Tensor, param: Tensor, context: StepContext, total: bool
) -> tuple[State, Tensor]:
    """Return what ``rule.observe`` does, its terms as one ``[S, n]``, summed to ``[S, 1]`` if ``total``."""
    new, terms = rule.observe(weights, state, grad, param, context)
    if not terms:
        return new, grad.new_zeros(0, 1 if total else len(grad))
    # Each is summed by itself: a compiler does that in the pass that computes it, and never stores the terms.
    return new, torch.cat([torch.atleast_2d(term.sum(-1, keepdim=True) if total else term) for term in terms])


def plain_phases(rule: UpdateRule) -> Phases:
    """Return the phases for one model."""
    return Phases(partial(observe_phase, rule), rule.prepare, rule.mix, rule.propose)


def apply_rule(
    rule: UpdateRule,
    weights: Weights,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    shared: State,
    context: StepContext,
    *,
    emit: Emit | None = None,
    chunk_size: int | None = None,
    pack_size: int = 0,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
    phases: Phases | None = None,
) -> RuleResult:
    """Take one step of ``rule`` on all tensors of a model.

    Without ``emit`` the call is pure.  With ``emit`` its memory is bounded: states are overwritten in place, part by
    part, and each part's step goes to ``emit`` instead of ``deltas``.

    Args:
        rule: the update rule.
        weights: its weights, in the dtype to compute in.
        params: at least one parameter; any shapes, contiguous; half types are computed on in float32.
        grads: one gradient per parameter, same shapes; never modified.
        states: one state per parameter, in the dtype to compute in; ``compressible_state`` may be in ``bfloat16``.
        shared: state shared by all parameters.
        context: where in the run the step is taken.
        emit: receiver of the steps; makes the call in place.
        chunk_size: largest number of coordinates handled at once; ``None`` for no bound.
        pack_size: tensors of at most so many coordinates are handled side by side, which saves calls.
        all_reduce: sums ``[N, S]`` summaries over the shards of sharded tensors.
        phases: how to call the rule's methods; plainly by default.
    """
    phases = phases or plain_phases(rule)
    dim = phases.batch_dims
    packs = _packs([math.prod(param.shape[dim:]) for param in params], chunk_size, pack_size)
    steps = [state["step"] + 1 for state in states]
    if "memory" in states[0]:
        memory_NM = torch.stack([state["memory"] for state in states], dim)
    else:
        memory_NM = steps[0].new_zeros(*steps[0].shape, len(states), 0)
    given_NG = phases.prepare(weights, torch.stack(steps, dim), memory_NM, shared, context)
    observed: list[State] = []
    sums: list[list[Tensor]] = [[] for _ in params]
    owners_of_pack = [_owners(pack, steps[0].device) for pack in packs]
    for pack, owners in zip(packs, owners_of_pack, strict=True):
        grad_n, param_n = _gather(pack, grads, dim), _gather(pack, params, dim)
        old_n = _gather_coordinates(rule, pack, states, params, dim)
        constants = _gather_constants(rule, owners, states, steps, given_NG)
        alone = len(pack) == 1
        new_n, terms_Sn = phases.observe(weights, old_n | constants, grad_n, param_n, context, alone)
        if emit is None:
            observed.append(old_n | new_n)
        else:
            _overwrite(pack, new_n, states)
        for part, terms in zip(pack, terms_Sn.split([1] if alone else _sizes(pack), dim=-1), strict=True):
            sums[part.tensor].append(terms.sum(-1))

    summaries_NS = torch.stack([torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] for parts in sums], dim)
    if all_reduce is not None:
        summaries_NS = all_reduce(summaries_NS)
    control_NC, memory_NM, shared = phases.mix(weights, summaries_NS, memory_NM, shared, context)
    step_sizes_N = None if emit is None else rule.step_size(weights, control_NC, context)

    deltas: list[list[Tensor]] = [[] for _ in params]
    updates: list[dict[str, list[Tensor]]] = [{} for _ in params]
    for position, (pack, owners) in enumerate(zip(packs, owners_of_pack, strict=True)):
        grad_n, param_n = _gather(pack, grads, dim), _gather(pack, params, dim)
        # Gathered anew where it is kept in the states: what is kept in a half type is not held twice for all packs.
        state_n = observed[position] if emit is None else _gather_coordinates(rule, pack, states, params, dim)
        control_Cn = control_NC.transpose(-1, -2)[..., owners]
        constants = _gather_constants(rule, owners, states, steps, given_NG)
        new_n, delta_n = phases.propose(weights, state_n | constants, grad_n, param_n, control_Cn, context)
        if emit is not None:
            _overwrite(pack, new_n, states)
        for part, delta in zip(pack, delta_n.split(_sizes(pack), dim=-1), strict=True):
            if emit is None or step_sizes_N is None:
                deltas[part.tensor].append(delta)
            else:
                emit(part.tensor, part.where, delta, step_sizes_N[part.tensor])
        if emit is None:
            for key, value in (state_n | new_n).items():
                for part, piece in zip(pack, value.split(_sizes(pack), dim=dim), strict=True):
                    updates[part.tensor].setdefault(key, []).append(piece)

    new_states = []
    for index, state in enumerate(states):
        update = {key: _join(pieces, state[key], dim) for key, pieces in updates[index].items()}
        update["step"] = steps[index]
        if "memory" in state:
            update["memory"] = memory_NM.select(dim, index)
        if emit is None:
            new_states.append(state | update)
        else:
            new_states.append(state | {key: state[key].copy_(value) for key, value in update.items()})
    joined = [_join(pieces, param, dim) for pieces, param in zip(deltas, params, strict=True) if pieces]
    return RuleResult(joined, new_states, shared)


class _Part(NamedTuple):
    """Some coordinates of one tensor."""

    tensor: int
    where: slice

    @property
    def size(self) -> int:
        return int(self.where.stop - self.where.start)


_Pack = list[_Part]
"""Coordinates handled in one call: a part of one tensor, or several whole small tensors."""


def _packs(numels: list[int], chunk_size: int | None, pack_size: int) -> list[_Pack]:
    """Share out all coordinates; small tensors come in common packs, an empty tensor is a part of size 0."""
    small = [_Part(index, slice(0, numel)) for index, numel in enumerate(numels) if numel <= pack_size]
    packs: list[_Pack] = []
    filled = 0
    for part in small:
        if not packs or (chunk_size is not None and filled + part.size > chunk_size):
            packs.append([])
            filled = 0
        packs[-1].append(part)
        filled += part.size
    for index, numel in enumerate(numels):
        if numel > pack_size:
            size = max(1, chunk_size or numel)
            packs += [[_Part(index, slice(at, min(at + size, numel)))] for at in range(0, max(1, numel), size)]
    return packs


def _owners(pack: _Pack, device: torch.device) -> Tensor:
    """Return the tensor index of every coordinate of a pack, or ``[1]`` index where they are all the same."""
    if len(pack) == 1:
        return torch.full((1,), pack[0].tensor, device=device)  # a fill, where torch.tensor would synchronise
    indices = torch.tensor([part.tensor for part in pack], device=device)
    sizes = torch.tensor([part.size for part in pack], device=device)
    return indices.repeat_interleave(sizes, output_size=sum(part.size for part in pack))


def _sizes(pack: _Pack) -> list[int]:
    return [part.size for part in pack]


def _gather(pack: _Pack, tensors: Sequence[Tensor], dim: int, keep_dims: int = 0) -> Tensor:
    """Return coordinates flat on axis ``dim``, in at least float32; the last ``keep_dims`` axes stay."""
    flat = []
    for part in pack:
        tensor = tensors[part.tensor]
        kept = tensor.shape[tensor.dim() - keep_dims :]
        coordinates = tensor.reshape(*tensor.shape[:dim], -1, *kept).narrow(dim, part.where.start, part.size)
        flat.append(coordinates.to(torch.promote_types(coordinates.dtype, torch.float32)))
    return torch.cat(flat, dim) if len(flat) > 1 else flat[0]


def _gather_coordinates(
    rule: UpdateRule, pack: _Pack, states: Sequence[State], params: Sequence[Tensor], dim: int
) -> State:
    """Return the per-coordinate state of a pack, ``[*, n, ...]``, in the dtype to compute in."""
    first = pack[0].tensor
    dtype = states[first]["step"].dtype
    return {
        key: _gather(pack, [state[key] for state in states], dim, value.dim() - params[first].dim()).to(dtype)
        for key, value in states[first].items()
        if key not in rule.tensor_state
    }


def _gather_constants(
    rule: UpdateRule, owners: Tensor, states: Sequence[State], steps: list[Tensor], given_NG: Tensor
) -> State:
    """Return the per-tensor state of a pack, ``[*, 1]`` or ``[*, n]``, with the step counters already advanced."""
    keys = [key for key in states[0] if key in rule.tensor_state and key not in ("memory", "step")]
    values = {key: torch.stack([state[key] for state in states], -1)[..., owners] for key in keys}
    given_Gn = given_NG.transpose(-1, -2)[..., owners]
    return values | {"step": torch.stack(steps, -1)[..., owners], "given": given_Gn}


def _overwrite(pack: _Pack, new_n: State, states: Sequence[State]) -> None:
    """Write per-coordinate state into its storage, in the dtype it is kept in."""
    for key, value in new_n.items():
        start = 0
        for part in pack:
            storage = states[part.tensor][key].view(-1, *value.shape[1:])
            storage[part.where].copy_(value[start : start + part.size])
            start += part.size


def _join(pieces: list[Tensor], like: Tensor, dim: int) -> Tensor:
    """Put the parts of one tensor together in its shape."""
    return (torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]).reshape(like.shape)
