r"""L2O-DM: one small recurrent network, applied to every coordinate by itself.

.. math::
    x_t = \big( \max(\ln(|g_t| + \epsilon) / 5,\, -1),\ \mathrm{clip}(e^5 g_t, -1, 1) \big) \qquad
    (h_t, s_t) = \mathrm{LSTM}_2(x_t, s_{t-1}) \qquad
    \Delta_t = 0.01\, (w^\top h_t + b)

with two layers of 20, no bound on the step and no notion of a learning rate.

Reference: Andrychowicz et al., *Learning to learn by gradient descent by gradient descent*, 2016,
https://arxiv.org/abs/1606.04474
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._features import log_sign
from ._networks import init_lstm, init_lstm_state, linear, lstm_state_keys, stacked_lstm, truncated_normal
from ._rule import State, StepContext, TensorFacts, UpdateRule, Weights

NUM_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class L2ODM(UpdateRule):
    """A coordinate-wise LSTM that turns gradients into steps.

    Memory: 80 floats of state per coordinate, 40 times Adam's; half with ``FlatOpt(..., state_dtype=torch.bfloat16)``.

    A coordinate takes part from its first gradient that is not zero, with a zero state; in the reference the network
    moves coordinates that have no gradient, too.

    Args:
        scale: multiplies the output of the network.
        hidden: width of both layers.

    Example:
        >>> rule = L2ODM()
        >>> sum(weight.numel() for weight in rule.init_weights().values())
        5141
    """

    name: ClassVar[str] = "l2o-dm"
    compressible_state: ClassVar[frozenset[str]] = lstm_state_keys(NUM_LAYERS)

    scale: float = 0.01
    hidden: int = 20

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Return random weights; before they are learned the steps have no sensible direction."""
        return {
            **init_lstm("lstm_0", 2, self.hidden, generator),
            **init_lstm("lstm_1", self.hidden, self.hidden, generator),
            "readout.weight": truncated_normal(1, self.hidden, std=self.hidden**-0.5, generator=generator),
            "readout.bias": torch.zeros(1),
        }

    def init_state(self, weights: Weights, param: Tensor, generator: torch.Generator | None = None) -> State:
        """Return zero states of both layers."""
        step = torch.zeros((), dtype=param.dtype, device=param.device)
        return {"step": step} | init_lstm_state(param, NUM_LAYERS, self.hidden)

    def propose(
        self,
        weights: Weights,
        state: State,
        grad: Tensor,
        param: Tensor,
        control: Tensor,
        facts: TensorFacts,
        context: StepContext,
    ) -> tuple[State, Tensor]:
        """Advance the network and return its output."""
        new, out_Hn = stacked_lstm(weights, state, log_sign(grad), NUM_LAYERS)
        started = (grad != 0) | (state["cell_0"] != 0).any(-1)
        new = {key: torch.where(started.unsqueeze(-1), value, state[key]) for key, value in new.items()}
        return new, self.scale * linear(weights, "readout", out_Hn)[0] * started

    def step_size(self, weights: Weights, control_NC: Tensor, context: StepContext) -> Tensor:
        """Return ``scale``."""
        return control_NC.new_full((control_NC.shape[0],), self.scale)
