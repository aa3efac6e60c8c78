"""The rule against its equations, written down once more: NumPy, float64, one tensor after another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers import context_at, unroll
from torch import Tensor

from flatopt.rules import HierarchicalMLP, State, Weights, apply_rule, spell_out_products

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "net": [(5, 12), (5,), (3, 5), (3,)],
    "scalar": [()],
    "conv": [(4, 3, 3, 3), (4,)],
    "embedding": [(20, 6), (2, 2)],
    "empty": [(3, 2), (0,), (2, 0), ()],
}
by_shapes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
by_horizon = pytest.mark.parametrize("num_steps", [math.inf, 14.0])


def random_weights(seed: int = 0, std: float = 0.5) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights = HierarchicalMLP().init_weights(generator)
    return {
        name: (value + std * torch.randn(value.shape, generator=generator)).double() for name, value in weights.items()
    }


def core_weights() -> Weights:
    weights = HierarchicalMLP().init_weights(torch.Generator().manual_seed(0))
    return {name: value.double() for name, value in weights.items()}


def draw(shapes: Sequence[tuple[int, ...]], num_steps: int, seed: int = 0) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return parameters, and gradients of very different size from tensor to tensor and step to step."""
    generator = torch.Generator().manual_seed(seed)

    def randn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = [randn(shape) * 10.0 ** (index - 1) for index, shape in enumerate(shapes)]
    grads = [[(randn(shape) + 0.5) * randn(()).mul(2).exp() for shape in shapes] for _ in range(num_steps)]
    return params, grads


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def fan_of(shape: tuple[int, ...]) -> float:
    return 64.0 if len(shape) < 2 else float(max(np.prod(shape[1:]), 8))


def peak_of(shape: tuple[int, ...], shapes: Sequence[tuple[int, ...]]) -> float:
    """Return the step of one tensor among others when the schedule is at its peak."""
    width = shape[1] if len(shape) >= 2 else 0
    return 0.03 / math.sqrt(fan_of(shape)) / math.sqrt(max(1, width / 64)) / math.sqrt(depth_of(shapes))


def depth_of(shapes: Sequence[tuple[int, ...]]) -> float:
    return max(1, sum(len(shape) >= 2 for shape in shapes) / 4)


def schedule(t: int, num_steps: float, depth: float) -> float:
    warmup = min(t / 10 / depth, 1)
    if math.isinf(num_steps):
        return warmup / math.sqrt(1 + t / 100)
    return warmup * (1 + math.cos(math.pi * min((t - 1) / num_steps, 1))) / 2


def averages(grads: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the bias-corrected averages as explicit weighted sums over the history."""

    def average(values: Sequence[np.ndarray], decay: float) -> np.ndarray:
        t = len(values)
        terms = [(1 - decay) * decay ** (t - 1 - index) * value for index, value in enumerate(values)]
        return np.asarray(sum(terms) / (1 - decay**t))

    return average(grads, 0.9), average(grads, 0.98), average([grad**2 for grad in grads], 0.99)


def core_step(
    param: np.ndarray, grads: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]], num_steps: float
) -> np.ndarray:
    """Adam's direction at unit RMS and some decay, a step that scales with the shape, and a schedule."""
    fast, _, v = averages(grads)
    u = fast / np.sqrt(v)
    direction = np.clip(u / rms(u), -6, 6) if u.size else u
    return np.asarray(
        -peak_of(param.shape, shapes) * schedule(len(grads), num_steps, depth_of(shapes)) * (direction + 0.1 * param)
    )


def train_core(params: list[Tensor], grads_of_step: list[list[Tensor]], num_steps: float) -> list[np.ndarray]:
    moved = [param.numpy().copy() for param in params]
    shapes = [tuple(param.shape) for param in params]
    for t in range(1, len(grads_of_step) + 1):
        for index, param in enumerate(moved):
            history = [grads[index].numpy() for grads in grads_of_step[:t]]
            moved[index] = param + core_step(param, history, shapes, num_steps)
    return moved


def affine(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return np.asarray(weights[f"{name}.weight"].numpy() @ x + weights[f"{name}.bias"].numpy())


def whole_step(
    weights: Weights, params: list[np.ndarray], histories: list[list[np.ndarray]], num_steps: float
) -> list[np.ndarray]:
    """Return the step of every tensor after the gradients ``histories``."""
    t = len(histories[0])
    known = not math.isinf(num_steps)
    first_layers, directions = [], []
    for param, history in zip(params, histories, strict=True):
        fast, slow, v = averages(history)
        u_g, u_f, u_s = history[-1] / np.sqrt(v), fast / np.sqrt(v), slow / np.sqrt(v)
        directions.append((u_g, u_f, u_s, slow, v))
        fraction = min(t / num_steps, 1)
        time = [(math.log(t) - 4) / 2, *(math.tanh(math.log(t / scale)) for scale in (10, 100, 1000))]
        late = math.tanh(10 * (fraction - 0.9))
        horizon = [1, 2 * fraction - 1, fraction**2, late, (math.log(num_steps) - 6) / 2] if known else [0] * 5
        features = [
            math.log(rms(u_g)) + 0.5,
            math.log(rms(u_f)) + 1.5,
            math.log(rms(u_s)) + 2,
            np.mean(u_g * u_f) / rms(u_g) / rms(u_f),
            np.mean(u_g * u_s) / rms(u_g) / rms(u_s),
            np.mean(u_f * u_s) / rms(u_f) / rms(u_s),
            math.log(rms(param)) / 2 + 1,
            (math.log(fan_of(param.shape)) - 4) / 2,
            float(param.ndim < 2),
            (math.log(param.size + 1) - 7) / 3,
            *time,
            *horizon,
            (math.log(len(params)) - 2) / 1.5,
        ]
        first_layers.append(np.tanh(affine(weights, "controller.0", np.clip(np.array(features), -3, 3))))

    mean = np.mean(first_layers, axis=0)
    steps = []
    for param, history, first, parts in zip(params, histories, first_layers, directions, strict=True):
        u_g, u_f, u_s, slow, v = parts
        second = np.tanh(affine(weights, "controller.1", np.concatenate([first, mean])))
        out = affine(weights, "controller.2", second)
        log_step, decay = 2 * math.tanh(out[0] / 2), np.clip(0.1 + out[1], 0, 1)
        a_g, a_s = np.clip(out[2], -2, 2), np.clip(out[3], -2, 2)
        shift = np.clip(out[4:], -3, 3)
        d = u_f + a_g * u_g + a_s * u_s
        direction = np.clip(d / max(rms(d), math.sqrt(0.05) * rms(u_f)), -6, 6)
        step = np.empty_like(param)
        for at in np.ndindex(param.shape):  # one coordinate after another
            x = np.array(
                [
                    u_g[at] / rms(u_g),
                    u_f[at] / rms(u_f),
                    u_s[at] / rms(u_s),
                    param[at] / rms(param),
                    math.log(v[at] / np.mean(v)) / 2,
                    history[-1][at] / rms(history[-1]),
                    slow[at] / math.sqrt(np.mean(v)),
                ]
            )
            hidden = np.maximum(affine(weights, "coordinate.0", np.clip(x, -5, 5)) + shift, 0)
            hidden = np.maximum(affine(weights, "coordinate.1", hidden), 0)
            residual = affine(weights, "coordinate.2", hidden)[0]
            step[at] = direction[at] + residual + decay * param[at]
        shapes = [other.shape for other in params]
        eta = peak_of(param.shape, shapes) * schedule(t, num_steps, depth_of(shapes)) * math.exp(log_step)
        steps.append(-eta * step)
    return steps


@by_shapes
@by_horizon
def test_at_initialisation_the_rule_is_its_core(shapes, num_steps):
    params, grads = draw(shapes, 12)
    actual, _, _ = unroll(HierarchicalMLP(), core_weights(), params, grads, num_steps)
    for value, expected in zip(actual, train_core(params, grads, num_steps), strict=True):
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["net", "scalar", "conv", "embedding"])
@by_horizon
def test_random_weights_follow_the_equations(name, num_steps):
    params, grads = draw(SHAPES[name], 6)
    weights = random_weights()
    actual, _, _ = unroll(HierarchicalMLP(), weights, params, grads, num_steps)
    moved = [param.numpy().copy() for param in params]
    for t in range(1, len(grads) + 1):
        histories = [[step[index].numpy() for step in grads[:t]] for index in range(len(params))]
        steps = whole_step(weights, moved, histories, num_steps)
        moved = [param + step for param, step in zip(moved, steps, strict=True)]
    for value, expected in zip(actual, moved, strict=True):
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("output", ["coordinate.2.weight", "controller.2.weight"])
def test_every_output_layer_matters(output):
    params, grads = draw(SHAPES["net"], 3)
    weights = core_weights()
    changed = weights | {output: random_weights()[output]}
    core, _, _ = unroll(HierarchicalMLP(), weights, params, grads)
    learned, _, _ = unroll(HierarchicalMLP(), changed, params, grads)
    for one, other, param in zip(core, learned, params, strict=True):
        assert (one - other).norm() > 0.01 * (one - param).norm()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_do_not_depend_on_the_scale_of_the_gradients(scale, dtype):
    params, grads = draw(SHAPES["net"], 8)
    params, grads = [param.to(dtype) for param in params], [[grad.to(dtype) for grad in step] for step in grads]
    scaled = [[grad * scale for grad in step] for step in grads]
    weights = {name: value.to(dtype) for name, value in random_weights().items()}
    one, _, _ = unroll(HierarchicalMLP(), weights, params, grads, 20)
    other, _, _ = unroll(HierarchicalMLP(), weights, params, scaled, 20)
    for a, b in zip(one, other, strict=True):
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_coordinates_without_a_gradient_do_not_move():
    params, grads = draw([(4, 6), (4,)], 5)
    for step in grads:
        step[0][1] = 0
        step[1][:] = 0
    moved, _, _ = unroll(HierarchicalMLP(), random_weights(), params, grads)
    assert torch.equal(moved[0][1], params[0][1]) and torch.equal(moved[1], params[1])
    assert (moved[0][[0, 2, 3]] != params[0][[0, 2, 3]]).all()


def step_once(
    weights: Weights, params: list[Tensor], grads: list[Tensor], step: int, num_steps: float = math.inf
) -> list[Tensor]:
    rule = HierarchicalMLP()
    states: list[State] = [rule.init_state(weights, param) for param in params]
    for state in states:
        state["step"] += step - 1
    return apply_rule(rule, weights, params, grads, states, {}, context_at(step, num_steps, torch.float64)).deltas


def test_no_step_is_larger_than_its_bound():
    params, grads = draw(SHAPES["net"], 20)
    params = [param.clamp(-1, 1) for param in params]
    for seed in range(20):
        weights = random_weights(seed, std=3.0)
        # The residual is bounded by the features, at most 5, and the shifts, at most 3, through the layers' norms.
        sizes = [weights[f"coordinate.{layer}.weight"].abs().sum(1) for layer in range(3)]
        biases = [weights[f"coordinate.{layer}.bias"].abs() for layer in range(3)]
        bound = (5 * sizes[0] + biases[0] + 3).max()
        for size, bias in zip(sizes[1:], biases[1:], strict=True):
            bound = (bound * size + bias).max()
        for param, delta in zip(params, step_once(weights, params, grads[seed], 50), strict=True):
            largest = 0.03 / math.sqrt(fan_of(tuple(param.shape))) * math.exp(2) * (6 + float(bound) + 1)
            assert delta.abs().max() <= largest


@pytest.mark.parametrize(("step", "moves"), [(1, True), (7, True), (8, True), (9, False), (10, False), (100, False)])
def test_nothing_moves_beyond_a_known_horizon(step, moves):
    # Step t has cosine of (t - 1) / T: the last of T steps still moves, the one after it does not.
    params, grads = draw(SHAPES["net"], 1)
    deltas = step_once(random_weights(), params, grads[0], step, num_steps=8)
    assert all((delta.abs().max() > 1e-12) == moves for delta in deltas)


def test_unknown_horizon_decays_and_known_one_warms_up_and_anneals():
    params, grads = draw([(3, 16)], 1)
    params = [torch.zeros_like(param) for param in params]  # nothing to decay
    sizes = {
        num_steps: [
            float(step_once(core_weights(), params, grads[0], t, num_steps)[0].square().mean().sqrt()) for t in at
        ]
        for num_steps, at in ((math.inf, (5, 10, 300, 9900)), (1000.0, (5, 11, 501)))
    }
    peak = peak_of((3, 16), [(3, 16)])
    # The direction of a single gradient has unit RMS whatever t is.
    np.testing.assert_allclose(
        sizes[math.inf], peak * np.array([0.5, 1, 1, 1]) / np.sqrt(1 + np.array([5, 10, 300, 9900]) / 100)
    )
    expected = [0.5 * (1 + math.cos(0.004 * math.pi)) / 2, (1 + math.cos(0.01 * math.pi)) / 2, 0.5]
    np.testing.assert_allclose(sizes[1000.0], peak * np.array(expected))


def test_a_known_horizon_is_seen_by_the_controller():
    params, grads = draw(SHAPES["net"], 1)
    weights = random_weights()
    ratios = []
    for num_steps in (1e3, 1e5):
        learned = step_once(weights, params, grads[0], 10, num_steps)[0]
        core = step_once(core_weights(), params, grads[0], 10, num_steps)[0]
        ratios.append(float(learned.norm() / core.norm()))
    assert abs(ratios[0] / ratios[1] - 1) > 0.01


@by_horizon
def test_gradient_with_respect_to_the_weights_is_right(num_steps):
    rule = HierarchicalMLP(hidden=2, controller_hidden=2)
    generator = torch.Generator().manual_seed(3)
    names = list(rule.init_weights())
    values = [
        (value + 0.3 * torch.randn(value.shape, generator=generator)).double().requires_grad_()
        for value in rule.init_weights(generator).values()
    ]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (2,))]
    inputs = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def loss(*values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        params, states = start, [rule.init_state(weights, param) for param in start]
        total = torch.zeros((), dtype=torch.float64)
        for step in range(1, 4):
            context = context_at(step, num_steps, torch.float64)
            outputs = torch.tanh(inputs @ params[0].T + params[1]) - 1
            slope = outputs * (1 - (outputs + 1).square())
            grads = [slope.T @ inputs, slope.sum(0)]  # by hand, so that it is part of the graph
            deltas, states, _ = apply_rule(rule, weights, params, grads, states, {}, context)
            params = [param + 30 * delta for param, delta in zip(params, deltas, strict=True)]
            total = total + (torch.tanh(inputs @ params[0].T + params[1]) - 1).square().sum()
        return total

    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-7, rtol=1e-4, fast_mode=True)


def test_a_tensor_without_gradients_leaves_the_meta_gradient_finite():
    params, grads = draw(SHAPES["net"], 1)
    weights = {name: value.requires_grad_() for name, value in random_weights().items()}
    grads[0][1] = torch.zeros_like(grads[0][1])
    total = sum(delta.square().sum() for delta in step_once(weights, params, grads[0], 1))
    gradients = torch.autograd.grad(total, list(weights.values()), materialize_grads=True)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@by_horizon
def test_products_spelled_out_for_a_compiler_give_the_same_steps(num_steps: float):
    params, grads = draw(SHAPES["conv"], 3)
    weights = random_weights()
    plain, spelled_out = [], []
    for step, grad in enumerate(grads, start=1):
        plain += step_once(weights, params, grad, step, num_steps)
        with spell_out_products():
            spelled_out += step_once(weights, params, grad, step, num_steps)
    for one, other in zip(plain, spelled_out, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)


def test_number_of_weights_and_what_is_zero_at_first():
    weights = HierarchicalMLP().init_weights(torch.Generator().manual_seed(0))
    coordinate = 7 * 8 + 8 + 8 * 8 + 8 + 8 + 1
    controller = 20 * 16 + 16 + 32 * 16 + 16 + 16 * 12 + 12
    assert sum(value.numel() for value in weights.values()) == coordinate + controller
    zero = {name for name, value in weights.items() if not value.any()}
    assert zero == {name for name in weights if name.endswith("bias")} | {"coordinate.2.weight", "controller.2.weight"}


def test_weights_repeat_with_the_generator():
    one, again, other = (HierarchicalMLP().init_weights(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["coordinate.0.weight"], other["coordinate.0.weight"])


def test_options_change_the_core_as_they_say():
    params, grads = draw([(3, 16), (2, 2), (4,)], 1)
    rule = HierarchicalMLP(
        base_step=0.3,
        vector_fan_in=9.0,
        min_fan_in=4.0,
        base_decay=0.0,
        large_width=2.0,
        many_matrices=1.0,
        warmup_steps=1.0,
        decay_steps=1.0,
    )
    weights = core_weights()
    states = [rule.init_state(weights, param) for param in params]
    deltas = apply_rule(rule, weights, params, grads[0], states, {}, context_at(1, dtype=torch.float64)).deltas
    sizes = [float(delta.square().mean().sqrt()) for delta in deltas]
    # Two matrices, where many is one: steps smaller by the root of two, half of the warm-up; then the decay over time.
    np.testing.assert_allclose(sizes, 0.3 / math.sqrt(2) / 2 / math.sqrt(2) / np.array([4 * math.sqrt(8), 2, 3]))
