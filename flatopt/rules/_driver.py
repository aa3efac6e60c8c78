"""The one driver that applies a rule to the tensors of a model.

It packs coordinates, calls the phases of :class:`UpdateRule`, and forms the sums between them.  Where results go is the
only thing that differs between its two uses: :class:`_Pure` collects new tensors, :class:`_InPlace` overwrites
parameters and states, part by part, so that its memory is bounded.

Legend as in :mod:`flatopt.rules._rule`; ``*`` is an axis of models in front of everything, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._rule import State, StepContext, TensorFacts, TensorShape, UpdateRule, Weights
from ._strips import Strips


class RuleResult(NamedTuple):
    """What one step of a rule gives."""

    deltas: list[Tensor]
    """Step to add, one per parameter, in its shape; empty where parameters were updated in place."""
    states: list[State]
    """New state, one per parameter."""
    shared: State
    """New shared state."""


class Phases(NamedTuple):
    """The phases of a rule as the driver calls them: plainly, or vectorised over many models, or compiled."""

    prepare: Callable[..., Tensor]
    observe: Callable[..., tuple[State, Tensor]]
    """:func:`observe_phase` without its first argument."""
    matrix: Callable[..., Tensor]
    couple: Callable[..., tuple[Tensor, list[Tensor]]]
    mix: Callable[..., tuple[Tensor, Tensor, State]]
    propose: Callable[..., tuple[State, Tensor]]
    pull: Callable[..., tuple[State, Tensor]]
    batch_dims: int = 0
    """1 if every tensor, weights included, has an axis of models in front."""


def observe_phase(
    rule: UpdateRule,
    total: bool,
    weights: Weights,
    state: State,
    grad: Tensor,
    param: Tensor,
    facts: TensorFacts,
    context: StepContext,
) -> tuple[State, Tensor]:
    """Return what ``rule.observe`` does, its terms as one ``[S, n]``, summed to ``[S, 1]`` if ``total``."""
    new, terms = rule.observe(weights, state, grad, param, facts, context)
    if not terms:
        return new, grad.new_zeros(0, 1 if total else len(grad))
    # Each is summed by itself: a compiler does that in the pass that computes it, and never stores the terms.
    return new, torch.cat([torch.atleast_2d(term.sum(-1, keepdim=True) if total else term) for term in terms])


def plain_phases(rule: UpdateRule) -> Phases:
    """Return the phases for one model."""
    observe = partial(observe_phase, rule)
    return Phases(rule.prepare, observe, rule.matrix, rule.couple, rule.mix, rule.propose, rule.pull)


def batched_phases(rule: UpdateRule) -> Phases:
    """Return the phases for many models side by side."""

    def observe(total: bool, *arguments: Any) -> tuple[State, Tensor]:
        result: tuple[State, Tensor] = torch.vmap(partial(observe_phase, rule, total))(*arguments)
        return result

    vmap = torch.vmap
    return Phases(
        vmap(rule.prepare),
        observe,
        vmap(rule.matrix),
        vmap(rule.couple),
        vmap(rule.mix),
        vmap(rule.propose),
        vmap(rule.pull),
        batch_dims=1,
    )


class Update(NamedTuple):
    """How steps are applied in place: ``x <- x (1 - lr step_size weight_decay) + lr step + min(lr, 1) pull``."""

    lrs_N: Tensor
    weight_decays_N: Tensor


Reduce = Callable[[list[Tensor]], list[Tensor]]
"""Sums one vector per tensor over the processes that hold shards of the tensor; others come back as they are."""


class Plan(NamedTuple):
    """How the driver works; nothing here changes what is computed but for rounding."""

    update: Update | None = None
    """Work in place, and apply the steps so; ``None`` for a pure call."""
    chunk_size: int | None = None
    """Most coordinates handled at once, ``None`` for no bound; a strip is never cut."""
    pack_size: int = 0
    """Tensors of at most so many coordinates are handled side by side, which saves calls."""
    phases: Phases | None = None
    """How to call the rule; plainly by default."""
    pulls: bool = True
    """Whether to call ``pull``; may be False in a step that is not one after a whole period."""
    shapes: Sequence[TensorShape] | None = None
    """Of the whole tensors; those of ``params`` by default."""
    first_strips: Sequence[int] | None = None
    """Strips of the whole tensor that come before those of ``params``; none by default."""
    reduce: Reduce | None = None
    """What to do with the sums of sharded tensors."""


PURE = Plan()
"""A pure call."""


def apply_rule(
    rule: UpdateRule,
    weights: Weights,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    shared: State,
    context: StepContext,
    plan: Plan = PURE,
) -> RuleResult:
    """Take one step of ``rule`` on all tensors of a model.

    Args:
        rule: the update rule.
        weights: its weights, in the dtype to compute in.
        params: at least one parameter; any shapes, contiguous, real; half types are computed on in float32.
        grads: one gradient per parameter, same shapes; never modified.
        states: one state per parameter, in the dtype to compute in; ``compressible_state`` may be in ``bfloat16``.
        shared: state shared by all parameters.
        context: where in the run the step is taken.
        plan: how to work.
    """
    phases = plan.phases or plain_phases(rule)
    dim = phases.batch_dims
    shapes = plan.shapes or [TensorShape.of(param.shape[dim:]) for param in params]
    cuts = [Strips.of(shape, rule.max_strip) for shape in shapes]
    packs = _share_out(params, cuts, dim, plan)
    store = (_Pure if plan.update is None else _InPlace)(rule, params, grads, states, dim, plan.update)

    steps = [state["step"] + 1 for state in states]
    memory_NM = _stack_memory(rule, states, steps, dim)
    given_NG = phases.prepare(weights, torch.stack(steps, dim), memory_NM, shared, context)
    step_N, given_GN = torch.stack(steps, -1), given_NG.transpose(-1, -2)
    facts = [TensorFacts(pack.spread(step_N), pack.spread(given_GN), step_N[..., :0]) for pack in packs]
    sums = _Sums(len(params))
    for pack, known in zip(packs, facts, strict=True):
        state, grad, param = store.read(pack)
        new, terms_Sn = phases.observe(pack.is_single, weights, state, grad, param, known, context)
        store.write(pack, new)
        sums.add_terms(pack, terms_Sn)
        if pack.cut is not None:
            sums.add_grams(pack, phases.matrix(weights, state | new, grad, known), params, dim)

    factors, summaries_NS = _couple(rule, phases, weights, sums, cuts, plan, dim)
    control_NC, memory_NM, shared = phases.mix(weights, summaries_NS, memory_NM, shared, context, shapes=shapes)
    store.begin_steps(rule.step_size(weights, control_NC, context) if plan.update is not None else None)
    for pack, known in zip(packs, facts, strict=True):
        state, grad, param = store.read(pack)
        if rule.max_strip:
            matrix_n = grad if pack.cut is None else phases.matrix(weights, state, grad, known)
            known = known._replace(coupled=_multiply(pack, factors, matrix_n, params, dim))
        control_Cn = pack.spread(control_NC.transpose(-1, -2))
        new, delta = phases.propose(weights, state, grad, param, control_Cn, known, context)
        moved = None
        if rule.pull_period and plan.pulls:
            pulled, moved = phases.pull(weights, state | new, param, context)
            new = new | pulled
        store.write(pack, new)
        store.move(pack, param, delta, moved)
    return store.result(steps, memory_NM, shared)


class _Part(NamedTuple):
    """Some coordinates of one tensor."""

    tensor: int
    where: slice | None
    """``None`` for all of them."""
    size: int


class _Run(NamedTuple):
    """Parts side by side that have one size and are cut in one way."""

    parts: list[_Part]
    cut: Strips | None


class _MatrixRun(NamedTuple):
    """A run of matrices."""

    parts: list[_Part]
    cut: Strips


class _Pack:
    """Coordinates handled in one call: a part of one tensor, or several whole small ones; vectors or matrices."""

    def __init__(self, runs: list[_Run]):
        self.runs = runs
        self.parts = [part for run in runs for part in run.parts]
        self.sizes = [part.size for part in self.parts]
        self.cut = runs[0].cut
        self.owners: Tensor | None = None

    @property
    def is_single(self) -> bool:
        return len(self.parts) == 1

    def spread(self, values_XN: Tensor) -> Tensor:
        """Return ``[*, ..., 1]`` or ``[*, ..., n]`` of what is given per tensor, ``[*, ..., N]``."""
        if self.is_single:
            index = self.parts[0].tensor
            return values_XN[..., index : index + 1]
        if self.owners is None:
            device = values_XN.device
            owners = torch.tensor([part.tensor for part in self.parts], device=device)
            sizes = torch.tensor(self.sizes, device=device)
            self.owners = owners.repeat_interleave(sizes, output_size=sum(self.sizes))
        return values_XN.index_select(-1, self.owners)

    def split(self, values_n: Tensor, dim: int = -1) -> Sequence[Tensor]:
        """Return what belongs to each part."""
        return (values_n,) if self.is_single else values_n.split(self.sizes, dim)


def _share_out(params: Sequence[Tensor], cuts: Sequence[Strips | None], dim: int, plan: Plan) -> list[_Pack]:
    """Share out all coordinates; an empty tensor is a part of size 0."""
    numels = [param.shape[dim:].numel() for param in params]
    packs: list[list[_Run]] = []
    filled = 0

    def kind(index: int) -> tuple[bool, torch.Size]:
        return cuts[index] is not None, params[index].shape

    # Tensors of one shape side by side: their strips are then one batch.
    small = sorted((index for index, numel in enumerate(numels) if numel <= plan.pack_size), key=kind)
    for (is_matrix, _), group in groupby(small, kind):
        run: _Run | None = None
        for index in group:
            is_full = plan.chunk_size is not None and filled + numels[index] > plan.chunk_size
            if not packs or is_full or is_matrix != (packs[-1][0].cut is not None):
                packs.append([])
                filled, run = 0, None
            if run is None:
                run = _Run([], cuts[index])
                packs[-1].append(run)
            run.parts.append(_Part(index, None, numels[index]))
            filled += numels[index]
    for index, numel in enumerate(numels):
        if numel > plan.pack_size:
            pieces = _pieces(index, params[index].shape[dim:], cuts[index], plan)
            packs += [[_Run([piece], cuts[index])] for piece in pieces]
    return [_Pack(runs) for runs in packs]


def _pieces(index: int, shape: torch.Size, cut: Strips | None, plan: Plan) -> Iterable[_Part]:
    """Cut one tensor: a tall matrix between its rows, a wide one between its strips."""
    numel = shape.numel()
    most = max(1, plan.chunk_size or numel)
    if cut is not None and numel:
        unit = numel // shape[0] * (1 if cut.is_tall else cut.size)
        most = max(most // unit, 1) * unit
    if most >= numel:
        return [_Part(index, None, numel)]
    starts = range(0, numel, most)
    return [_Part(index, slice(at, min(at + most, numel)), min(most, numel - at)) for at in starts]


class _Store:
    """What the driver reads from and writes to."""

    def __init__(
        self,
        rule: UpdateRule,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        dim: int,
        update: Update | None,
    ):
        self.params, self.grads, self.states, self.dim, self.update = params, grads, states, dim, update
        self.dtype = states[0]["step"].dtype
        self.memory = rule.memory
        once = {"step", *rule.memory}
        self.keys = [key for key in states[0] if key not in once]
        # What stands behind the shape of the parameter: the width of a network's state, say.
        self.extra_dims = {key: states[0][key].dim() - params[0].dim() for key in self.keys}

    def gather(self, pack: _Pack, tensors: Sequence[Tensor], extra_dims: int = 0) -> Tensor:
        """Return coordinates flat on axis ``dim``, in the dtype to compute in; the last ``extra_dims`` axes stay."""
        flat = [self.flat(part, tensors[part.tensor], extra_dims) for part in pack.parts]
        return (torch.cat(flat, self.dim) if len(flat) > 1 else flat[0]).to(self.dtype)

    def flat(self, part: _Part, tensor: Tensor, extra_dims: int = 0) -> Tensor:
        kept = tensor.shape[tensor.dim() - extra_dims :]
        flat = tensor.reshape(*tensor.shape[: self.dim], -1, *kept)
        return flat if part.where is None else flat.narrow(self.dim, part.where.start, part.size)

    def gather_state(self, pack: _Pack) -> State:
        return {key: self.gather(pack, [s[key] for s in self.states], self.extra_dims[key]) for key in self.keys}


class _Pure(_Store):
    """Collects new states and steps; nothing given is modified."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.held: dict[int, tuple[State, Tensor, Tensor]] = {}
        self.deltas: list[list[Tensor]] = [[] for _ in self.params]
        self.updates: list[dict[str, list[Tensor]]] = [{} for _ in self.params]

    def read(self, pack: _Pack) -> tuple[State, Tensor, Tensor]:
        if id(pack) not in self.held:
            grad, param = self.gather(pack, self.grads), self.gather(pack, self.params)
            self.held[id(pack)] = (self.gather_state(pack), grad, param)
        return self.held[id(pack)]

    def write(self, pack: _Pack, new: State) -> None:
        state, grad, param = self.held[id(pack)]
        self.held[id(pack)] = (state | new, grad, param)

    def begin_steps(self, step_sizes_N: Tensor | None) -> None:
        pass

    def move(self, pack: _Pack, param: Tensor, delta: Tensor, pulled: Tensor | None) -> None:
        delta = delta if pulled is None else delta + pulled
        for part, piece in zip(pack.parts, pack.split(delta), strict=True):
            self.deltas[part.tensor].append(piece)
        for key, value in self.held.pop(id(pack))[0].items():
            for part, piece in zip(pack.parts, pack.split(value, self.dim), strict=True):
                self.updates[part.tensor].setdefault(key, []).append(piece)

    def result(self, steps: Sequence[Tensor], memory_NM: Tensor, shared: State) -> RuleResult:
        states = []
        for index, state in enumerate(self.states):
            update = {key: _join(pieces, state[key], self.dim) for key, pieces in self.updates[index].items()}
            states.append(
                state | update | {"step": steps[index]} | _memory_of(self.memory, memory_NM, index, state, self.dim)
            )
        deltas = [_join(pieces, param, self.dim) for pieces, param in zip(self.deltas, self.params, strict=True)]
        return RuleResult(deltas, states, shared)


class _InPlace(_Store):
    """Overwrites states and parameters, part by part; small tensors are gathered once."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.held: dict[int, tuple[State, Tensor, Tensor]] = {}

    def read(self, pack: _Pack) -> tuple[State, Tensor, Tensor]:
        if id(pack) in self.held:
            return self.held[id(pack)]
        values = self.gather_state(pack), self.gather(pack, self.grads), self.gather(pack, self.params)
        if not pack.is_single:
            self.held[id(pack)] = values
        return values

    def write(self, pack: _Pack, new: State) -> None:
        for key, value in new.items():
            states = [self.states[part.tensor][key] for part in pack.parts]
            self._scatter(pack, states, value, self.extra_dims[key])
        if id(pack) in self.held:
            state, grad, param = self.held[id(pack)]
            first = self.states[pack.parts[0].tensor]
            kept = {key: value.to(first[key].dtype).to(self.dtype) for key, value in new.items()}
            self.held[id(pack)] = (state | kept, grad, param)

    def _scatter(self, pack: _Pack, tensors: Sequence[Tensor], value: Tensor, extra_dims: int) -> None:
        """Write in the dtype that is kept."""
        targets = [self.flat(part, tensor, extra_dims) for part, tensor in zip(pack.parts, tensors, strict=True)]
        torch._foreach_copy_(targets, list(pack.split(value, 0)))

    def begin_steps(self, step_sizes_N: Tensor | None) -> None:
        assert self.update is not None and step_sizes_N is not None
        lrs_N, weight_decays_N = self.update
        self.factors_3N = torch.stack([lrs_N, 1 - lrs_N * step_sizes_N * weight_decays_N, lrs_N.clamp(max=1)])

    def move(self, pack: _Pack, param: Tensor, delta: Tensor, pulled: Tensor | None) -> None:
        lr, kept, at_most_1 = pack.spread(self.factors_3N)
        moved = torch.addcmul(param * kept, delta, lr)
        if pulled is not None:
            moved = torch.addcmul(moved, pulled, at_most_1)
        self._scatter(pack, [self.params[part.tensor] for part in pack.parts], moved, 0)
        self.held.pop(id(pack), None)

    def result(self, steps: Sequence[Tensor], memory_NM: Tensor, shared: State) -> RuleResult:
        targets = [state["step"] for state in self.states]
        values = list(steps)
        for index, state in enumerate(self.states):
            update = _memory_of(self.memory, memory_NM, index, state, 0)
            targets += [state[key] for key in update]
            values += update.values()
        torch._foreach_copy_(targets, values)
        return RuleResult([], list(self.states), shared)


class _Sums:
    """What was summed over the coordinates of each tensor."""

    def __init__(self, num_tensors: int):
        self.terms: list[list[Tensor]] = [[] for _ in range(num_tensors)]
        self.grams: list[list[Tensor]] = [[] for _ in range(num_tensors)]

    def add_terms(self, pack: _Pack, terms_Sn: Tensor) -> None:
        start = 0
        for run in pack.runs:
            count, size = len(run.parts), run.parts[0].size
            sums = terms_Sn  # of a single part: summed already
            if not pack.is_single:
                sums = terms_Sn.narrow(-1, start, count * size).unflatten(-1, (count, size)).sum(-1)
            for part, total in zip(run.parts, sums.unbind(-1), strict=True):
                self.terms[part.tensor].append(total)
            start += count * size

    def add_grams(self, pack: _Pack, matrix_n: Tensor, params: Sequence[Tensor], dim: int) -> None:
        for run, matrices in _matrices(pack, matrix_n, params, dim):
            grams = run.cut.gram(matrices)
            for position, part in enumerate(run.parts):
                self.grams[part.tensor].append(grams.select(-4, position))

    def total(self, index: int, cut: Strips | None, dim: int) -> list[Tensor]:
        """Return the sums ``[*, S]`` and the Gram matrices ``[*, k, S, S]`` of a tensor."""
        terms, grams = self.terms[index], self.grams[index]
        whole = [terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)]
        if cut is not None and grams:
            if len(grams) == 1:
                whole += grams
            else:
                whole.append(torch.stack(grams).sum(0) if cut.is_tall else torch.cat(grams, dim))
        return whole


def _matrices(pack: _Pack, matrix_n: Tensor, params: Sequence[Tensor], dim: int) -> Iterable[tuple[_MatrixRun, Tensor]]:
    """Return the runs of a pack of matrices, and their coordinates as ``[*, tensors, outputs, inputs]``."""
    start = 0
    for parts, cut in pack.runs:
        count, size = len(parts), parts[0].size
        if cut is not None and size:
            inputs = params[parts[0].tensor].shape[dim + 1 :].numel()
            coordinates = matrix_n.narrow(-1, start, count * size)
            yield _MatrixRun(parts, cut), coordinates.unflatten(-1, (count, size // inputs, inputs))
        start += count * size


def _couple(
    rule: UpdateRule,
    phases: Phases,
    weights: Weights,
    sums: _Sums,
    cuts: Sequence[Strips | None],
    plan: Plan,
    dim: int,
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the factors ``[*, k, S, S]`` of the strips of each matrix, and the sums of all tensors ``[*, N, S]``."""
    totals = [sums.total(index, cut, dim) for index, cut in enumerate(cuts)]
    first_strips = plan.first_strips or [0] * len(cuts)
    if plan.reduce is not None:
        totals = _reduce(plan.reduce, totals, cuts, first_strips)
    summaries_NS = torch.stack([total[0] for total in totals], dim)
    if not rule.max_strip:
        return {}, summaries_NS
    matrices = [index for index, total in enumerate(totals) if len(total) == 2]
    numbers = [totals[index][1].shape[dim] for index in matrices]
    nothing = summaries_NS.new_zeros(*summaries_NS.shape[:dim], 0, rule.max_strip, rule.max_strip)
    grams_Kss = torch.cat([nothing, *(totals[index][1] for index in matrices)], dim)
    factors_Kss, terms = phases.couple(weights, grams_Kss)
    terms_TK = torch.stack(terms, dim)
    # The first of each is that of no strips: zero, for vectors.
    factors = factors_Kss.split([0, *numbers], dim)
    sums_T = [part.sum(-1) for part in terms_TK.split([0, *numbers], -1)]
    more = dict(zip(matrices, sums_T[1:], strict=True))
    more_NT = torch.stack([more.get(index, sums_T[0]) for index in range(len(cuts))], dim)
    firsts = [first_strips[index] for index in matrices]
    local = [
        factor.narrow(dim, first, factor.shape[dim] - first) for factor, first in zip(factors[1:], firsts, strict=True)
    ]
    return dict(zip(matrices, local, strict=True)), torch.cat([summaries_NS, more_NT], -1)


def _reduce(
    reduce: Reduce, totals: list[list[Tensor]], cuts: Sequence[Strips | None], first_strips: Sequence[int]
) -> list[list[Tensor]]:
    """Sum over shards; a shard puts the Gram matrices of its strips in their places among those of the tensor."""
    rows = []
    for total, cut, first in zip(totals, cuts, first_strips, strict=True):
        parts = [total[0]]
        if cut is not None:
            placed = total[0].new_zeros(cut.number, cut.max_strip, cut.max_strip)
            if len(total) == 2:
                placed[first : first + len(total[1])] = total[1]
            parts.append(placed.flatten())
        rows.append(torch.cat(parts))
    reduced = []
    for row, total, cut in zip(reduce(rows), totals, cuts, strict=True):
        sizes = [len(total[0]), len(row) - len(total[0])]
        terms, grams = row.split(sizes)
        reduced.append([terms] if cut is None else [terms, grams.view(cut.number, cut.max_strip, cut.max_strip)])
    return reduced


def _multiply(pack: _Pack, factors: dict[int, Tensor], matrix_n: Tensor, params: Sequence[Tensor], dim: int) -> Tensor:
    """Return the strips of a pack times their factors, ``[*, n]``; zero for vectors."""
    coupled = []
    for run, matrices in _matrices(pack, matrix_n, params, dim):
        chosen, (part, *_) = [factors[part.tensor] for part in run.parts], run.parts
        if part.where is not None and not run.cut.is_tall:
            strip = run.cut.size * matrices.shape[-1]
            first, last = part.where.start // strip, -(-part.where.stop // strip)
            chosen = [chosen[0].narrow(dim, first, last - first)]
        coupled.append(run.cut.couple(torch.stack(chosen, dim), matrices).flatten(-3))
    if not coupled:
        return torch.zeros_like(matrix_n)
    return coupled[0] if len(coupled) == 1 else torch.cat(coupled, -1)


def _stack_memory(rule: UpdateRule, states: Sequence[State], steps: Sequence[Tensor], dim: int) -> Tensor:
    """Return ``[*, N, M]``."""
    columns = []
    for key in rule.memory:
        column = torch.stack([state[key] for state in states], dim)
        columns.append(column if column.dim() == dim + 2 else column.unsqueeze(-1))
    return torch.cat(columns, -1) if columns else torch.stack(list(steps), dim).unsqueeze(-1)[..., :0]


def _memory_of(keys: Sequence[str], memory_NM: Tensor, index: int, state: State, dim: int) -> State:
    """Undo :func:`_stack_memory` for one tensor."""
    row, start = memory_NM.select(dim, index), 0
    values = {}
    for key in keys:
        if state[key].dim() > dim:
            values[key] = row.narrow(-1, start, state[key].shape[-1])
            start += state[key].shape[-1]
        else:
            values[key] = row.select(-1, start)
            start += 1
    return values


def _join(pieces: list[Tensor], like: Tensor, dim: int) -> Tensor:
    """Put the parts of one tensor together in its shape."""
    return (torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]).reshape(like.shape)
