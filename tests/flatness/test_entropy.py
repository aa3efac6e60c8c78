from __future__ import annotations

import math

import pytest
import torch
from flatness.problems import MATRIX, directional_derivative, flat, generator, network, quadratic, quadratic_params

from flatopt import flatness
from flatopt.flatness import EntropySurrogate
from flatopt.flatness._vectors import unflatten

EYE = torch.eye(4, dtype=torch.float64)
GAMMA = 5.0  # MATRIX + 5 I is positive definite


def exact_mean(params):
    """Mean of the Gaussian local density of the quadratic: ``gamma (H + gamma I)^-1 x``."""
    return GAMMA * torch.linalg.solve(MATRIX + GAMMA * EYE, flat(params))


def test_one_dimensional_numbers():
    h, gamma, x = 3.0, 2.0, torch.tensor(0.7, dtype=torch.float64)
    points = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * h * points**2 - 0.5 * gamma * (x - points) ** 2)
    mass = torch.trapezoid(density, points)
    mean = torch.trapezoid(points * density, points) / mass
    assert abs(float(mean) - 0.28) < 1e-9

    def loss_fn(params):
        return 0.5 * h * params["x"].square().sum()

    value = flatness.local_entropy(loss_fn, {"x": x}, EntropySurrogate(gamma=gamma, num_steps=1)).value
    torch.testing.assert_close(value, mass.log())
    assert round(float(value), 5) == -0.17978

    chains = {"x": x.repeat(4000)}  # independent coordinates: that many chains at once
    surrogate = EntropySurrogate(gamma=gamma, num_steps=100, step_size=0.1)
    means = surrogate.mean(loss_fn, chains, surrogate.sample_noise(chains, generator()))["x"]
    gradients = gamma * (x - means)
    standard_error = gradients.std() / 4000**0.5
    assert standard_error < 0.01
    assert (gradients.mean() - 0.84).abs() < 4 * standard_error


def test_value_equals_the_gaussian_integral_in_several_dimensions():
    params = quadratic_params()
    _, log_det = torch.linalg.slogdet(MATRIX + GAMMA * EYE)
    x = flat(params)
    exponent = 0.5 * GAMMA * x @ x - 0.5 * GAMMA * x @ exact_mean(params)  # f + gamma/2 ||x - y||^2 at its minimum
    expected = -exponent - 0.5 * log_det + 2 * math.log(2 * math.pi)
    # All 16 sign vectors would be needed for an exact determinant; with the fixed seed 100 probes are near.
    chain = EntropySurrogate(gamma=GAMMA, num_steps=1)
    entropy = flatness.local_entropy(quadratic(), params, chain, num_matvecs=100, generator=generator())
    torch.testing.assert_close(entropy.value, expected, rtol=0, atol=0.04)
    diagonal = MATRIX.diag().diag()
    exact = flatness.local_entropy(quadratic(diagonal), params, chain, num_matvecs=1)
    exponent = 0.5 * (GAMMA * MATRIX.diag() / (MATRIX.diag() + GAMMA) * x * x).sum()
    expected = -exponent - 0.5 * (MATRIX.diag() + GAMMA).log().sum() + 2 * math.log(2 * math.pi)
    torch.testing.assert_close(exact.value, expected)


def test_value_at_another_temperature_scales_the_loss():
    params, temperature = quadratic_params(), 0.3
    diagonal = MATRIX.diag().diag()
    chain = EntropySurrogate(gamma=GAMMA, num_steps=1, temperature=temperature)
    actual = flatness.local_entropy(quadratic(diagonal), params, chain)
    chain = EntropySurrogate(gamma=GAMMA / temperature, num_steps=1, step_size=1e-3)
    unit = flatness.local_entropy(quadratic(diagonal / temperature), params, chain)
    torch.testing.assert_close(actual.value, temperature * unit.value)


def test_value_is_nan_where_the_local_density_does_not_exist():
    entropy = flatness.local_entropy(quadratic(), quadratic_params(), EntropySurrogate(gamma=0.1, num_steps=1))
    assert entropy.value.isnan()


def test_chain_without_noise_converges_to_the_exact_mean():
    params = quadratic_params()
    chain = EntropySurrogate(gamma=GAMMA, num_steps=400, step_size=0.1, temperature=0.0)
    mean = chain.mean(quadratic(), params, chain.sample_noise(params))
    torch.testing.assert_close(flat(mean), exact_mean(params), rtol=0, atol=1e-6)


def test_antithetic_noise_cancels_on_a_quadratic_and_leaves_the_smoothed_gradient_of_a_cubic():
    params = quadratic_params()
    settings = {"gamma": GAMMA, "num_steps": 5, "step_size": 0.02}
    cold, warm = (EntropySurrogate(**settings, temperature=t, antithetic=t > 0) for t in (0.0, 3.0))
    noise = warm.sample_noise(params, generator())
    torch.testing.assert_close(flat(warm.mean(quadratic(), params, noise)), flat(cold.mean(quadratic(), params, noise)))

    # One step from 0, then one whose drift is 3 (s xi)^2, s^2 = 2 T eta: the mean of both chains is -3 eta s^2 xi^2.
    chain = EntropySurrogate(gamma=1e-9, num_steps=2, step_size=0.02, temperature=0.5, antithetic=True)
    point = {"x": torch.zeros(3, dtype=torch.float64)}
    noise = chain.sample_noise(point, generator())
    actual = chain.mean(lambda params: params["x"].pow(3).sum(), point, noise)["x"]
    torch.testing.assert_close(actual, -3 * 0.02 * (2 * 0.5 * 0.02) * noise["x"][0] ** 2)


def test_stationary_moments_of_the_chain_on_a_gaussian():
    levels = torch.tensor([0.5, 3.0], dtype=torch.float64)
    params = {"x": torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(4000, 2).clone()}  # 4000 chains at once
    chain = EntropySurrogate(gamma=2.0, num_steps=60, step_size=0.1, temperature=0.7)
    noise = chain.sample_noise(params, generator())
    *_, last = chain.samples(lambda params: 0.5 * (levels * params["x"].square()).sum(), params, noise)
    samples = last.reshape(4000, 2)
    rate = levels + 2.0
    mean = 2.0 * params["x"][0] / rate
    variance = 0.7 / (rate * (1 - 0.1 * rate / 2))  # of the Euler scheme; T / rate in the limit of small steps
    assert ((samples.mean(0) - mean).abs() < 4 * (variance / 4000).sqrt()).all()
    assert ((samples.var(0) / variance - 1).abs() < 4 * (2 / 4000) ** 0.5).all()


def test_gradient_has_the_sign_of_plus_g_and_mean_times_gamma():
    params = quadratic_params()
    chain = EntropySurrogate(gamma=GAMMA, num_steps=50, step_size=0.05)
    mean = chain.mean(quadratic(), params, chain.sample_noise(params, generator(3)))
    entropy = flatness.local_entropy(quadratic(), params, chain, generator=generator(3))
    torch.testing.assert_close(flat(entropy.gradient), GAMMA * (flat(mean) - flat(params)))


def test_integration_by_parts_the_mean_gradient_is_gamma_times_the_shift():
    # In the stationary chain E[grad f] = gamma (x - mu): without noise it holds at the fixed point exactly.
    params = quadratic_params()
    chain = EntropySurrogate(gamma=GAMMA, num_steps=400, step_size=0.1, temperature=0.0)
    *_, last = chain.samples(quadratic(), params, chain.sample_noise(params))
    torch.testing.assert_close(MATRIX @ last, GAMMA * (flat(params) - last), rtol=0, atol=1e-6)


@pytest.mark.parametrize("subtract_loss", [False, True])
def test_surrogate_gradient_is_exactly_gamma_times_params_minus_mean(subtract_loss):
    loss_fn, params = network()
    measure = EntropySurrogate(gamma=GAMMA, num_steps=5, subtract_loss=subtract_loss)
    noise = measure.sample_noise(params, generator())
    mean = flat(measure.mean(loss_fn, params, noise))
    expected = GAMMA * (flat(params) - mean)
    if subtract_loss:
        expected = expected - flat(torch.func.grad(loss_fn)(params))
    for actual in (
        flat(torch.func.grad(lambda params: measure(loss_fn, params, noise))(params)),
        torch.stack(
            [
                directional_derivative(lambda params: measure(loss_fn, params, noise), params, unflatten(row, params))
                for row in torch.eye(27, dtype=torch.float64)
            ]
        ),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_gradient_points_to_the_wider_of_two_minima():
    def loss_fn(params):  # at the barrier between a sharp and a wide valley of equal depth
        sharp, wide = 50 * (params["x"] + 1).square(), 2 * (params["x"] - 1).square()
        return -torch.logaddexp(-sharp, -wide).sum()

    params = {"x": torch.zeros(200, dtype=torch.float64)}  # 200 chains at once
    entropy = flatness.local_entropy(
        loss_fn, params, EntropySurrogate(num_steps=200), num_matvecs=1, num_lanczos=2, generator=generator()
    )
    assert entropy.gradient["x"].mean() > 0.3
