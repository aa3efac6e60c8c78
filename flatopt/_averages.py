"""Averages of the parameters, for runs whose length is not known, and the exchange of parameters for them.

The average is part of the state, under ``AVERAGE``.  While it stands in the place of a parameter, the parameter itself
is kept beside it, under ``ITERATE``.  All is local: a shard has the average of the shard.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import _dtensor as dtensor
from ._slots import Slot, real_view
from ._state import AVERAGE, ITERATE, copy_of
from .rules import average_weight


class Averaging(Optimizer):
    """An optimizer whose parameters can be exchanged for their averages."""

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averages of the parameters in their place, to evaluate them, or to save the model.

        Without effect where there are none: if the length of the run is known, with rules other than the flagship's,
        or before the first step.  Frameworks that know optimizers with such a method call it themselves (Trainer of
        transformers, accelerate).  Statistics of BatchNorm are still those of the parameters before: a few batches in
        training mode bring them up to date (:func:`torch.optim.swa_utils.update_bn`).

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
        for param, state in self._states():
            if AVERAGE in state and ITERATE not in state:
                state[ITERATE] = copy_of(param)
                average, local = dtensor.local_view(state[AVERAGE]), _local(param)
                local.copy_(torch.where(torch.isfinite(average), average, local))

    @torch.no_grad()
    def train(self) -> None:
        """Put the parameters themselves back, to go on after :meth:`eval`; without effect otherwise."""
        for param, state in self._states():
            if ITERATE in state:
                _local(param).copy_(dtensor.local_view(state.pop(ITERATE)))

    def _states(self) -> list[tuple[Tensor, MutableMapping[str, Any]]]:
        """Return the parameters that have a state, with it."""
        params = [param for group in self.param_groups for param in group["params"]]
        return [(param, self.state[param]) for param in params if param in self.state]


def start_average(param: Tensor, state: MutableMapping[str, Any]) -> None:
    """Begin an average before the first step: distributed checkpoints load what a fresh state has."""
    state[AVERAGE] = copy_of(param)


def advance_averages(slots: Sequence[Slot], states: Sequence[MutableMapping[str, Any]], power: float) -> None:
    """Take the parameters after a step into their averages.

    Args:
        slots: the parameters, with the steps that they had taken before.
        states: of each.
        power: power of the average, :attr:`flatopt.rules.UpdateRule.average_power`; 0 to drop the averages.
    """
    for slot, state in zip(slots, states, strict=True):
        if not power:
            state.pop(AVERAGE, None)
            continue
        if AVERAGE not in state:  # the length was known up to now
            start_average(slot.param, state)
        average = dtensor.local_view(state[AVERAGE])
        average.lerp_(_local(slot.param).to(average.dtype), average_weight(power, slot.step + 1))


def check_no_average(state: Mapping[str, Any]) -> None:
    """Raise ``RuntimeError`` if the average stands in the place of a parameter."""
    if ITERATE in state:
        raise RuntimeError("the parameters hold averages: call optimizer.train() before the next step")


def _local(param: Tensor) -> Tensor:
    return real_view(dtensor.local_view(param))
