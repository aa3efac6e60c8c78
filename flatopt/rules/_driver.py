"""The one driver that applies a rule to the tensors of a model.

It packs coordinates, calls the phases of :class:`UpdateRule`, and forms the sums between them.  Where results go is the
only thing that differs between its two uses: :class:`_Pure` collects new tensors, :class:`_InPlace` overwrites
parameters and states, part by part, so that its memory is bounded.

Legend as in :mod:`flatopt.rules._rule`; ``*`` is an axis of models in front of everything, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._rule import State, StepContext, TensorFacts, TensorShape, UpdateRule, Weights
from ._strips import Strips

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


class Phases(NamedTuple):
    """The phases of a rule as the driver calls them: plainly, or vectorised over many models, or compiled."""

    prepare: Callable[..., Tensor]
    observe: Callable[..., tuple[State, Tensor]]
    """:func:`observe_phase` without its first argument."""
    matrix: Callable[..., Tensor]
    couple: Callable[..., tuple[Tensor, list[Tensor]]]
    mix: Callable[..., tuple[Tensor, Tensor, State]]
    propose: Callable[..., tuple[State, Tensor | None]]
    """:func:`propose_phase` without its first argument."""
    pull: Callable[..., tuple[State, Tensor]]
    batch_dims: int = 0
    """1 if every tensor, weights included, has an axis of models in front."""


def observe_phase(
    rule: UpdateRule,
    total: bool,
    in_place: bool,
    weights: Weights,
    state: State,
    grad: Tensor,
    param: Tensor,
    facts: TensorFacts,
    context: StepContext,
) -> tuple[State, Tensor]:
    """Return what ``rule.observe`` does, its terms as one ``[S, n]``, summed to ``[S, 1]`` if ``total``.

    If ``in_place``, the new state is written over ``state``, and not returned.
    """
    new, terms = rule.observe(weights, state, grad, param, facts, context)
    rows: list[Tensor] = []
    for term in terms:
        # Each is summed by itself: a compiler does that in the pass that computes it, and never stores the terms.
        if isinstance(term, Tensor):
            value = term.sum(-1) if total else term
            rows += [value] if term.dim() == 1 else value.unbind()
        else:
            rows.append(torch.dot(*term) if total else torch.mul(*term))
    stacked = torch.stack(rows) if rows else grad.new_zeros(0, *(() if total else grad.shape))
    return _overwrite(state, new) if in_place else new, stacked.unsqueeze(-1) if total else stacked


def propose_phase(
    rule: UpdateRule,
    factors_Xn: Tensor | None,
    weights: Weights,
    state: State,
    grad: Tensor,
    param: Tensor,
    control_Cn: Tensor,
    facts: TensorFacts,
    context: StepContext,
) -> tuple[State, Tensor | None]:
    """Return what ``rule.propose`` does; given the factors of :class:`Update`, write it over state and parameter."""
    new, delta = rule.propose(weights, state, grad, param, control_Cn, facts, context)
    if factors_Xn is None:
        return new, delta
    kept = _overwrite(state, new)  # first: a rule may keep the parameter itself
    _move(param, delta, factors_Xn)
    return kept, None


def _overwrite(state: State, new: State) -> State:
    for key, value in new.items():
        state[key].copy_(value)
    return {}


def _move(param: Tensor, delta: Tensor, factors_Xn: Tensor) -> None:
    """Move a parameter by its step, in place."""
    lr, _, *kept = factors_Xn.unbind()
    if kept:
        param.copy_(torch.addcmul(param * kept[0], delta, lr))
    else:
        param.addcmul_(delta, lr)


def plain_phases(rule: UpdateRule) -> Phases:
    """Return the phases for one model."""
    observe, propose = partial(observe_phase, rule), partial(propose_phase, rule)
    return Phases(rule.prepare, observe, rule.matrix, rule.couple, rule.mix, propose, rule.pull)


def batched_phases(rule: UpdateRule) -> Phases:
    """Return the phases for many models side by side."""
    vmap = torch.vmap

    def observe(total: bool, in_place: bool, *arguments: Any) -> tuple[State, Tensor]:
        result: tuple[State, Tensor] = vmap(partial(observe_phase, rule, total, in_place))(*arguments)
        return result

    def propose(factors_Xn: None, *arguments: Any) -> tuple[State, Tensor | None]:
        result: tuple[State, Tensor | None] = vmap(partial(propose_phase, rule, factors_Xn))(*arguments)
        return result

    return Phases(
        vmap(rule.prepare),
        observe,
        vmap(rule.matrix),
        vmap(rule.couple),
        vmap(rule.mix),
        propose,
        vmap(rule.pull),
        batch_dims=1,
    )


class Update(NamedTuple):
    """How steps are applied in place: ``x <- x (1 - lr step_size weight_decay) + lr step + min(lr, 1) pull``."""

    lrs_N: Tensor
    weight_decays_N: Tensor | None
    """``None`` for none at all."""

    def factors(self, step_sizes_N: Tensor) -> Tensor:
        """Return what multiplies step, pull and, unless that is 1, parameter: ``[N, 2 or 3]``."""
        factors = [self.lrs_N, self.lrs_N.clamp(max=1)]
        if self.weight_decays_N is not None:
            factors.append(1 - self.lrs_N * step_sizes_N * self.weight_decays_N)
        return torch.stack(factors, -1)


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
    pieces = tuple(param.shape[dim:] for param in params)
    shapes = plan.shapes or [TensorShape.of(shape) for shape in pieces]
    firsts = None if plan.reduce is None else tuple(plan.first_strips or ())
    layout = _lay_out(pieces, tuple(shapes), firsts, rule.max_strip, plan.chunk_size, plan.pack_size)
    store = (_Pure if plan.update is None else _InPlace)(rule, layout, params, grads, states, dim, plan.update)

    steps_N = torch.stack([state["step"] for state in states], dim) + 1
    memory_NM = _stack_memory(rule, states, steps_N, dim)
    given_NG = phases.prepare(weights, steps_N, memory_NM, shared, context)
    known_XN = torch.cat([steps_N.unsqueeze(-2), given_NG.mT], -2)
    num_given, nothing = given_NG.shape[-1], steps_N[..., :0]
    facts = [
        TensorFacts(known_Xn.select(-2, 0), known_Xn.narrow(-2, 1, num_given), nothing)
        for known_Xn in _spread(layout, known_XN)
    ]
    sums = _Sums(layout, dim)
    for pack, known in zip(layout.packs, facts, strict=True):
        state, grad, param = store.read(pack)
        in_place = store.is_viewed and pack.is_single
        new, terms_Sn = phases.observe(pack.is_single, in_place, weights, state, grad, param, known, context)
        store.write(pack, new)
        sums.add_terms(pack, terms_Sn)
        if pack.is_matrix:
            sums.add_grams(pack, phases.matrix(weights, state | new, grad, known))

    factors, summaries_NS = _couple(rule, phases, weights, sums, layout, plan, dim)
    control_NC, memory_NM, shared = phases.mix(weights, summaries_NS, memory_NM, shared, context, shapes=shapes)
    num_controls = control_NC.shape[-1]
    if plan.update is not None:  # spread together
        control_NC = torch.cat([control_NC, plan.update.factors(rule.step_size(weights, control_NC, context))], -1)
    for pack, known, control_Cn in zip(layout.packs, facts, _spread(layout, control_NC.mT), strict=True):
        state, grad, param = store.read(pack)
        if rule.max_strip:
            matrix_n = phases.matrix(weights, state, grad, known) if pack.is_matrix else grad
            known = known._replace(coupled=_multiply(pack, factors, matrix_n, dim))
        of_rule = control_Cn.narrow(-2, 0, num_controls)
        of_update = control_Cn.narrow(-2, num_controls, control_Cn.shape[-2] - num_controls)
        moved = None
        if rule.pull_period and plan.pulls:
            pulled, moved = phases.pull(weights, state, param, context)
            store.write(pack, pulled)
            state, grad, param = store.read(pack)
        factors_Xn = of_update if store.is_viewed and pack.is_single else None
        new, delta = phases.propose(factors_Xn, weights, state, grad, param, of_rule, known, context)
        store.write(pack, new)
        store.move(pack, param, delta, moved, of_update)
    return store.result(steps_N, memory_NM, shared)


class _Run(NamedTuple):
    """Equal parts of tensors of one shape: several whole ones side by side, or a piece of one."""

    group: int
    tensors: tuple[int, ...]
    size: int
    """Coordinates of each part."""
    piece: int
    """Which piece of its tensor, 0 for all of it."""
    most: int
    """Coordinates of every piece but the last."""
    inputs: int
    """Coordinates of a row."""
    cut: Strips | None
    first_strip: int
    """Of the strips of the whole tensor."""
    num_strips: int


class _Group(NamedTuple):
    """All the runs that make up some tensors: one, or the pieces of one tensor."""

    tensors: tuple[int, ...]
    cut: Strips | None


class _Pack:
    """Coordinates handled in one call: a piece of one tensor, or several whole small ones; vectors or matrices."""

    def __init__(self, runs: Sequence[_Run], first: int):
        self.runs = runs
        self.first = first
        """Where its first tensor stands in the order of the layout."""
        self.tensors = [tensor for run in runs for tensor in run.tensors]
        self.sizes = [run.size for run in runs for _ in run.tensors]
        self.run_sizes = [len(run.tensors) * run.size for run in runs]
        self.counts = [len(run.tensors) for run in runs]
        self.is_single = len(self.tensors) == 1
        self.is_matrix = runs[0].cut is not None

    def split(self, values_n: Tensor, dim: int = -1) -> Sequence[Tensor]:
        """Return what belongs to each part."""
        return (values_n,) if self.is_single else values_n.split_with_sizes(self.sizes, dim)

    def by_run(self, values_n: Tensor) -> Sequence[Tensor]:
        """Return what belongs to each run."""
        return (values_n,) if len(self.runs) == 1 else values_n.split_with_sizes(self.run_sizes, -1)


class _Layout(NamedTuple):
    """How all coordinates are shared out; depends on shapes only."""

    packs: list[_Pack]
    groups: list[_Group]
    order: list[int]
    """The tensors as the packs have them."""
    places: list[int]
    """Where each tensor stands in that order."""


@lru_cache(maxsize=64)
def _lay_out(
    pieces: tuple[torch.Size, ...],
    shapes: tuple[TensorShape, ...],
    first_strips: tuple[int, ...] | None,
    max_strip: int,
    chunk_size: int | None,
    pack_size: int,
) -> _Layout:
    """Share out all coordinates of what is here of each tensor; an empty one is a part of size 0."""
    numels = [piece.numel() for piece in pieces]
    cuts = [Strips.of(shape, max_strip) for shape in shapes]
    largest = max((cut.size for cut in cuts if cut is not None), default=0)
    cuts = [cut and cut._replace(padded=largest) for cut in cuts]
    firsts = first_strips or (0,) * len(pieces)
    groups: list[_Group] = []
    packs: list[_Pack] = []
    order: list[int] = []

    def kind(index: int) -> tuple[Any, ...]:
        return cuts[index] is not None, pieces[index], cuts[index] or (), firsts[index]

    def add(tensors: tuple[int, ...], most: int) -> list[_Run]:
        index = tensors[0]
        cut, shape, first, numel = cuts[index], pieces[index], firsts[index], numels[index]
        inputs = shape[1:].numel()
        runs = []
        for piece, start in enumerate(range(0, max(numel, 1), most)):
            size = min(most, numel - start)
            first_strip = number = 0
            if cut is not None and size:
                first_strip = first + (0 if cut.is_tall else start // inputs // cut.size)
                number = -(-(inputs if cut.is_tall else size // inputs) // cut.size)
            runs.append(_Run(len(groups), tensors, size, piece, most, inputs, cut, first_strip, number))
        groups.append(_Group(tensors, cut))
        order.extend(tensors)
        return runs

    # Tensors of one shape side by side: their strips are then one batch.
    small = sorted((index for index, numel in enumerate(numels) if numel <= pack_size), key=kind)
    together: list[list[list[int]]] = []
    filled = 0
    for (is_matrix, *_), same in groupby(small, kind):
        is_new = True
        for index in same:
            is_full = chunk_size is not None and filled + numels[index] > chunk_size
            if not together or is_full or is_matrix != (cuts[together[-1][0][0]] is not None):
                together.append([])
                filled, is_new = 0, True
            if is_new:
                together[-1].append([])
                is_new = False
            together[-1][-1].append(index)
            filled += numels[index]
    for lists in together:
        first = len(order)
        packs.append(_Pack([run for one in lists for run in add(tuple(one), max(1, numels[one[0]]))], first))
    for index, numel in enumerate(numels):
        if numel > pack_size:
            first = len(order)
            packs += [_Pack([run], first) for run in add((index,), _most(pieces[index], cuts[index], chunk_size))]
    places = sorted(range(len(order)), key=order.__getitem__)
    return _Layout(packs, groups, order, places)


def _most(shape: torch.Size, cut: Strips | None, chunk_size: int | None) -> int:
    """Return the size of the pieces of one tensor: a tall matrix is cut between its rows, a wide one its strips."""
    numel = shape.numel()
    most = max(1, chunk_size or numel)
    if cut is not None and numel:
        unit = numel // shape[0] * (1 if cut.is_tall else cut.size)
        most = max(most // unit, 1) * unit
    return max(1, min(most, numel))


def _reorder(values_XN: Tensor, order: list[int]) -> Tensor:
    """Bring the last axis in another order."""
    if order == list(range(len(order))):
        return values_XN
    return values_XN.index_select(-1, torch.tensor(order, device=values_XN.device))


def _spread(layout: _Layout, values_XN: Tensor) -> Iterator[Tensor]:
    """Yield for each pack ``[*, X, 1]`` or ``[*, X, n]`` of what is given per tensor."""
    ordered_XN, last, values_Xn = _reorder(values_XN, layout.order), -1, values_XN
    for pack in layout.packs:
        if pack.first != last:  # else another piece of the same tensor
            last, values_Xn = pack.first, ordered_XN.narrow(-1, pack.first, len(pack.tensors))
            if not pack.is_single:
                parts = values_Xn.split_with_sizes(pack.counts, -1)
                spread = [
                    part.unsqueeze(-1).expand(*part.shape, run.size).flatten(-2)
                    for run, part in zip(pack.runs, parts, strict=True)
                ]
                values_Xn = spread[0] if len(spread) == 1 else torch.cat(spread, -1)
        yield values_Xn


class _Field:
    """One tensor per parameter, as the flat views that packs are made of."""

    def __init__(self, tensors: Sequence[Tensor], extra_dims: int, dim: int):
        self.tensors, self.extra_dims, self.dim = tensors, extra_dims, dim
        self.views: dict[int, list[list[Tensor]]] = {}

    def of(self, pack: _Pack) -> list[Tensor]:
        """Return one view per part, flat on axis ``dim``; the last ``extra_dims`` axes stay."""
        return [view for run in pack.runs for view in self._of_run(run)]

    def gather(self, pack: _Pack, dtype: torch.dtype) -> Tensor:
        """Return the coordinates of a pack, in the dtype to compute in; of a single part a view, if it has that."""
        value = self._of_run(pack.runs[0])[0] if pack.is_single else torch.cat(self.of(pack), self.dim)
        return value if value.dtype == dtype else value.to(dtype)

    def _of_run(self, run: _Run) -> list[Tensor]:
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


class _Store:
    """What the driver reads from and writes to."""

    def __init__(
        self,
        rule: UpdateRule,
        layout: _Layout,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        dim: int,
        update: Update | None,
    ):
        self.params, self.states, self.dim, self.update = params, states, dim, update
        self.dtype = states[0]["step"].dtype
        self.memory = rule.memory
        self.param_field, self.grad_field = _Field(params, 0, dim), _Field(grads, 0, dim)
        # What stands behind the shape of the parameter: the width of a network's state, say.
        self.state_fields = {
            key: _Field([state[key] for state in states], value.dim() - params[0].dim(), dim)
            for key, value in states[0].items()
            if key != "step" and key not in rule.memory
        }
        self.is_viewed = False
        """Whether what is read of a single part is the storage itself."""
        self.held: dict[_Pack, tuple[State, Tensor, Tensor]] = {}

    def gather(self, pack: _Pack) -> tuple[State, Tensor, Tensor]:
        state = {key: field.gather(pack, self.dtype) for key, field in self.state_fields.items()}
        return state, self.grad_field.gather(pack, self.dtype), self.param_field.gather(pack, self.dtype)


class _Pure(_Store):
    """Collects new states and steps; nothing given is modified."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.deltas: list[list[Tensor]] = [[] for _ in self.params]
        self.updates: list[dict[str, list[Tensor]]] = [{} for _ in self.params]

    def read(self, pack: _Pack) -> tuple[State, Tensor, Tensor]:
        if pack not in self.held:
            self.held[pack] = self.gather(pack)
        return self.held[pack]

    def write(self, pack: _Pack, new: State) -> None:
        state, grad, param = self.held[pack]
        self.held[pack] = (state | new, grad, param)

    def move(self, pack: _Pack, param: Tensor, delta: Tensor | None, pulled: Tensor | None, factors_Xn: Tensor) -> None:
        assert delta is not None
        delta = delta if pulled is None else delta + pulled
        for tensor, piece in zip(pack.tensors, pack.split(delta), strict=True):
            self.deltas[tensor].append(piece)
        for key, value in self.held.pop(pack)[0].items():
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


class _InPlace(_Store):
    """Overwrites states and parameters, part by part; small tensors are gathered once."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        fields = (self.param_field, self.grad_field, *self.state_fields.values())
        self.is_viewed = WRITES_ARE_KEPT and all(
            tensor.dtype == self.dtype for field in fields for tensor in field.tensors
        )

    def read(self, pack: _Pack) -> tuple[State, Tensor, Tensor]:
        if pack in self.held:
            return self.held[pack]
        values = self.gather(pack)
        if not pack.is_single or self.is_viewed:
            self.held[pack] = values
        return values

    def write(self, pack: _Pack, new: State) -> None:
        for key, value in new.items():
            self._scatter(pack, self.state_fields[key], value)
        if new and not pack.is_single:  # what is held of a single part is a view of what was written
            state, grad, param = self.held[pack]
            first = self.states[pack.tensors[0]]
            kept = {key: value.to(first[key].dtype).to(self.dtype) for key, value in new.items()}
            self.held[pack] = (state | kept, grad, param)

    def _scatter(self, pack: _Pack, field: _Field, value: Tensor) -> None:
        """Write in the dtype that is kept."""
        if pack.is_single:
            field.of(pack)[0].copy_(value)
        else:
            torch._foreach_copy_(field.of(pack), list(pack.split(value, 0)))

    def move(self, pack: _Pack, param: Tensor, delta: Tensor | None, pulled: Tensor | None, factors_Xn: Tensor) -> None:
        # What was read is the parameter itself, or a copy of the driver's own.
        if delta is not None:
            _move(param, delta, factors_Xn)
        if pulled is not None:
            param.addcmul_(pulled, factors_Xn[1])
        if not (self.is_viewed and pack.is_single):
            self._scatter(pack, self.param_field, param)
        self.held.pop(pack, None)

    def result(self, steps_N: Tensor, memory_NM: Tensor, shared: State) -> RuleResult:
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for key, rows in _unstack_memory(self.memory, self.states[0], steps_N, memory_NM, 0).items():
            targets += [state[key] for state in self.states]
            values += rows
        torch._foreach_copy_(targets, values)
        return RuleResult([], list(self.states), shared)


class _Sums:
    """What was summed over the coordinates of the tensors of each group."""

    def __init__(self, layout: _Layout, dim: int):
        self.layout, self.dim = layout, dim
        self.terms: list[list[Tensor]] = [[] for _ in layout.groups]
        self.grams: list[list[Tensor]] = [[] for _ in layout.groups]

    def add_terms(self, pack: _Pack, terms_Sn: Tensor) -> None:
        if pack.is_single:  # summed already
            self.terms[pack.runs[0].group].append(terms_Sn)
            return
        for run, terms in zip(pack.runs, pack.by_run(terms_Sn), strict=True):
            self.terms[run.group].append(terms.unflatten(-1, (len(run.tensors), run.size)).sum(-1))

    def add_grams(self, pack: _Pack, matrix_n: Tensor) -> None:
        for run, cut, matrices in _matrices(pack, matrix_n):
            self.grams[run.group].append(cut.gram(matrices))

    def total_terms(self) -> Tensor:
        """Return the sums ``[*, S, N]``, in the order of the layout."""
        totals = [parts[0] if len(parts) == 1 else torch.cat(parts, -1).sum(-1, keepdim=True) for parts in self.terms]
        return totals[0] if len(totals) == 1 else torch.cat(totals, -1)

    def total_grams(self) -> dict[int, Tensor]:
        """Return the Gram matrices ``[*, tensors, k, S, S]`` of the groups of matrices."""
        totals = {}
        for index, parts in enumerate(self.grams):
            if len(parts) == 1:
                totals[index] = parts[0]
            elif parts:
                cut = self.layout.groups[index].cut
                assert cut is not None
                totals[index] = torch.stack(parts).sum(0) if cut.is_tall else torch.cat(parts, self.dim + 1)
        return totals


def _matrices(pack: _Pack, matrix_n: Tensor) -> Iterable[tuple[_Run, Strips, Tensor]]:
    """Return the runs of a pack of matrices, and their coordinates as ``[*, tensors, outputs, inputs]``."""
    for run, coordinates in zip(pack.runs, pack.by_run(matrix_n), strict=True):
        if run.cut is not None and run.size:
            shape = (*coordinates.shape[:-1], len(run.tensors), run.size // run.inputs, run.inputs)
            yield run, run.cut, coordinates.reshape(shape)


def _couple(
    rule: UpdateRule, phases: Phases, weights: Weights, sums: _Sums, layout: _Layout, plan: Plan, dim: int
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the factors ``[*, tensors, k, S, S]`` of each group of matrices, and the sums of all ``[*, N, S]``."""
    terms_SN, grams = sums.total_terms(), sums.total_grams()
    if plan.reduce is not None:
        terms_SN, grams = _reduce(plan.reduce, terms_SN, grams, layout)
    if not rule.max_strip:
        return {}, _reorder(terms_SN, layout.places).mT
    nothing = terms_SN.new_zeros(*terms_SN.shape[:dim], 0, rule.max_strip, rule.max_strip)
    flat = [gram.flatten(dim, dim + 1) for gram in grams.values()]
    factors_Kss, terms = phases.couple(weights, torch.cat(flat or [nothing], dim))
    terms_TK = torch.stack(terms, dim)
    numbers = [gram.shape[dim] for gram in flat]
    terms_of = dict(zip(grams, terms_TK.split(numbers, -1), strict=True)) if grams else {}
    more = []
    for index, (tensors, _) in enumerate(layout.groups):
        if index in terms_of:
            more.append(terms_of[index].unflatten(-1, (len(tensors), -1)).sum(-1))
        else:  # zero, for vectors
            more.append(terms_TK.new_zeros(*terms_TK.shape[:-1], len(tensors)))
    summaries_SN = torch.cat([terms_SN, torch.cat(more, -1)], -2)
    factors = factors_Kss.split(numbers, dim) if grams else ()
    shaped = [
        factor.unflatten(dim, gram.shape[dim : dim + 2]) for factor, gram in zip(factors, grams.values(), strict=True)
    ]
    return dict(zip(grams, shaped, strict=True)), _reorder(summaries_SN, layout.places).mT


def _reduce(
    reduce: Reduce, terms_SN: Tensor, grams: dict[int, Tensor], layout: _Layout
) -> tuple[Tensor, dict[int, Tensor]]:
    """Sum over shards; a shard puts the Gram matrices of its strips in their places among those of the tensor."""
    rows = list(_reorder(terms_SN, layout.places).unbind(-1))
    runs = {run.group: run for pack in layout.packs for run in reversed(pack.runs)}
    for index, (tensors, cut) in enumerate(layout.groups):
        for position, tensor in enumerate(tensors if cut is not None else ()):
            assert cut is not None
            placed = terms_SN.new_zeros(cut.number, cut.padded, cut.padded)
            if index in grams:
                first, gram = runs[index].first_strip, grams[index][position]
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


def _multiply(pack: _Pack, factors: dict[int, Tensor], matrix_n: Tensor, dim: int) -> Tensor:
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


def _stack_memory(rule: UpdateRule, states: Sequence[State], steps_N: Tensor, dim: int) -> Tensor:
    """Return ``[*, N, M]``."""
    columns = []
    for key in rule.memory:
        column = torch.stack([state[key] for state in states], dim)
        columns.append(column if column.dim() == dim + 2 else column.unsqueeze(-1))
    return torch.cat(columns, -1) if columns else steps_N.unsqueeze(-1)[..., :0]


def _unstack_memory(
    keys: Sequence[str], like: State, steps_N: Tensor, memory_NM: Tensor, dim: int
) -> dict[str, tuple[Tensor, ...]]:
    """Undo :func:`_stack_memory`; return what there is once per tensor, for each, by key."""
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
