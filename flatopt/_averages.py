"""Averages of the parameters, on which a run of known length ends, and the exchange of parameters for them.

The average is part of the state, under ``AVERAGE``.  While it stands in the place of a parameter, the parameter itself
is kept beside it, under ``ITERATE``.  All is local: a shard has the average of the shard.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import _dtensor as dtensor
from ._abstract import is_abstract
from ._groups import name_of
from ._slots import is_of_one_rank, local_values
from ._state import AVERAGE, ITERATE, SHOWS_AVERAGES, check_average_shapes, copy_of
from ._torch import disable_dynamo, foreach_lerp_
from ._warn import warn
from .rules import PolynomialAverage

_showing: weakref.WeakSet[Averaging] = weakref.WeakSet()
"""Optimizers that have put averages in the place of parameters."""
_lock = threading.Lock()
"""Held while ``_showing`` is read or changed: models may be trained in threads."""


class Averaging(Optimizer):
    """An optimizer whose parameters can be exchanged for their averages."""

    @disable_dynamo
    @torch.no_grad()
    def eval(self) -> None:
        """Put the averages of the parameters in their place, to evaluate them, or to save the model.

        A run of known length ends on them by itself.  Without effect where there are none: with rules other than the
        default one, or before the first step.  The Trainer of transformers calls it before it evaluates.  Statistics of
        BatchNorm are still those of the parameters before: a few batches in training mode bring them up to date
        (:func:`torch.optim.swa_utils.update_bn`).

        Raises:
            RuntimeError: if a parameter holds the average of another optimizer.
            ValueError: if a parameter has another shape than its average.

        Example:
            >>> import torch, flatopt
            >>> param = torch.nn.Parameter(torch.ones(3))
            >>> opt = flatopt.FlatOpt([param])
            >>> for _ in range(2):
            ...     param.grad = torch.ones(3)
            ...     opt.step()
            >>> last = param.detach().clone()
            >>> opt.eval()
            >>> bool((last < param).all() and (param < 1).all())
            True
            >>> opt.train()
            >>> torch.equal(param, last)
            True
        """
        exchanged = [(p, s) for p, s in self._checked_states(self.param_groups) if AVERAGE in s and ITERATE not in s]
        self._refuse_averages_of_others([param for param, _ in exchanged])
        for param, state in exchanged:  # all before any moves: parameters may share their storage
            state[ITERATE] = copy_of(param)
        for param, state in exchanged:
            _move(local_values(param), dtensor.local_view(state[AVERAGE]), 1.0)
        _forget_copies([param for param, _ in exchanged])
        if exchanged:
            with _lock:
                _showing.add(self)
        for group in self.param_groups:
            group[SHOWS_AVERAGES] |= int(any(ITERATE in state for _, state in self._checked_states([group])))

    @disable_dynamo
    @torch.no_grad()
    def train(self) -> None:
        """Put the parameters themselves back, to go on after :meth:`eval`; without effect otherwise.

        Warns of one that does not hold its average any more, as where other weights were loaded: those are lost.

        Raises:
            ValueError: if a parameter has another shape than what is to be put back.
        """
        exchanged = [(p, s) for p, s in self._checked_states(self.param_groups) if ITERATE in s]
        changed = [param for param, state in exchanged if AVERAGE in state and not _holds(param, state[AVERAGE])]
        if changed:
            warn(
                f"{name_of(changed[0], self.param_groups)} has changed since eval(): train() puts back what it was "
                "before, and what was loaded or trained since is lost"
            )
        for param, state in exchanged:
            local_values(param).copy_(dtensor.local_view(state[ITERATE]))
            del state[ITERATE]
        _forget_copies([param for param, _ in exchanged])
        self._show_no_more()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as any optimizer of torch."""
        packed = super().state_dict()
        # The exchange adds keys and takes them away: not in a state that somebody holds.
        return {**packed, "state": {key: copy(state) for key, state in packed["state"].items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if any(group.get(SHOWS_AVERAGES) for group in self.param_groups):  # a copy, or a loaded state
            with _lock:
                _showing.add(self)

    def _checked_states(self, groups: Sequence[dict[str, Any]]) -> list[tuple[Tensor, MutableMapping[str, Any]]]:
        """Return the parameters that have a state, with it; raise ``ValueError`` if it is of another shape."""
        params = [param for group in groups for param in group["params"] if param in self.state]
        for param in params:
            check_average_shapes(self.state[param], param, self.param_groups)
        return [(param, self.state[param]) for param in params]

    def _others(self) -> list[Averaging]:
        """Return the other optimizers that have put averages in the place of parameters."""
        with _lock:
            return [other for other in _showing if other is not self]

    def _refuse_averages_of_others(self, params: Sequence[Tensor]) -> None:
        """Raise ``RuntimeError`` if a parameter holds the average that another optimizer keeps of it."""
        for other in self._others():
            for param in params:
                if ITERATE in other.state.get(param, {}):
                    raise RuntimeError(
                        f"{name_of(param, self.param_groups)} holds the average that another optimizer keeps of it: "
                        "call train() of that one first, or give the parameter to one optimizer only"
                    )

    def _take_from_others(self, params: Sequence[Tensor]) -> None:
        """Go on from averages that other optimizers show: those do not put anything in their place any more."""
        for other in self._others():
            for param in params:
                other.state.get(param, {}).pop(ITERATE, None)
            if not any(ITERATE in state for state in other.state.values()):
                other._show_no_more()

    def _show_no_more(self) -> None:
        """Note that no average of this optimizer stands in the place of a parameter."""
        with _lock:
            _showing.discard(self)
        for group in self.param_groups:
            group[SHOWS_AVERAGES] = 0


def check_no_average(groups: Sequence[dict[str, Any]]) -> None:
    """Raise ``RuntimeError`` if averages stand in the place of parameters."""
    if any(group[SHOWS_AVERAGES] for group in groups):
        raise RuntimeError("the parameters hold averages: call optimizer.train() before the next step")


def check_iterates(state_dict: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a state does not have, of what the averages stood for, just what its groups say."""
    for group in state_dict["param_groups"]:
        states = [state_dict["state"].get(param_id) or {} for param_id in group["params"]]
        if not group.get(SHOWS_AVERAGES) and any(ITERATE in state for state in states):
            raise ValueError("this state was changed by optimizer.eval() after it was taken: take it again")
        if group.get(SHOWS_AVERAGES) and any(AVERAGE in state and ITERATE not in state for state in states):
            raise ValueError(
                "this state was saved while the parameters held their averages, by something that did not save the "
                "parameters to go on from: save distributed checkpoints after optimizer.train(); to read this one, "
                "call get_optimizer_state_dict(model, optimizer) and optimizer.eval() before it is loaded"
            )


def start_average(param: Tensor, state: MutableMapping[str, Any]) -> None:
    """Begin an average before the first step: distributed checkpoints load what a fresh state has."""
    state[AVERAGE] = copy_of(param)


def advance_averages(
    states: Mapping[Tensor, MutableMapping[str, Any]],
    clocks: Mapping[Tensor, tuple[float, float, float]],
    rule: PolynomialAverage,
) -> None:
    """Take the parameters after a step into their averages, also those that took no step; land at the end of a run.

    Args:
        states: by parameter.
        clocks: of those that took one: how many they have taken, number of the step, length of the run.
        rule: how to average.
    """
    # Replicas are alike on every rank, so what is of one rank does not count for them.
    of_replicas = max((clock[0] for param, clock in clocks.items() if not is_of_one_rank(param)), default=0.0)
    of_all = max(taken for taken, *_ in clocks.values())
    due: dict[tuple[float, torch.device], list[tuple[Tensor, Tensor]]] = {}
    landing: list[tuple[Tensor, Tensor, float]] = []
    for param, state in states.items():
        if AVERAGE not in state:  # of a state from elsewhere
            start_average(param, state)
        latest = of_all if is_of_one_rank(param) else of_replicas
        taken, step, num_steps = clocks.get(param, (latest, 0.0, math.inf))
        stride = rule.stride(taken)
        share = rule.landing_share(step, num_steps)
        is_due = taken > 0 and taken % stride == 0
        if not (is_due or share):
            continue
        average, values = dtensor.local_view(state[AVERAGE]), local_values(param)
        if average.shape != values.shape:  # an error once it has a gradient
            continue
        if is_due and param in clocks and values.dtype == average.dtype:
            due.setdefault((rule.weight(taken / stride), values.device), []).append((average, values))
        elif is_due:
            own = taken if param in clocks else state["step"].clamp(min=stride)
            average.lerp_(values.to(average.dtype), rule.weight(own / stride))
        if share:
            landing.append((values, average, share))
    for (weight, _), pairs in due.items():
        averages, targets = zip(*pairs, strict=True)
        foreach_lerp_(averages, targets, weight)
    for values, average, share in landing:
        _move(values, average, share)


def _holds(param: Tensor, average: Tensor) -> bool:
    """Return whether a parameter is what :func:`_move` makes of it at last."""
    values = local_values(param)
    if is_abstract(values):
        return True
    average = dtensor.local_view(average).to(values)  # a state may wait elsewhere
    return bool(((values == average) | ~torch.isfinite(average)).all())


def _forget_copies(params: Sequence[Tensor]) -> None:
    """Let nothing compute with what parameters were before: with what autocast cast, or FSDP2 gathered."""
    torch.clear_autocast_cache()
    dtensor.forget_gathered(params)


def _move(values: Tensor, average: Tensor, share: float) -> None:
    """Move parameters a part of the way to their average, but for what is not finite."""
    moved = average if share == 1 else values.to(average.dtype).lerp(average, share)
    values.copy_(torch.where(torch.isfinite(moved), moved, values))
