"""The optimizers of the weights themselves, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import MetaTrainConfig


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


def build_meta_optimizer(
    name: str, weights: dict[str, Tensor], state: dict[str, dict[str, Tensor]] | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer that ``meta_optimizer`` of a configuration names; its learning rate is set at each step.

    Args:
        name: ``adam`` or ``rmsprop-tf``.
        weights: what is optimized.
        state: what it goes on from, by weight and key.
    """
    optimizer = {"adam": torch.optim.Adam, "rmsprop-tf": TensorFlowRMSProp}[name](list(weights.values()))
    if state:
        states = {index: state[key] for index, key in enumerate(weights) if state.get(key)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the state of an optimizer by weight and key; the tensors are its own."""
    return {name: dict(optimizer.state.get(weight, {})) for name, weight in weights.items()}


def learning_rate(config: MetaTrainConfig, update: int) -> float:
    """Return the meta-learning rate of update ``update`` (from 0): linear warm-up, then a cosine.

    Example:
        >>> from flatopt.metatrain.config import TaskConfig
        >>> config = MetaTrainConfig(
        ...     recipe="", rule="adam", tasks=(TaskConfig(name="mlp"),), num_updates=6, warmup_updates=2, meta_lr=1.0
        ... )
        >>> [round(learning_rate(config, update), 3) for update in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if update < config.warmup_updates:
        return config.meta_lr * (update + 1) / config.warmup_updates
    length = config.schedule_updates or config.num_updates
    fraction = min(1.0, (update - config.warmup_updates) / max(1, length - config.warmup_updates))
    final = config.meta_lr_final_fraction
    return config.meta_lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fraction)))
