"""The one driver that applies a rule to the tensors of a model.

It packs coordinates, calls the phases of :class:`UpdateRule`, and forms the sums between them.

Legend as in :mod:`flatopt.rules._rule`; ``*`` is an axis of models in front of everything, or nothing, and ``T`` are
the terms of ``couple``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._layout import Layout, lay_out, spread
from ._phases import Phases, plain_phases
from ._rule import State, StepContext, TensorFacts, TensorShape, UpdateRule, Weights
from ._stores import InPlace, Pure, RuleResult, Update, stack_memory
from ._sums import Reduce, Sums, couple_strips, multiply_strips


class Plan(NamedTuple):
    """How the driver works: where results go, how work is cut up, and which parts of the tensors are here."""

    update: Update | None = None
    """Work in place, and apply the steps so; ``None`` for a pure call."""
    chunk_size: int | None = None
    """Most coordinates handled at once, ``None`` for no bound; a strip is never cut."""
    pack_size: int = 0
    """Tensors of at most so many coordinates are handled side by side, which saves calls."""
    phases: Phases | None = None
    """How to call the rule; plainly by default."""
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
    firsts = tuple(plan.first_strips or ())
    layout = lay_out(pieces, tuple(shapes), firsts, rule.strip_rows, plan.chunk_size, plan.pack_size)
    store = (Pure if plan.update is None else InPlace)(rule, params, grads, states, shapes, dim)

    steps_N = torch.stack([state["step"] for state in states], dim) + 1
    memory_NM = stack_memory(rule, states, steps_N, dim)
    given_NG = phases.prepare(weights, steps_N, memory_NM, shared, context)
    facts = _facts(layout, steps_N, given_NG)
    sums = Sums(layout, dim)
    for pack, known in zip(layout.packs, facts, strict=True):
        part = store.read(pack)
        in_place = store.is_viewed and pack.is_single
        new, terms_Sn = phases.observe(pack.is_single, in_place, weights, part, known, context)
        store.write(pack, new)
        sums.add_terms(pack, terms_Sn)
        if pack.is_matrix:
            sums.add_grams(pack, phases.matrix(weights, part.state | new, part.grad, known))

    factors, summaries_NS = couple_strips(sums, rule, phases, weights, plan.reduce, plan.chunk_size)
    control_NC, memory_NM, shared = phases.mix(weights, summaries_NS, memory_NM, shared, context, shapes=shapes)
    num_controls = control_NC.shape[-1]
    if plan.update is not None:  # spread together
        control_NC = torch.cat([control_NC, plan.update.factors(rule.step_size(weights, control_NC, context))], -1)
    for pack, known, control_Cn in zip(layout.packs, facts, spread(layout, control_NC.mT), strict=True):
        part = store.read(pack)
        if rule.strip_rows is not None:
            matrix_n = phases.matrix(weights, part.state, part.grad, known) if pack.is_matrix else part.grad
            known = known._replace(coupled=multiply_strips(pack, factors, matrix_n, dim))
        of_rule, of_update = control_Cn.tensor_split([num_controls], -2)
        factors_Xn = of_update if store.is_viewed and pack.is_single else None
        new, delta = phases.propose(factors_Xn, weights, part, of_rule, known, context)
        store.write(pack, new)
        store.move(pack, part.param, delta, of_update)
    return store.result(steps_N, memory_NM, shared)


def _facts(layout: Layout, steps_N: Tensor, given_NG: Tensor) -> list[TensorFacts]:
    """Return what is known of the tensors before this step, for each pack."""
    known_XN = torch.cat([steps_N.unsqueeze(-2), given_NG.mT], -2)
    num_given, nothing = given_NG.shape[-1], steps_N[..., :0]
    return [
        TensorFacts(known_Xn.select(-2, 0), known_Xn.narrow(-2, 1, num_given), nothing)
        for known_Xn in spread(layout, known_XN)
    ]
