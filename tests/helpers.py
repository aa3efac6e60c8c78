"""What several test modules need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cases import OPTIMIZEES, RULE_CASES, Optimizee
from torch import Tensor

from flatopt import FlatOpt, LearnedRule
from flatopt._state import state_generator
from flatopt.rules import State, StepContext, UpdateRule, Weights, apply_rule


def learned(name_or_rule: str | UpdateRule, seed: int = 0, perturbation: float = 0.0) -> LearnedRule:
    """Return a rule with random weights; many start as a hand-made core, which a perturbation leaves."""
    rule = RULE_CASES[name_or_rule].rule if isinstance(name_or_rule, str) else name_or_rule
    generator = torch.Generator().manual_seed(seed)
    weights = rule.init_weights(generator)
    noise = {key: torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    return LearnedRule(rule, {key: value + perturbation * noise[key] for key, value in weights.items()})


def make_params(optimizee: str | Optimizee, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the starting point of a problem as leaves."""
    problem = OPTIMIZEES[optimizee] if isinstance(optimizee, str) else optimizee
    params = problem.init(torch.Generator().manual_seed(seed))
    return [torch.nn.Parameter(param.to(dtype)) for param in params]


def train(opt: torch.optim.Optimizer, params: Sequence[Tensor], optimizee: str, num_steps: int) -> list[float]:
    """Take steps on a problem; return the losses before each."""
    losses = []
    for _ in range(num_steps):
        opt.zero_grad()
        loss = OPTIMIZEES[optimizee].loss(list(params))
        loss.backward()
        losses.append(float(loss.detach()))
        opt.step()
    return losses


def set_grads(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """Give every parameter a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        real = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
        param.grad = real.to(param.dtype).to(param.device)


def step_with(opt: FlatOpt, params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """Take one step with random gradients."""
    set_grads(params, seed, scale)
    opt.step()


def context_at(step: int, num_steps: float = float("inf"), dtype: torch.dtype = torch.float32) -> StepContext:
    """Return where in the run a step is."""
    return StepContext(torch.tensor(float(step), dtype=dtype), torch.tensor(num_steps, dtype=dtype))


def unroll(
    rule: UpdateRule,
    weights: Weights,
    params: Sequence[Tensor],
    grads_of_step: Sequence[Sequence[Tensor]],
    num_steps: float = float("inf"),
) -> tuple[list[Tensor], list[State], State]:
    """Apply a rule purely, step after step, with given gradients, from the initial state of ``FlatOpt``."""
    params = [param.detach() for param in params]
    states = [rule.fresh_state(weights, param, state_generator(0, index)) for index, param in enumerate(params)]
    shared = rule.init_shared(weights)
    for step, grads in enumerate(grads_of_step, 1):
        deltas, states, shared = apply_rule(
            rule, weights, params, grads, states, shared, context_at(step, num_steps, params[0].dtype)
        )
        params = [param + delta for param, delta in zip(params, deltas, strict=True)]
    return list(params), states, shared


def assert_same_state(one: FlatOpt, other: FlatOpt) -> None:
    """Check that the states of two optimizers are bit for bit the same, and not the same storage."""
    states, others = one.state_dict()["state"], other.state_dict()["state"]
    assert states.keys() == others.keys()
    for index, state in states.items():
        assert state.keys() == others[index].keys()
        for key, value in state.items():
            again = others[index][key]
            assert value.dtype == again.dtype, key
            assert torch.equal(value, again), (index, key)
            assert value.numel() == 0 or value.data_ptr() != again.data_ptr(), key
