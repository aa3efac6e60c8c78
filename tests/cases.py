"""Cases as data: rules x optimizees.  A new rule is covered by one row in ``RULE_CASES``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flatopt.rules import (
    L2ODM,
    RULES,
    Adam,
    L2OScale,
    OrthogonalizedMomentum,
    RNNProp,
    State,
    StepContext,
    TensorFacts,
    TensorShape,
    UpdateRule,
    Weights,
)


@dataclass(frozen=True, kw_only=True)
class ToyMixer(UpdateRule):
    """A small learned rule that uses every path of the driver.

    Per coordinate: two momenta (an extra dimension) and a second moment; per tensor: step and a memory of two numbers;
    shared by all tensors: one number; summaries, controls, and a start that is learned.
    """

    name: ClassVar[str] = "toy-mixer"
    memory: ClassVar[tuple[str, ...]] = ("memory",)
    scale: float = 0.01

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        return {
            "start": torch.zeros(2),
            "head": 0.1 * torch.randn(5, 2, generator=generator),
            "blend": 0.3 * torch.randn(2, generator=generator),
        }

    def init_state(self, weights: Weights, param: Tensor, generator: torch.Generator | None = None) -> State:
        return {
            "step": param.new_zeros(()),
            "memory": param.new_zeros(2) + len(param.shape),
            "exp_avg": torch.zeros_like(param).unsqueeze(-1) + weights["start"],
            "exp_avg_sq": torch.zeros_like(param),
        }

    def init_shared(self, weights: Weights) -> State:
        return {"log_scale": torch.zeros_like(weights["blend"][0])}

    def observe(
        self, weights: Weights, state: State, grad: Tensor, param: Tensor, facts: TensorFacts, context: StepContext
    ) -> tuple[State, list[Tensor]]:
        decays = grad.new_tensor([0.9, 0.98])
        new = {
            "exp_avg": decays * state["exp_avg"] + (1 - decays) * grad.unsqueeze(-1),
            "exp_avg_sq": 0.95 * state["exp_avg_sq"] + 0.05 * grad.square(),
        }
        return new, [torch.ones_like(grad), torch.stack([new["exp_avg_sq"], param.square()])]

    def mix(
        self,
        weights: Weights,
        summaries_NS: Tensor,
        memory_NM: Tensor,
        shared: State,
        context: StepContext,
        *,
        shapes: Sequence[TensorShape],
    ) -> tuple[Tensor, Tensor, State]:
        count, squares, params = summaries_NS.unbind(1)
        count = count.clamp(min=1)
        features = torch.stack([(squares / count + 1e-30).log() / 40, (params / count + 1e-8).log() / 10], 1).clamp(
            -2, 2
        )
        memory_NM = torch.lerp(memory_NM, features, 0.5)
        shared = {"log_scale": torch.lerp(shared["log_scale"], features[:, 0].mean(), 0.5)}
        fraction = torch.where(torch.isinf(context.num_steps), 0.0, context.step / context.num_steps)
        extra = torch.stack([shared["log_scale"], fraction, 1 / context.step]).expand(len(count), 3)
        return torch.tanh(torch.cat([memory_NM, extra], 1) @ weights["head"]), memory_NM, shared

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
        directions = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-20).unsqueeze(-1)
        blend = torch.softmax(weights["blend"].unsqueeze(-1) + control, 0).mT
        step_size = self.scale * control[0].exp()
        moved = state["exp_avg_sq"] > 0  # the momenta may start from learned values
        return {}, -step_size * moved * (directions * blend).sum(-1).clamp(-5, 5)

    def step_size(self, weights: Weights, control_NC: Tensor, context: StepContext) -> Tensor:
        return self.scale * control_NC[:, 0].exp()


class RuleCase(NamedTuple):
    """A rule, and what is promised of it."""

    rule: UpdateRule
    max_step: float = float("inf")
    """Bound on the absolute value of every coordinate of every step, for any gradient."""
    descends_untrained: bool = True
    """Whether random weights already go downhill: those of a network without a hand-made core do not."""


# Shipped rules are added by name, with their defaults; a row here only says what differs.
_ROWS: dict[str, RuleCase] = {
    "adam": RuleCase(Adam(lr=0.02), max_step=0.5),
    "adam-other": RuleCase(Adam(lr=0.05, betas=(0.8, 0.95), eps=1e-10), max_step=0.5),
    # 0.034 / sqrt(8) at the peak times 5, the controller's factors up to exp(2), and room for decay.
    "orthogonalized-momentum": RuleCase(OrthogonalizedMomentum(), max_step=0.012 * 5 * 7.4 * 3),
    "orthogonalized-momentum, strips of 3": RuleCase(
        OrthogonalizedMomentum(strip_size=3), max_step=0.012 * 5 * 7.4 * 3
    ),
    "orthogonalized-momentum, none": RuleCase(OrthogonalizedMomentum(strip_size=0), max_step=0.012 * 5 * 7.4 * 3),
    # 0.01 (sum |w| + |b|) with |h| < 1: far below this for weights of a few tenths.
    "l2o-dm": RuleCase(L2ODM(), max_step=0.01 * 20, descends_untrained=False),
    "rnnprop": RuleCase(RNNProp(), max_step=0.01, descends_untrained=False),
    "l2o-scale": RuleCase(L2OScale()),
    "l2o-scale-last": RuleCase(L2OScale(global_pool="last", min_lr=1e-3, max_lr=1e-3)),
    "toy-mixer": RuleCase(ToyMixer(), max_step=0.01 * 5 * 2.72),
}

RULE_CASES: dict[str, RuleCase] = {name: RuleCase(kind()) for name, kind in RULES.items()} | _ROWS


class Optimizee(NamedTuple):
    """A small problem: starting point and a smooth loss of it."""

    init: Callable[[torch.Generator], list[Tensor]]
    loss: Callable[[list[Tensor]], Tensor]


def _randn(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], list[Tensor]]:
    return lambda generator: [torch.randn(shape, generator=generator) for shape in shapes]


def _network_loss(params: list[Tensor]) -> Tensor:
    kernel, weight, bias, gain = params
    x = torch.linspace(-1, 1, 2 * 36, dtype=weight.dtype, device=weight.device).reshape(2, 1, 6, 6)
    hidden = torch.tanh(torch.nn.functional.conv2d(x, kernel).flatten(1))
    return (gain * hidden @ weight.mT + bias - 1).square().mean()


OPTIMIZEES: dict[str, Optimizee] = {
    "quadratic": Optimizee(_randn((3, 4), (5,)), lambda params: params[0].square().sum() + params[1].pow(2).mean() * 3),
    "scalars and empty": Optimizee(_randn((), (0,), (2, 0), (1,)), lambda params: sum(p.pow(2).sum() for p in params)),
    "network": Optimizee(_randn((2, 1, 3, 3), (3, 32), (3,), ()), _network_loss),
}
