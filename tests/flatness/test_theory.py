"""The formulas of docs/theory.md, each checked by a way of computing that is not the one of the package."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from flatness.problems import MATRIX, explicit_hessian, flat, generator, network, quadratic, quadratic_params

from flatopt import flatness
from flatopt.flatness import EntropySurrogate, HutchinsonTrace, PerturbationGap, TopEigenvalue, entropy_surrogate

ROOT = Path(__file__).parents[2]
GAMMA, TEMPERATURE = 3.0, 0.7
POINTS = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
EYE = torch.eye(4, dtype=torch.float64)


def bumpy(y):
    """A loss in one dimension with several minima and curvature of both signs."""
    return 0.3 * y**2 + 0.8 * torch.sin(2 * y)


def slope(y):
    return 0.6 * y + 1.6 * torch.cos(2 * y)


def curvature(y):
    return 0.6 - 3.2 * torch.sin(2 * y)


def density(x, temperature=TEMPERATURE):
    """Return the local density around ``x`` on ``POINTS``, and its mass."""
    weights = torch.exp(-(bumpy(POINTS) + GAMMA / 2 * (x - POINTS) ** 2) / temperature)
    mass = torch.trapezoid(weights, POINTS)
    return weights / mass, mass


def entropy(x, temperature=TEMPERATURE):
    return temperature * density(x, temperature)[1].log()


def mean_of(values, weights):
    return torch.trapezoid(values * weights, POINTS)


def difference(function, x, step=1e-4):
    return (function(x + step) - function(x - step)) / (2 * step)


at = pytest.mark.parametrize("x", [-1.3, -0.2, 0.4, 2.0])


def as_float(x):
    return torch.tensor(x, dtype=torch.float64)


# --- local entropy -------------------------------------------------------------------------------------------------


@at
def test_gradient_of_the_entropy_is_the_shift_of_the_mean_and_the_mean_gradient(x):
    weights, _ = density(x)
    by_differences = -difference(entropy, as_float(x))
    torch.testing.assert_close(GAMMA * (x - mean_of(POINTS, weights)), by_differences, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mean_of(slope(POINTS), weights), by_differences, rtol=1e-6, atol=1e-8)


@at
def test_hessian_of_the_entropy_is_both_of_its_forms_and_below_gamma(x):
    weights, _ = density(x)
    by_differences = -difference(lambda x: difference(entropy, x, 1e-3), as_float(x), 1e-3)
    variance = mean_of(POINTS**2, weights) - mean_of(POINTS, weights) ** 2
    of_slope = mean_of(slope(POINTS) ** 2, weights) - mean_of(slope(POINTS), weights) ** 2
    first = GAMMA - GAMMA**2 / TEMPERATURE * variance
    second = mean_of(curvature(POINTS), weights) - of_slope / TEMPERATURE
    torch.testing.assert_close(first, by_differences, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, first, rtol=1e-8, atol=1e-10)
    assert first < GAMMA


def test_hessian_identities_hold_for_a_quadratic_in_several_dimensions():
    gamma = 5.0
    covariance = torch.linalg.inv(MATRIX + gamma * EYE)
    exact = gamma * EYE - gamma**2 * covariance
    torch.testing.assert_close(MATRIX - MATRIX @ covariance @ MATRIX, exact)
    torch.testing.assert_close(gamma * MATRIX @ covariance, exact)

    def negative_entropy(x):  # the exponent at its minimum, up to a constant
        y = torch.linalg.solve(MATRIX + gamma * EYE, gamma * x)
        return 0.5 * y @ MATRIX @ y + 0.5 * gamma * (x - y) @ (x - y)

    start = flat(quadratic_params())
    torch.testing.assert_close(torch.autograd.functional.hessian(negative_entropy, start), exact)


@at
def test_cold_entropy_is_the_moreau_envelope(x):
    errors = []
    for temperature in (0.02, 0.01):
        constant = temperature / 2 * math.log(2 * math.pi * temperature / GAMMA)
        envelope = (bumpy(POINTS) + GAMMA / 2 * (x - POINTS) ** 2).min()
        errors.append(abs(float(-entropy(x, temperature) + constant - envelope)))
    assert errors[1] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.2)  # the rest is proportional to the temperature


@at
def test_laplace_value_is_near_the_integral_for_a_narrow_neighbourhood(x):
    def value(gamma):
        exact = torch.trapezoid(torch.exp(-bumpy(POINTS) - gamma / 2 * (x - POINTS) ** 2), POINTS).log()
        laplace = flatness.local_entropy(
            lambda params: bumpy(params["x"]), {"x": as_float(x)}, EntropySurrogate(gamma=gamma, num_steps=1)
        ).value
        return abs(float(laplace - exact))

    # The first term left out is of order 1 / gamma^2.
    assert value(400.0) < 1e-4
    assert value(400.0) < 0.35 * value(200.0)


# --- entropy and Hessian -------------------------------------------------------------------------------------------


def volume(matrix, gamma):
    """Return S = 1/2 ln det(I + H / gamma)."""
    return 0.5 * torch.linalg.slogdet(EYE + matrix / gamma)[1]


def test_entropy_at_a_stationary_point_is_loss_plus_volume():
    matrix, gamma = MATRIX @ MATRIX, 2.0
    params = {name: torch.zeros_like(param) for name, param in quadratic_params().items()}
    value = flatness.local_entropy(
        lambda params: quadratic(matrix)(params) + 0.3,
        params,
        EntropySurrogate(gamma=gamma, num_steps=1),
        num_matvecs=4000,
        generator=generator(),
    ).value
    expected = -0.3 - volume(matrix, gamma) + 2 * math.log(2 * math.pi / gamma)
    torch.testing.assert_close(value, expected, rtol=0, atol=0.03)


def test_volume_is_a_saturating_trace_penalty():
    matrix = MATRIX @ MATRIX
    traces = matrix.trace(), (matrix @ matrix).trace()

    def error(gamma):
        return abs(volume(matrix, gamma) - (traces[0] / (2 * gamma) - traces[1] / (4 * gamma**2)))

    assert error(2000.0) < 1e-5
    assert float(error(2000.0)) == pytest.approx(float(error(1000.0)) / 8, rel=0.05)
    slopes = [
        difference(lambda scale, size=size: volume(size * scale * matrix, 1.0), as_float(1.0)) / size
        for size in (0.01, 1.0, 100.0)
    ]
    assert slopes[0] > slopes[1] > slopes[2] > 0


@pytest.mark.parametrize("gamma", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(5))
def test_volume_bounds_trace_and_top_eigenvalue_and_is_bounded_by_them(seed, gamma):
    root = torch.randn(4, 4, dtype=torch.float64, generator=generator(seed))
    matrix = root @ root.mT
    top, trace, c = torch.linalg.eigvalsh(matrix)[-1], matrix.trace(), volume(matrix, gamma)
    assert top < trace <= gamma * torch.expm1(2 * c)
    assert c <= trace / (2 * gamma)
    assert c <= 2 * torch.log1p(top / gamma)  # d / 2 = 2


def test_bound_is_attained_by_a_single_positive_eigenvalue():
    for top in (0.1, 5.0, 400.0):
        matrix = torch.diag(torch.tensor([top, 0.0, 0.0, 0.0], dtype=torch.float64))
        assert float(2.0 * torch.expm1(2 * volume(matrix, 2.0))) == pytest.approx(top)


def test_bound_fails_with_negative_curvature():
    matrix = torch.diag(torch.tensor([6.0, -1.8, -1.8, 0.0], dtype=torch.float64))
    assert volume(matrix, 2.0) < 0  # yet the top eigenvalue is 6


# --- the surrogate -------------------------------------------------------------------------------------------------


@at
def test_surrogate_has_the_gradient_of_the_entropy_but_not_its_value(x):
    x = as_float(x)
    mean = {"x": mean_of(POINTS, density(x)[0])}
    gradient, value = torch.func.grad_and_value(lambda x: entropy_surrogate({"x": x}, mean, gamma=GAMMA))(x)
    torch.testing.assert_close(gradient, -difference(entropy, x), rtol=1e-6, atol=1e-8)
    assert value >= 0 and abs(value + entropy(x)) > 0.01


def test_chain_finds_the_mean_of_a_loss_that_is_not_quadratic():
    x = 0.4
    params = {"x": torch.full((2000,), x, dtype=torch.float64)}  # 2000 chains at once
    chain = EntropySurrogate(gamma=GAMMA, num_steps=400, step_size=0.02, temperature=TEMPERATURE)
    noise = chain.sample_noise(params, generator())
    means = chain.mean(lambda params: bumpy(params["x"]).sum(), params, noise)["x"]
    gradients = GAMMA * (x - means)
    exact = -difference(entropy, as_float(x))
    assert (gradients.mean() - exact).abs() < 4 * gradients.std() / 2000**0.5 + 0.05  # of the step size


# --- regularized meta-training -------------------------------------------------------------------------------------


def train(log_step, start, num_steps, loss_fn, keep_graph=True):
    """Descend with a learned step size; return all points."""
    points = [start]
    for _ in range(num_steps):
        gradient = torch.func.grad(loss_fn)(points[-1])
        points.append(points[-1] - log_step.exp() * (gradient if keep_graph else gradient.detach()))
    return points


def sensitivities(log_step, start, num_steps):
    """Return ``d x_t / d w`` by the recursion of the page."""
    points = train(log_step, start, num_steps, bumpy)
    chain = [torch.zeros(())]
    for point in points[:-1]:
        step = log_step.exp()
        chain.append((1 - step * curvature(point)) * chain[-1] - step * slope(point))
    return torch.stack(points), torch.stack(chain)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_meta_gradient_of_the_entropy_is_its_gradient_times_the_sensitivity(num_steps):
    log_step, start = as_float(math.log(0.2)), as_float(1.1)
    points, chain = sensitivities(log_step, start, num_steps)
    by_differences = difference(lambda w: -entropy(train(w, start, num_steps, bumpy)[-1]), log_step, 1e-4)
    mean = {"x": mean_of(POINTS, density(points[-1])[0])}

    def penalty(w):  # the mean is held fixed: no graph through the integral, or through a chain
        return entropy_surrogate({"x": train(w, start, num_steps, bumpy)[-1]}, mean, gamma=GAMMA)

    by_surrogate = torch.func.grad(penalty)(log_step)
    by_formula = GAMMA * (points[-1] - mean["x"]) * chain[-1]
    torch.testing.assert_close(by_formula, by_differences, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(by_surrogate, by_formula, rtol=1e-9, atol=1e-12)


def test_truncation_leaves_out_what_earlier_steps_did():
    log_step, start = as_float(math.log(0.2)), as_float(1.1)
    points, chain = sensitivities(log_step, start, 6)
    whole = curvature(points[6]).abs() * chain[6]  # of the loss |f''|, say: any factor
    _, from_the_middle = sensitivities(log_step, points[3], 3)
    carried = math.prod(float(1 - log_step.exp() * curvature(point)) for point in points[3:6])
    missing = curvature(points[6]).abs() * carried * chain[3]
    torch.testing.assert_close(curvature(points[6]).abs() * from_the_middle[3] + missing, whole)
    assert abs(missing) > 0.05 * abs(whole)


def test_wide_entropy_prefers_longer_steps_than_the_loss():
    spectrum = torch.tensor([0.01, 0.05, 0.3, 1.2], dtype=torch.float64)
    # Late in training: as much of the loss is left in every direction, and the noise is that of gradients.
    start, variances = spectrum.rsqrt(), spectrum
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)  # a noise with few values

    def best_step(gamma):
        """Return the step that minimises the mean of -G, or of the loss for ``None``: a parabola through three."""

        def mean(step):
            points = start - step * (spectrum * start + signs * variances.sqrt())
            if gamma is None:
                return float((0.5 * spectrum * points**2).sum(1).mean())
            lowest = gamma * points / (spectrum + gamma)
            return float((0.5 * spectrum * lowest**2 + 0.5 * gamma * (points - lowest) ** 2).sum(1).mean())

        before, middle, after = mean(-1.0), mean(0.0), mean(1.0)
        return 0.5 * (before - after) / (before - 2 * middle + after)

    def formula(weights):
        signal = spectrum**2 * start**2
        return float((weights * signal).sum() / (weights * spectrum * (signal + variances)).sum())

    assert best_step(None) == pytest.approx(formula(torch.ones_like(spectrum)))
    steps = [best_step(gamma) for gamma in (0.03, 1.0, 100.0)]
    assert steps == pytest.approx([formula(gamma / (gamma + spectrum)) for gamma in (0.03, 1.0, 100.0)])
    assert steps[0] > steps[1] > steps[2] > best_step(None)
    assert steps[0] > 1.5 * best_step(None)


def test_without_second_derivatives_the_curvature_of_the_path_drops_out():
    log_step, start = as_float(math.log(0.2)), as_float(1.1)
    found = torch.func.grad(lambda w: train(w, start, 4, bumpy, keep_graph=False)[-1])(log_step)
    points = train(log_step, start, 4, bumpy)
    torch.testing.assert_close(found, -log_step.exp() * sum(slope(point) for point in points[:-1]))


@pytest.mark.parametrize("measure", [HutchinsonTrace(num_matvecs=3), TopEigenvalue()])
def test_a_hessian_penalty_acts_through_third_derivatives_only(measure):
    params = {"x": flat(quadratic_params())}
    noise = measure.sample_noise(params, generator())

    def penalty(log_step, loss_fn):
        return measure(loss_fn, {"x": train(log_step, params["x"], 3, lambda x: loss_fn({"x": x}))[-1]}, noise)

    log_step = as_float(math.log(0.05))
    assert torch.func.grad(penalty)(log_step, quadratic()) == 0
    assert abs(torch.func.grad(penalty)(log_step, lambda params: bumpy(params["x"]).sum())) > 1e-3
    surrogate = EntropySurrogate(gamma=5.0, temperature=0.0)
    noise = surrogate.sample_noise(params)

    def entropy_penalty(log_step):
        point = train(log_step, params["x"], 3, lambda x: quadratic()({"x": x}))[-1]
        return surrogate(quadratic(), {"x": point}, noise)

    assert abs(torch.func.grad(entropy_penalty)(log_step)) > 1e-3


def test_evolution_strategies_see_the_smoothed_objective():
    std, x = 0.3, as_float(0.5)
    noise = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    normal = torch.exp(-(noise**2) / 2) / math.sqrt(2 * math.pi)

    def smoothed(x):
        return torch.trapezoid(bumpy(x + std * noise) * normal, noise)

    antithetic = torch.trapezoid((bumpy(x + std * noise) - bumpy(x - std * noise)) / (2 * std) * noise * normal, noise)
    torch.testing.assert_close(antithetic, difference(smoothed, x), rtol=1e-6, atol=1e-9)
    small = 0.02
    second_order = bumpy(x) + small**2 / 2 * curvature(x)
    of_small = torch.trapezoid(bumpy(x + small * noise) * normal, noise)
    assert abs(of_small - second_order) < 1e-3 * abs(of_small - bumpy(x))


# --- perturbation gap ----------------------------------------------------------------------------------------------


def test_perturbation_gap_is_half_the_scaled_diagonal_to_second_order():
    loss_fn, params = network()
    dimension = flat(params).numel()
    # Plus and minus sqrt(d) times each unit vector: mean zero, covariance the identity, no third moments.
    rows = dimension**0.5 * torch.cat([torch.eye(dimension), -torch.eye(dimension)]).double()
    pieces = rows.split([param.numel() for param in params.values()], dim=1)
    noise = {
        name: piece.reshape(2 * dimension, *param.shape)
        for (name, param), piece in zip(params.items(), pieces, strict=True)
    }
    scale = flat({name: param.square().mean().sqrt().expand(param.shape) for name, param in params.items()})
    second_order = 0.5 * (scale.square() * explicit_hessian(loss_fn, params).diag()).sum()
    errors = []
    for radius in (0.01, 0.005):
        gap = PerturbationGap(radius=radius, num_perturbations=2 * dimension)(loss_fn, params, noise)
        errors.append(abs(float(gap / radius**2 - second_order)))
    assert errors[1] < 0.01 * abs(second_order)
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.1)


def test_perturbation_gap_and_entropy_have_the_same_first_term():
    matrix, gamma = MATRIX @ MATRIX, 1e4
    params = {"x": torch.ones(4, dtype=torch.float64)}  # rms 1, so that radius^2 = 1 / gamma
    measure = PerturbationGap(radius=gamma**-0.5, num_perturbations=20_000)
    noise = {"x": torch.randn(10_000, 4, dtype=torch.float64, generator=generator())}
    noise = {"x": torch.cat([noise["x"], -noise["x"]])}
    gap = measure(quadratic(matrix), params, noise)
    assert float(gap) == pytest.approx(float(volume(matrix, gamma)), rel=0.05)


# --- the page itself -----------------------------------------------------------------------------------------------


def test_every_formula_of_the_page_names_a_test_that_exists():
    text = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
    after = re.split(r"^\$\$\n.*?^\$\$\n", text, flags=re.MULTILINE | re.DOTALL)[1:]
    assert len(after) >= 15
    for passage in after:
        assert "{test}" not in passage
        assert re.match(r"\n?Tests?: `tests/", passage), passage[:200]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= len(after)
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)
