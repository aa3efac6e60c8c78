"""The phases of a rule as the driver calls them: what it may ask of them besides what the rule returns.

A phase on coordinates can be told to sum its terms and to write what is new over what is old, so that a compiler does
all of that in the pass that computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._rule import State, StepContext, TensorFacts, UpdateRule, Weights


class Coordinates(NamedTuple):
    """What a phase on coordinates works on, flat and in the dtype to compute in."""

    state: State
    """Accumulators, ``[n, ...]``."""
    grad: Tensor
    param: Tensor


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
    batch_dims: int = 0
    """1 if every tensor, weights included, has an axis of models in front."""


def plain_phases(rule: UpdateRule) -> Phases:
    """Return the phases for one model."""
    observe, propose = partial(observe_phase, rule), partial(propose_phase, rule)
    return Phases(rule.prepare, observe, rule.matrix, rule.couple, rule.mix, propose)


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
        batch_dims=1,
    )


def observe_phase(
    rule: UpdateRule,
    total: bool,
    in_place: bool,
    weights: Weights,
    part: Coordinates,
    facts: TensorFacts,
    context: StepContext,
) -> tuple[State, Tensor]:
    """Return what ``rule.observe`` does, its terms as one ``[S, n]``, summed to ``[S, 1]`` if ``total``.

    If ``in_place``, the new state is written over that of ``part``, and not returned.
    """
    new, terms = rule.observe(weights, *part, facts, context)
    rows: list[Tensor] = []
    for term in terms:
        # Each is summed by itself: a compiler does that in the pass that computes it, and never stores the terms.
        if term is None:
            rows.append(part.grad.new_zeros(()) if total else torch.zeros_like(part.grad))
        elif isinstance(term, Tensor):
            value = term.sum(-1) if total else term
            rows += [value] if term.dim() == 1 else value.unbind()
        else:
            rows.append(torch.dot(*term) if total else torch.mul(*term))
    stacked = torch.stack(rows) if rows else part.grad.new_zeros(0, *(() if total else part.grad.shape))
    return _overwrite(part.state, new) if in_place else new, stacked.unsqueeze(-1) if total else stacked


def propose_phase(
    rule: UpdateRule,
    factors_Xn: Tensor | None,
    weights: Weights,
    part: Coordinates,
    control_Cn: Tensor,
    facts: TensorFacts,
    context: StepContext,
) -> tuple[State, Tensor | None]:
    """Return what ``rule.propose`` does; given the factors of :class:`Update`, write it over state and parameter."""
    new, delta = rule.propose(weights, *part, control_Cn, facts, context)
    if factors_Xn is None:
        return new, delta
    kept = _overwrite(part.state, new)  # first: a rule may keep the parameter itself
    move_param(part.param, delta, factors_Xn)
    return kept, None


def _overwrite(state: State, new: State) -> State:
    for key, value in new.items():
        state[key].copy_(value)
    return {}


def move_param(param: Tensor, delta: Tensor, factors_Xn: Tensor) -> None:
    """Move a parameter by its step, in place."""
    lr, *kept = factors_Xn.unbind()
    if kept:
        param.copy_(torch.addcmul(param * kept[0], delta, lr))
    else:
        param.addcmul_(delta, lr)
