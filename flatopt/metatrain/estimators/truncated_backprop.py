"""Truncated backpropagation through the unrolled inner training.

With inner states ``s_{k+1} = U(w, s_k, e_k)`` and the mean meta-loss ``L(w, s_k, e_k)`` of the ``k``-th truncation,
``e_k`` its batches and noise, the estimate is the exact gradient of one truncation from where the last one ended:

    g_k = d/dw L(w, stop(s_k), e_k)

It is biased: what the weights did to ``s_k`` is not seen.  Its variance is small and its cost that of backpropagation
through ``truncation_length`` inner steps, with their memory.

Reference: Andrychowicz et al., *Learning to learn by gradient descent by gradient descent*, 2016,
https://arxiv.org/abs/1606.04474
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..._torch import pytree
from ...rules import Weights
from ..inner import Inner, InnerState
from ._estimator import EstimatorState, GradientEstimator, MetaGradient


@dataclass(frozen=True, kw_only=True)
class TruncatedBackprop(GradientEstimator):
    """Exact gradient of each truncation; the inner state is carried on, detached."""

    inner: Inner

    def init(self, weights: Weights, generator: torch.Generator, num_steps: int | None = None) -> EstimatorState:
        """Return fresh inner problems."""
        return _detach(self.inner.reset(weights, generator, num_steps))

    def estimate(
        self, weights: Weights, state: EstimatorState, generator: torch.Generator, num_steps: int | None = None
    ) -> tuple[MetaGradient, EstimatorState]:
        """Return the gradient of one truncation and the detached state after it."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            state = self.inner.refresh(leaves, state, generator, num_steps)
            loss, state, metrics = self.inner.unroll(leaves, state, self.inner.draw(state, generator))
            gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        gradient = dict(zip(leaves, gradients, strict=True))
        return MetaGradient(gradient, loss.detach(), metrics), _detach(state)


def _detach(state: InnerState) -> InnerState:
    """Cut the graph, and the storage that a state might share with the weights."""
    return pytree.tree_map(lambda value: value.detach().clone(), state)
