r"""RNNProp: a recurrent network per coordinate that sees normalised gradients and gives bounded steps.

With bias-corrected moments :math:`\hat m_t, \hat v_t` of decay 0.95 and :math:`\epsilon = 10^{-8}`

.. math::
    \tilde m_t = \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} \qquad
    \tilde g_t = \frac{g_t}{\sqrt{\hat v_t} + \epsilon} \qquad
    u_t = \mathrm{ELU}(W (\tilde m_t, \tilde g_t) + c) \qquad
    (h_t, s_t) = \mathrm{LSTM}_2(u_t, s_{t-1}) \qquad
    \Delta_t = 0.01 \tanh(w^\top h_t + b)

Reference: Lv et al., *Learning Gradient Descent: Better Generalization and Longer Horizons*, 2017,
https://arxiv.org/abs/1703.03633
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._features import advance_moments, debias
from ._networks import init_lstm, init_lstm_state, linear, lstm_state_keys, stacked_lstm, truncated_normal
from ._rule import State, StepContext, TensorFacts, UpdateRule, Weights

NUM_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class RNNProp(UpdateRule):
    """A coordinate-wise LSTM on Adam's and RMSProp's directions.

    Memory: 82 floats of state per coordinate, 41 times Adam's; as 42 with ``FlatOpt(..., state_dtype=torch.bfloat16)``.

    A coordinate whose gradients were all exactly zero does not move; in the reference it may.

    Args:
        scale: largest step per coordinate.
        betas: decays of the first and the second moment.
        eps: keeps quotients finite.
        hidden: width of the projection and of both layers.

    Example:
        >>> rule = RNNProp()
        >>> sum(weight.numel() for weight in rule.init_weights().values())
        6641
    """

    name: ClassVar[str] = "rnnprop"
    compressible_state: ClassVar[frozenset[str]] = lstm_state_keys(NUM_LAYERS)

    scale: float = 0.01
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    hidden: int = 20

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Return random weights; before they are learned the steps have no sensible direction."""
        return {
            "projection.weight": truncated_normal(self.hidden, 2, std=2**-0.5, generator=generator),
            "projection.bias": torch.zeros(self.hidden),
            **init_lstm("lstm_0", self.hidden, self.hidden, generator),
            **init_lstm("lstm_1", self.hidden, self.hidden, generator),
            "readout.weight": truncated_normal(1, self.hidden, std=self.hidden**-0.5, generator=generator),
            "readout.bias": torch.zeros(1),
        }

    def init_state(self, weights: Weights, param: Tensor, generator: torch.Generator | None = None) -> State:
        """Return zero moments and zero states of both layers."""
        return {
            "step": torch.zeros((), dtype=param.dtype, device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
            **init_lstm_state(param, NUM_LAYERS, self.hidden),
        }

    def observe(
        self, weights: Weights, state: State, grad: Tensor, param: Tensor, facts: TensorFacts, context: StepContext
    ) -> tuple[State, list[Tensor]]:
        """Advance both moments; no sums are needed."""
        return advance_moments(state, grad, *self.betas), []

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
        """Advance the network and return its bounded output."""
        beta1, beta2 = self.betas
        m_hat = debias(state["exp_avg"], beta1, facts.step)
        scale = 1 / (debias(state["exp_avg_sq"], beta2, facts.step).sqrt() + self.eps)
        x_Fn = linear(weights, "projection", torch.stack([m_hat * scale, grad * scale]))
        new, out_Hn = stacked_lstm(weights, state, torch.nn.functional.elu(x_Fn), NUM_LAYERS)
        moved = state["exp_avg_sq"] > 0
        return new, self.scale * linear(weights, "readout", out_Hn)[0].tanh() * moved

    def step_size(self, weights: Weights, control_NC: Tensor, context: StepContext) -> Tensor:
        """Return ``scale``."""
        return control_NC.new_full((control_NC.shape[0],), self.scale)
