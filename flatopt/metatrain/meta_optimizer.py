"""The optimizers of the weights themselves, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TensorFlowRMSProp(torch.optim.Optimizer):
    r"""RMSProp as TensorFlow 1 has it, which learned optimizers of its time were meta-trained with.

    .. math::
        s \leftarrow \rho s + (1 - \rho) g^2 \qquad w \leftarrow w - \eta \frac{g}{\sqrt{s + \epsilon}}

    :math:`s` begins at one, not at zero, so that the first steps are small, and :math:`\epsilon` is inside the root.

    Args:
        params: what to optimize.
        lr: learning rate, eta.
        decay: of the mean square, rho.
        eps: epsilon.

    References:
        Tieleman and Hinton, *Neural Networks for Machine Learning*, lecture 6.5, 2012

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> weight.grad = torch.ones(1)
        >>> TensorFlowRMSProp([weight], lr=0.1).step()
        >>> weight.data
        tensor([0.9000])
    """

    def __init__(self, params: Any, lr: float = 1e-3, decay: float = 0.9, eps: float = 1e-10):
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; ``closure`` is called first where it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                if not state:
                    state["square_avg"] = torch.ones_like(param)
                average: Tensor = state["square_avg"]
                average.lerp_(param.grad.square(), 1 - group["decay"])
                param.addcdiv_(param.grad, (average + group["eps"]).sqrt(), value=-group["lr"])
        return loss


def build_meta_optimizer(name: str, weights: list[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer that ``meta_optimizer`` of a configuration names; its learning rate is set at each step."""
    return {"adam": torch.optim.Adam, "rmsprop-tf": TensorFlowRMSProp}[name](weights)
