from __future__ import annotations

import math

import numpy
import pytest
import torch
from helpers import context_at, learned
from torch import Tensor

from flatopt.rules import L2OScale, Plan, Update, apply_rule
from flatopt.rules.l2o_scale import _scale_gradients

NUM_STEPS = 50
Array = numpy.ndarray
SIZES = [(3, 4), (4,), (2, 4), (2,)]
"""Kernels and biases of a network of two layers."""


def sigmoid(x: Array) -> Array:
    return 1 / (1 + numpy.exp(-x))


def bias_gru(w: dict[str, Array], name: str, x: Array, h: Array, beta: Array) -> Array:
    """Return the new state of one row; reset columns first, reset before the candidate."""
    size = len(h)
    gates = w[f"{name}.gates.weight"] @ numpy.concatenate([x, h]) + w[f"{name}.gates.bias"]
    reset = sigmoid(gates[:size] + beta[:size])
    update = sigmoid(gates[size:] + beta[size : 2 * size])
    candidate = w[f"{name}.candidate.weight"] @ numpy.concatenate([x, reset * h]) + w[f"{name}.candidate.bias"]
    return update * h + (1 - update) * numpy.tanh(candidate + beta[2 * size :])


def affine(w: dict[str, Array], name: str, x: Array) -> Array:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


class Literal:
    """Section 2.5 of the specification, phase by phase, with a loop over tensors and one over rows."""

    def __init__(self, weights: dict[str, Tensor], params: list[Array], log_lrs: list[Array], last: bool):
        self.w = {key: value.numpy() for key, value in weights.items()}
        self.params, self.last = params, last
        self.r = self.w["global.start"].copy()
        self.tensors = []
        for param, log_lr in zip(params, log_lrs, strict=True):
            n = param.size
            self.tensors.append(
                {
                    "h": [self.w["coordinate.start"].copy() for _ in range(n)],
                    "d_s": [0.0] * n,
                    "d_i": [0.0] * n,
                    "l": log_lr.reshape(-1).tolist(),
                    "A": [[0.0] * 4 for _ in range(n)],
                    "M": [[0.0] * 4 for _ in range(n)],
                    "q": self.w["tensor.start"].copy(),
                }
            )

    def step(self, grads: list[Array]) -> None:
        count = sum(len(tensor["l"]) for tensor in self.tensors)
        lbar = sum(sum(tensor["l"]) for tensor in self.tensors) / count
        r_old = self.r
        for tensor, param, grad in zip(self.tensors, self.params, grads, strict=True):
            self.step_tensor(tensor, param.reshape(-1), grad.reshape(-1), lbar, r_old)
        states = [tensor["q"] for tensor in self.tensors]
        pooled = states[-1] if self.last else sum(states) / len(states)
        self.r = bias_gru(self.w, "global", pooled, r_old, numpy.zeros(60))

    def step_tensor(self, tensor: dict, param: Array, grad: Array, lbar: float, r_old: Array) -> None:
        w, n = self.w, len(param)
        q_old = tensor["q"]
        beta = affine(w, "tensor_to_coordinate", q_old) + affine(w, "global_to_coordinate", r_old)
        first = [all(tensor["M"][k][j] == 0 for k in range(n)) for j in range(4)]
        rows, directions, steps = [], [], []
        for k in range(n):
            decay = tensor["d_i"][k]
            scaled, logs = [], []
            for j in range(4):
                tensor["A"][k][j] = a = (1 - decay) * grad[k] + decay * tensor["A"][k][j]
                d = 0.0 if first[j] else tensor["d_s"][k]
                tensor["M"][k][j] = m = (1 - d) * (a * a + 1e-12) + d * tensor["M"][k][j]
                scaled.append(math.asinh(a / math.sqrt(m + 1e-16)))
                logs.append(math.log(m + 1e-16))
                decay = math.sqrt(decay)
            products = [scaled[0] * scaled[1], scaled[1] * scaled[2], scaled[2] * scaled[3]]
            x = numpy.array([*scaled, *products, *(log - sum(logs) / 4 for log in logs), tensor["l"][k] - lbar])
            h = tensor["h"][k] = bias_gru(w, "coordinate", x, tensor["h"][k], beta)
            rows.append(numpy.concatenate([h, x]))
            directions.append(float((w["direction.weight"] @ h + w["shortcut.weight"] @ numpy.array(scaled))[0]))
            tensor["d_s"][k] = float(sigmoid(affine(w, "scale_decay", h))[0])
            tensor["d_i"][k] = float(sigmoid(affine(w, "input_decay", h))[0])
            l_step = min(max(tensor["l"][k] + float(affine(w, "learning_rate", h)[0]), -33), 33)
            mu = float(sigmoid(w["lr_momentum_logit"]))
            tensor["l"][k] = mu * tensor["l"][k] + (1 - mu) * l_step
            steps.append(math.exp(l_step + float(w["log_step_offset"])))
        tensor["q"] = bias_gru(w, "tensor", sum(rows) / n, q_old, affine(w, "global_to_tensor", r_old))
        norm = math.sqrt(sum(e * e for e in directions) / n + 1e-16)
        self.mean_step = sum(steps) / n
        for k in range(n):
            param[k] -= steps[k] * directions[k] / norm


def loss_grads(params: list[Tensor], step: int) -> list[Tensor]:
    """Return gradients of a network of two layers, of very different scales."""
    leaves = [param.clone().requires_grad_() for param in params]
    x = torch.sin(torch.arange(12.0, dtype=torch.float64).reshape(4, 3) + step)
    out = torch.tanh(x @ leaves[0] + leaves[1]) @ leaves[2].T + leaves[3]
    return list(torch.autograd.grad((out - x[:, :2]).square().sum() * 10.0 ** (step % 5 - 3), leaves))


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("seed", [None, 0])
def test_follows_the_specification_row_by_row(pool: str, seed: int | None) -> None:
    rule = L2OScale(global_pool=pool, min_lr=1e-4)  # type: ignore[arg-type]
    weights = {key: value.double() for key, value in learned(rule, perturbation=0.3).weights.items()}
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES]
    source = None if seed is None else torch.Generator().manual_seed(seed)
    states = [rule.init_state(weights, param, source) for param in params]
    log_lrs = [state["log_lr"].numpy() for state in states]
    literal = Literal(weights, [param.numpy().copy() for param in params], log_lrs, pool == "last")
    shared = rule.init_shared(weights)
    first = params
    for step in range(1, NUM_STEPS + 1):
        grads = loss_grads(params, step)
        literal.step([grad.numpy() for grad in grads])
        context = context_at(step, dtype=torch.float64)
        deltas, states, shared = apply_rule(
            rule, weights, params, grads, states, shared, context, Plan(chunk_size=5, pack_size=4)
        )
        params = [param + delta for param, delta in zip(params, deltas, strict=True)]
        expected = [torch.from_numpy(param) for param in literal.params]
        torch.testing.assert_close(params, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shared["hidden"], torch.from_numpy(literal.r), rtol=1e-10, atol=1e-10)
    assert max(float((param - old).abs().max()) for param, old in zip(params, first, strict=True)) > 1e-3


def test_step_size_is_the_mean_over_the_tensor() -> None:
    rule = L2OScale()
    weights = {key: value.double() for key, value in learned(rule, perturbation=0.3).weights.items()}
    param, grad = torch.zeros(7, dtype=torch.float64), torch.linspace(-1, 2, 7, dtype=torch.float64)
    state = rule.init_state(weights, param, torch.Generator().manual_seed(0))
    literal = Literal(weights, [param.numpy().copy()], [state["log_lr"].numpy()], False)
    literal.step([grad.numpy()])
    shared, context = rule.init_shared(weights), context_at(1, dtype=torch.float64)
    (delta,), _, _ = apply_rule(rule, weights, [param], [grad], [state], shared, context)
    one = torch.ones(1, dtype=torch.float64)
    moved = torch.ones(7, dtype=torch.float64)
    apply_rule(rule, weights, [moved], [grad], [state], shared, context, Plan(update=Update(one, one)))
    torch.testing.assert_close(1 + delta - moved, torch.full_like(moved, literal.mean_step), rtol=1e-9, atol=0)


def test_has_the_weights_and_the_state_of_the_paper() -> None:
    rule = L2OScale()
    weights = rule.init_weights(torch.Generator().manual_seed(0))
    assert sum(weight.numel() for weight in weights.values()) == 8349
    state = rule.init_state(weights, torch.zeros(2, 3))
    assert sum(value[0, 0].numel() for key, value in state.items() if key not in ("step", *rule.memory)) == 21
    assert state["memory"].numel() == 22


def test_initial_learning_rates_are_seeded_and_in_range() -> None:
    rule = L2OScale()
    weights, param = rule.init_weights(torch.Generator().manual_seed(0)), torch.zeros(40, 50)

    def drawn(seed: int) -> Tensor:
        return rule.init_state(weights, param, torch.Generator().manual_seed(seed))["log_lr"]

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))
    means = torch.stack([drawn(seed).mean() for seed in range(200)])
    half = math.log(1e4) / 2  # every coordinate, and every tensor, covers this much
    assert drawn(3).max() - drawn(3).min() == pytest.approx(half, rel=0.01)
    assert means.min() > math.log(1e-6) + 0.45 * half and means.max() < math.log(1e-2) - 0.45 * half
    assert float(means.mean()) == pytest.approx(math.log(1e-4), abs=0.3)
    assert float(means.std()) == pytest.approx(half / 12**0.5, rel=0.2)
    torch.testing.assert_close(rule.init_state(weights, param)["log_lr"].exp(), torch.full((40, 50), 1e-4))


def test_learning_rate_at_its_bound_still_has_a_gradient() -> None:
    rule = L2OScale(max_log_lr=-5.0, min_lr=1e-2, max_lr=1e-2)
    weights = learned(rule).weights
    bias = torch.ones(1, requires_grad=True)
    param, grad = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    state = rule.init_state(weights, param)
    result = apply_rule(
        rule,
        weights | {"learning_rate.bias": bias},
        [param],
        [grad],
        [state],
        rule.init_shared(weights),
        context_at(1),
    )
    (slope,) = torch.autograd.grad(result.deltas[0].abs().sum(), bias)
    # The step is exp(-5 - 1) times a direction, and the derivative of exp is itself.
    assert float(slope) == pytest.approx(float(result.deltas[0].detach().abs().sum()), rel=1e-5)
    assert float(result.deltas[0].detach().square().mean().sqrt()) == pytest.approx(math.exp(-6), rel=1e-4)


def test_large_negative_gradients_are_scaled_accurately() -> None:
    # An inverse hyperbolic sine as log(x + sqrt(1 + x^2)) is -inf in float32 from about -4096 on.
    average, square = torch.tensor([-1e6, -4096.0, -3000.0, -1e-6]), torch.ones(4)
    expected = _scale_gradients(average.double(), square.double()).float()
    torch.testing.assert_close(_scale_gradients(average, square), expected, rtol=1e-6, atol=0)


def test_tensors_that_sit_a_step_out_do_not_count_for_the_mean_learning_rate() -> None:
    rule = L2OScale()
    weights = {key: value.double() for key, value in learned(rule, perturbation=0.3).weights.items()}
    params = [torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)]
    states = [rule.init_state(weights, param, torch.Generator().manual_seed(1)) for param in params]
    shared, context = rule.init_shared(weights), context_at(1, dtype=torch.float64)
    alone = rule.prepare(weights, torch.ones(1), states[0]["memory"][None], shared, context)
    torch.testing.assert_close(alone[0, 0], states[0]["log_lr"].mean())
    memories = torch.stack([state["memory"] for state in states])
    both = rule.prepare(weights, torch.ones(2), memories, shared, context)
    together = torch.cat([state["log_lr"] for state in states]).mean()
    torch.testing.assert_close(both[:, 0], together.expand(2))
