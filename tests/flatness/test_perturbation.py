from __future__ import annotations

import pytest
import torch
from flatness.problems import (
    MATRIX,
    directional_derivative,
    finite_difference,
    flat,
    generator,
    like,
    network,
    quadratic,
    quadratic_params,
)

from flatopt import flatness
from flatopt.flatness import PerturbationGap, SamGap


def test_sam_gap_on_a_quadratic_is_the_closed_form():
    params, rho = quadratic_params(), 0.3
    grad = MATRIX @ flat(params)
    expected = rho * grad.norm() + 0.5 * rho**2 * (grad @ MATRIX @ grad) / (grad @ grad)
    torch.testing.assert_close(flatness.sam_gap(quadratic(), params, rho=rho), expected)


def test_sam_gap_gradient_is_the_difference_of_two_gradients():
    loss_fn, params = network()
    grad = flat(torch.func.grad(loss_fn)(params))
    step = like(0.3 * grad / grad.norm(), params)
    direction = network(seed=2)[1]

    def held_fixed(params):
        return loss_fn({name: param + step[name] for name, param in params.items()}) - loss_fn(params)

    actual = directional_derivative(lambda params: flatness.sam_gap(loss_fn, params, rho=0.3), params, direction)
    torch.testing.assert_close(actual, finite_difference(held_fixed, params, direction), rtol=1e-6, atol=1e-9)


def test_sam_gap_is_zero_at_a_stationary_point_and_not_negative_on_convex_losses():
    convex = quadratic(MATRIX @ MATRIX)
    assert flatness.sam_gap(convex, {name: torch.zeros_like(p) for name, p in quadratic_params().items()}) == 0
    for seed in range(5):
        assert flatness.sam_gap(convex, quadratic_params(seed)) > 0


def test_perturbation_gap_is_the_mean_rise_with_noise_scaled_per_tensor():
    params = quadratic_params()
    measure = PerturbationGap(radius=0.2, num_perturbations=2)
    noise = measure.sample_noise(params, generator(1))
    loss_fn, rises = quadratic(), []
    for index in range(2):
        moved = {
            "a": params["a"] + 0.2 * params["a"].square().mean().sqrt() * noise["a"][index],
            "empty": params["empty"],
            "b": params["b"] + 0.2 * params["b"].abs() * noise["b"][index],
        }
        rises.append(loss_fn(moved) - loss_fn(params))
    torch.testing.assert_close(measure(loss_fn, params, noise), sum(rises) / 2)


def test_perturbation_gap_averages_to_the_scaled_traces():
    params = quadratic_params()
    measure = PerturbationGap(radius=0.5, num_perturbations=4000)
    value = measure(quadratic(), params, measure.sample_noise(params, generator()))
    size_a, size_b = params["a"].square().mean(), params["b"].square()
    expected = 0.5 * 0.25 * (size_a * MATRIX[:3, :3].trace() + size_b * MATRIX[3, 3])
    scale = torch.cat([size_a.expand(3), size_b[None]]).sqrt() * 0.5
    linear = (scale * (MATRIX @ flat(params))).square().sum()
    curved = 0.5 * (scale[:, None] * MATRIX * scale).square().sum()
    assert (value - expected).abs() < 4 * ((linear + curved) / 4000).sqrt()


def test_perturbation_gap_takes_no_derivative_of_the_loss():
    measure = PerturbationGap()
    params = {"x": torch.full((3,), 1.5)}
    calls = []

    def counting_steps(params):
        calls.append(1)
        return torch.floor(params["x"]).sum().detach()

    measure(counting_steps, params, measure.sample_noise(params, generator()))
    assert len(calls) == 2


@pytest.mark.parametrize("measure", [PerturbationGap(), SamGap()])
def test_zero_params_give_a_finite_value_and_gradient(measure):
    params = {"x": torch.zeros(3)}
    noise = measure.sample_noise(params)
    grads = torch.func.grad(lambda params: measure(lambda params: params["x"].cos().sum(), params, noise))(params)
    assert grads["x"].isfinite().all()
