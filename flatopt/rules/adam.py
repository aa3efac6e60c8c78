"""Adam as an update rule: baseline and oracle.

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
    delta = -lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Reference: Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2015, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._features import advance_moments, debias
from ._rule import State, StepContext, TensorFacts, UpdateRule, Weights


@dataclass(frozen=True, kw_only=True)
class Adam(UpdateRule):
    """Adam with constant learning rate and nothing learned; equals ``torch.optim.Adam`` without ``amsgrad``.

    Example:
        >>> Adam(lr=3e-4).init_weights()
        {}
    """

    name: ClassVar[str] = "adam"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Return no weights."""
        return {}

    def init_state(self, weights: Weights, param: Tensor, generator: torch.Generator | None = None) -> State:
        """Return zero moments."""
        return {
            "step": param.new_zeros(()),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
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
        """Return ``-lr * m_hat / (sqrt(v_hat) + eps)``."""
        beta1, beta2 = self.betas
        m_hat = debias(state["exp_avg"], beta1, facts.step)
        v_hat = debias(state["exp_avg_sq"], beta2, facts.step)
        return {}, -self.lr * m_hat / (v_hat.sqrt() + self.eps)

    def step_size(self, weights: Weights, control_NC: Tensor, context: StepContext) -> Tensor:
        """Return ``lr``."""
        return control_NC.new_full((control_NC.shape[0],), self.lr)
