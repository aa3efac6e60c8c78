from __future__ import annotations

import math

import torch
from helpers import context_at, learned, unroll
from literal_lstm import NUM_STEPS, fresh_memory, grads_at, start, two_layers
from torch import Tensor

from flatopt.rules import Plan, RNNProp, apply_rule


def literal_run(weights: dict[str, Tensor], hidden: int) -> list[list[Tensor]]:
    """Return the parameters after every step, one coordinate after another."""
    params = start()
    memories = [[fresh_memory(hidden) for _ in range(param.numel())] for param in params]
    moments = [[(0.0, 0.0)] * param.numel() for param in params]
    rows, bias = weights["projection.weight"].tolist(), weights["projection.bias"].tolist()
    trajectory = []
    for step in range(1, NUM_STEPS + 1):
        for index, (param, grad) in enumerate(zip(params, grads_at(params, step), strict=True)):
            flat = param.view(-1)
            for k, g in enumerate(grad.reshape(-1).tolist()):
                m, v = moments[index][k]
                m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g * g
                moments[index][k] = m, v
                m_hat, v_hat = m / (1 - 0.95**step), v / (1 - 0.95**step)
                m_tilde, g_tilde = m_hat / (math.sqrt(v_hat) + 1e-8), g / (math.sqrt(v_hat) + 1e-8)
                z = [row[0] * m_tilde + row[1] * g_tilde + b for row, b in zip(rows, bias, strict=True)]
                x = [value if value > 0 else math.exp(value) - 1 for value in z]
                flat[k] += 0.01 * math.tanh(two_layers(weights, x, memories[index][k]))
        trajectory.append([param.clone() for param in params])
    return trajectory


def test_follows_the_specification_coordinate_by_coordinate() -> None:
    rule = RNNProp()
    weights = {key: value.double() for key, value in learned(rule, perturbation=0.3).weights.items()}
    params = start()
    states = [rule.init_state(weights, param) for param in params]
    for step, expected in enumerate(literal_run(weights, rule.hidden), 1):
        grads = grads_at(params, step)
        context = context_at(step, dtype=torch.float64)
        deltas, states, _ = apply_rule(rule, weights, params, grads, states, {}, context, Plan(chunk_size=5))
        params = [param + delta for param, delta in zip(params, deltas, strict=True)]
        torch.testing.assert_close(params, expected, rtol=1e-10, atol=1e-10)
    assert max(float((param - first).abs().max()) for param, first in zip(params, start(), strict=True)) > 0.1


def test_has_the_weights_and_the_state_of_the_paper() -> None:
    rule = RNNProp()
    weights = rule.init_weights(torch.Generator().manual_seed(0))
    assert sum(weight.numel() for weight in weights.values()) == 6641
    state = rule.init_state(weights, torch.zeros(2, 3))
    assert sum(value[0, 0].numel() for key, value in state.items() if key not in ("step", *rule.memory)) == 82


def test_scale_of_the_gradients_does_not_matter() -> None:
    weights = learned(RNNProp(), perturbation=0.3).weights
    params = [param.float() for param in start()]
    ends = []
    for scale in (1.0, 1000.0):
        grads = [[scale * grad for grad in grads_at(params, step)] for step in range(1, 6)]
        ends.append(unroll(RNNProp(eps=1e-20), weights, params, grads)[0])
    torch.testing.assert_close(ends[0], ends[1])
