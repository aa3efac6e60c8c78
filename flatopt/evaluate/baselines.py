"""Baselines that torch does not have in this form: SAM, and Muon with AdamW for what is no matrix.

Reference for SAM: Foret, Kleiner, Mobahi and Neyshabur, *Sharpness-Aware Minimization for Efficiently Improving
Generalization*, 2021, https://arxiv.org/abs/2010.01412
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer


class SAM(SGD):
    """Sharpness-aware minimization on top of SGD with momentum; two gradients per step.

        e = rho g(w) / norm(g(w))      m <- momentum m + g(w + e)      w <- w - lr m

    Args:
        params: parameters, as for any optimizer.
        lr: learning rate.
        rho: radius of the ascent step, in the Euclidean norm over all parameters.
        momentum: momentum of the descent step.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *, rho: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__(params, lr, momentum=momentum)
        self.rho = rho

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Take one step; ``closure`` clears the gradients, computes the loss and its gradient, and is called twice."""
        with torch.enable_grad():
            loss = closure()
        moved = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        originals = [param.clone() for param in moved]
        norm = torch.stack([param.grad.norm() for param in moved]).norm()
        for param in moved:
            param.add_(param.grad * (self.rho / (norm + 1e-12)))
        with torch.enable_grad():
            closure()
        for param, original in zip(moved, originals, strict=True):
            param.copy_(original)
        super().step()
        return loss


class MuonWithAdamW(Optimizer):
    """Muon for the parameters with two axes, AdamW for all others, at one learning rate.

    Muon's steps have the RMS of Adam's (``adjust_lr_fn="match_rms_adamw"``), hence one learning rate for both.

    Args:
        params: parameters, as for any optimizer.
        lr: learning rate.
        weight_decay: decoupled weight decay of both.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        every = [param for group in self.param_groups for param in group["params"]]
        matrices, others = ([p for p in every if (p.dim() == 2) is two] for two in (True, False))
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(AdamW(others, lr, weight_decay=weight_decay))
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # what schedules write to

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Take one step of both; ``closure`` computes loss and gradients, and is called once."""
        with torch.enable_grad():
            loss = closure()
        for part in self.parts:
            part.step()
        return loss
