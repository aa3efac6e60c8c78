from __future__ import annotations

import math

import torch
from helpers import context_at, learned
from literal_lstm import NUM_STEPS, fresh_memory, grads_at, start, two_layers
from torch import Tensor

from flatopt.rules import L2ODM, Plan, apply_rule


def literal_run(weights: dict[str, Tensor], hidden: int) -> list[list[Tensor]]:
    """Return the parameters after every step, one coordinate after another."""
    params = start()
    memories = [[fresh_memory(hidden) for _ in range(param.numel())] for param in params]
    trajectory = []
    for step in range(1, NUM_STEPS + 1):
        for param, grad, memory in zip(params, grads_at(params, step), memories, strict=True):
            flat = param.view(-1)
            for k, g in enumerate(grad.reshape(-1).tolist()):
                log_size = max(math.log(abs(g) + 1.1920928955078125e-07) / 5, -1)
                sign = min(max(g * math.exp(5), -1), 1)
                flat[k] += 0.01 * two_layers(weights, [log_size, sign], memory[k])
        trajectory.append([param.clone() for param in params])
    return trajectory


def test_follows_the_specification_coordinate_by_coordinate() -> None:
    rule = L2ODM()
    weights = {key: value.double() for key, value in learned(rule, perturbation=0.3).weights.items()}
    params, shared = start(), rule.init_shared(weights)
    states = [rule.init_state(weights, param) for param in params]
    for step, expected in enumerate(literal_run(weights, rule.hidden), 1):
        grads = grads_at(params, step)
        context = context_at(step, dtype=torch.float64)
        deltas, states, shared = apply_rule(rule, weights, params, grads, states, shared, context, Plan(pack_size=10))
        params = [param + delta for param, delta in zip(params, deltas, strict=True)]
        torch.testing.assert_close(params, expected, rtol=1e-10, atol=1e-10)
    assert max(float((param - first).abs().max()) for param, first in zip(params, start(), strict=True)) > 0.1


def test_lstm_is_that_of_torch() -> None:
    rule = L2ODM()
    weights = learned(rule, perturbation=0.3).weights
    cell = torch.nn.LSTMCell(2, rule.hidden)
    with torch.no_grad():
        cell.weight_ih.copy_(weights["lstm_0.weight"][:, :2])
        cell.weight_hh.copy_(weights["lstm_0.weight"][:, 2:])
        cell.bias_ih.copy_(weights["lstm_0.bias"])
        cell.bias_hh.zero_()
        grad = torch.tensor([1e-9, -1e-3, 0.5, 1e4])
        features = torch.stack([(grad.abs() + 2**-23).log().div(5).clamp(min=-1), (grad * math.e**5).clamp(-1, 1)])
        hidden, carry = cell(features.T)
    state = rule.init_state(weights, grad)
    (new,) = apply_rule(rule, weights, [grad], [grad], [state], {}, context_at(1)).states
    torch.testing.assert_close(new["hidden_0"], hidden)
    torch.testing.assert_close(new["cell_0"], carry)


def test_has_the_weights_and_the_state_of_the_paper() -> None:
    rule = L2ODM()
    weights = rule.init_weights(torch.Generator().manual_seed(0))
    assert sum(weight.numel() for weight in weights.values()) == 5141
    state = rule.init_state(weights, torch.zeros(2, 3))
    assert sum(value[0, 0].numel() for key, value in state.items() if key not in ("step", *rule.memory)) == 80


def test_initial_weights_are_truncated_normal_with_an_open_forget_gate() -> None:
    weights = L2ODM().init_weights(torch.Generator().manual_seed(0))
    drawn = weights["lstm_1.weight"] * 40**0.5
    assert drawn.abs().max() <= 2 + 1e-6
    assert abs(float(drawn.std()) - 0.8796) < 0.03  # that of a standard normal cut at 2
    biases = weights["lstm_1.bias"].reshape(4, 20).mean(1)
    torch.testing.assert_close(biases, torch.tensor([0.0, 1.0, 0.0, 0.0]), rtol=0, atol=0.15)


def test_a_coordinate_starts_with_its_first_gradient() -> None:
    rule = L2ODM()
    weights = learned(rule, perturbation=0.3).weights
    late, prompt = (rule.init_state(weights, torch.zeros(1)) for _ in range(2))
    zero, grad = torch.zeros(1), torch.full((1,), 0.3)
    for step in range(3):
        delta, (late,), _ = apply_rule(rule, weights, [zero], [zero], [late], {}, context_at(step + 1))
        assert float(delta[0]) == 0
    for step in range(3):
        first = apply_rule(rule, weights, [zero], [grad], [late], {}, context_at(step + 4))
        second = apply_rule(rule, weights, [zero], [grad], [prompt], {}, context_at(step + 1))
        torch.testing.assert_close(first.deltas, second.deltas, rtol=0, atol=0)
        (late,), (prompt,) = first.states, second.states
