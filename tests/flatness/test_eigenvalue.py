from __future__ import annotations

import pytest
import torch
from flatness.problems import (
    MATRIX,
    directional_derivative,
    explicit_hessian,
    finite_difference,
    generator,
    network,
    quadratic,
    quadratic_params,
)

from flatopt import flatness
from flatopt.flatness import TopEigenvalue


@pytest.mark.parametrize("seed", range(3))
def test_both_ends_agree_with_eigvalsh_on_a_network(seed):
    loss_fn, params = network(seed)
    values = torch.linalg.eigvalsh(explicit_hessian(loss_fn, params))
    largest = flatness.top_eigenvalue(loss_fn, params, which="algebraic", tol=0.0, generator=generator())
    dominant = flatness.top_eigenvalue(loss_fn, params, tol=0.0, generator=generator())
    torch.testing.assert_close(largest, values[-1])
    torch.testing.assert_close(dominant, values[values.abs().argmax()])


def test_the_eigenvalue_largest_in_magnitude_may_be_negative():
    values = torch.linalg.eigvalsh(-MATRIX)
    assert values[0] < -values[-1]
    params, loss_fn = quadratic_params(), quadratic(-MATRIX)
    torch.testing.assert_close(flatness.top_eigenvalue(loss_fn, params, tol=0.0), values[0])
    torch.testing.assert_close(flatness.top_eigenvalue(loss_fn, params, tol=0.0, which="algebraic"), values[-1])
    noise = TopEigenvalue().sample_noise(params)
    torch.testing.assert_close(TopEigenvalue(tol=0.0)(loss_fn, params, noise), -values[0])


@pytest.mark.parametrize("level", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("which", ["magnitude", "algebraic"])
def test_breakdown_after_one_step_is_handled(level, which):
    params, loss_fn = quadratic_params(), quadratic(level * torch.eye(4, dtype=torch.float64))
    value = flatness.top_eigenvalue(loss_fn, params, tol=0.0, which=which)
    torch.testing.assert_close(value, torch.tensor(level, dtype=torch.float64))


def test_a_negative_definite_hessian_with_breakdown_has_a_negative_largest_eigenvalue():
    levels = torch.tensor([-5.0, -5.0, -2.0, -2.0], dtype=torch.float64)  # the Krylov space has dimension 2
    value = flatness.top_eigenvalue(quadratic(levels.diag()), quadratic_params(), tol=0.0, which="algebraic")
    torch.testing.assert_close(value, levels[-1])


@pytest.mark.parametrize("which", ["magnitude", "algebraic"])
def test_gradient_agrees_with_finite_differences_of_the_explicit_eigenvalue(which):
    loss_fn, params = network()
    direction = network(seed=2)[1]

    def oracle(params):
        values = torch.linalg.eigvalsh(explicit_hessian(loss_fn, params))
        return values[-1] if which == "algebraic" else values[values.abs().argmax()]

    def estimate(params):
        return flatness.top_eigenvalue(loss_fn, params, tol=0.0, which=which, generator=generator())

    actual = directional_derivative(estimate, params, direction)
    assert actual.abs() > 1e-3
    torch.testing.assert_close(actual, finite_difference(oracle, params, direction), rtol=1e-5, atol=1e-7)


def test_the_vector_is_found_without_a_graph():
    loss_fn, params = network()
    leaves = {name: param.requires_grad_() for name, param in params.items()}
    measure, start = TopEigenvalue(), torch.ones(27, dtype=torch.float64)
    with torch.no_grad():
        assert not measure._eigenvector(loss_fn, leaves, start, "magnitude").requires_grad
    assert measure(loss_fn, leaves, measure.sample_noise(leaves)).requires_grad


def test_the_relative_change_stops_the_iteration():
    evaluations = []
    params = {"x": torch.ones(200, dtype=torch.float64)}
    levels = torch.cat([torch.linspace(0, 1, 199, dtype=torch.float64), torch.tensor([50.0], dtype=torch.float64)])

    class Counted(torch.autograd.Function):
        """Identity that counts backward passes."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            evaluations.append(1)
            return grad

    def loss_fn(params):
        return 0.5 * (levels * Counted.apply(params["x"]).square()).sum()

    def count(**settings):
        evaluations.clear()
        value = flatness.top_eigenvalue(loss_fn, params, generator=generator(), **settings)
        torch.testing.assert_close(value, levels[-1], rtol=1e-3, atol=0)
        return len(evaluations)

    assert count(tol=1e-3) < count(tol=0.0, num_iterations=30) / 2


def test_value_never_exceeds_the_truth():
    loss_fn, params = network()
    truth = torch.linalg.eigvalsh(explicit_hessian(loss_fn, params)).abs().max()
    for seed in range(5):
        measure = TopEigenvalue(num_iterations=2)
        value = measure(loss_fn, params, measure.sample_noise(params, generator(seed)))
        assert 0 < value < truth


def test_a_diverged_loss_gives_nan():
    loss_fn, params = network()
    assert flatness.top_eigenvalue(lambda params: torch.nan * loss_fn(params), params).isnan()
