"""The optimizers that are compared: tuned baselines, and the learned one with nothing tuned.

Reference for SAM: Foret, Kleiner, Mobahi and Neyshabur, *Sharpness-Aware Minimization for Efficiently Improving
Generalization*, 2021, https://arxiv.org/abs/2010.01412
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from flatopt.optimizer import FlatOpt
from flatopt.pretrained import LearnedRule, load_pretrained, weights_sha256


class SAM(Optimizer):
    """Sharpness-aware minimization on top of SGD with momentum; two gradients per step.

        e = rho g(w) / norm(g(w))      m <- momentum m + g(w + e)      w <- w - lr m

    Args:
        params: parameters, as for any optimizer.
        lr: learning rate.
        rho: radius of the ascent step, in the Euclidean norm over all parameters.
        momentum: momentum of the descent step.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *, rho: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Take one step; ``closure`` clears the gradients, computes the loss and its gradient, and is called twice."""
        with torch.enable_grad():
            loss = closure()
        moved = [
            (group, param, param.grad)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        norm = torch.stack([grad.norm() for _, _, grad in moved]).norm()
        originals = [param.clone() for _, param, _ in moved]
        for group, param, grad in moved:
            param.add_(grad * (group["rho"] / (norm + 1e-12)))
        with torch.enable_grad():
            closure()
        for (group, param, _), original in zip(moved, originals, strict=True):
            state = self.state[param]
            state.setdefault("momentum_buffer", torch.zeros_like(param)).mul_(group["momentum"]).add_(param.grad)
            param.copy_(original).sub_(state["momentum_buffer"], alpha=group["lr"])
        return loss


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """An optimizer in a comparison.

    Args:
        name: name in tables.
        build: makes the optimizer of parameters, learning rate, length of the run and seed.
        lrs: learning rates to choose from, per task, on the ``meta`` split; one value when nothing is tuned.
        cosine: whether a cosine schedule takes the learning rate to zero over the run.
        identity: what else decides the result (the weights of a learned rule); keeps cached runs apart.
    """

    name: str
    build: Callable[[Iterable[Tensor], float, int, int], Optimizer]
    lrs: tuple[float, ...]
    cosine: bool
    identity: str = ""


_ADAM_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_SGD_LRS = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

BASELINES: tuple[Contestant, ...] = (
    Contestant(name="Adam", build=lambda params, lr, *_: Adam(params, lr), lrs=_ADAM_LRS, cosine=True),
    Contestant(
        name="AdamW", build=lambda params, lr, *_: AdamW(params, lr, weight_decay=0.01), lrs=_ADAM_LRS, cosine=True
    ),
    Contestant(
        name="SGD momentum", build=lambda params, lr, *_: SGD(params, lr, momentum=0.9), lrs=_SGD_LRS, cosine=True
    ),
    Contestant(name="SAM", build=lambda params, lr, *_: SAM(params, lr), lrs=_SGD_LRS, cosine=True),
)


def learned_contestants(pretrained: str) -> list[Contestant]:
    """Return FlatOpt with the length of the run known, and unknown, and the same with the rule not trained.

    An untrained rule with zero output layers is its hand-designed core: what the training of the weights is worth.

    Args:
        pretrained: shipped name, folder or Hub id, as for :class:`flatopt.FlatOpt`.
    """
    learned = load_pretrained(pretrained)
    untrained = LearnedRule(learned.rule, learned.rule.init_weights(torch.Generator().manual_seed(0)))
    return [
        contestant
        for name, rule in (("FlatOpt", learned), ("untrained core", untrained))
        for contestant in (
            learned_contestant(f"{name}, horizon known", rule, horizon_known=True),
            learned_contestant(f"{name}, horizon unknown", rule, horizon_known=False),
        )
    ]


def learned_contestant(name: str, learned: LearnedRule, *, horizon_known: bool) -> Contestant:
    """Return FlatOpt with some weights as a contestant."""
    return Contestant(
        name=name,
        build=lambda params, lr, num_steps, seed: FlatOpt(
            params, lr, pretrained=learned, num_steps=num_steps if horizon_known else None, seed=seed
        ),
        lrs=(1.0,),
        cosine=False,
        identity=f"{learned.rule!r} {weights_sha256(learned.weights)[:16]}",
    )
