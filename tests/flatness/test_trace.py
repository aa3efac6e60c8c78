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
from flatopt.flatness import HutchinsonTrace, SquaredTrace

ESTIMATED = [(HutchinsonTrace, lambda hessian: hessian), (SquaredTrace, lambda hessian: hessian @ hessian)]


@pytest.mark.parametrize(("measure_type", "power"), ESTIMATED)
def test_mean_over_probes_is_the_trace_within_four_standard_errors(measure_type, power):
    loss_fn, params = network()
    expected = power(explicit_hessian(loss_fn, params)).trace() / 27
    measure, probes = measure_type(num_matvecs=1), generator()
    draws = torch.stack([measure(loss_fn, params, measure.sample_noise(params, probes)) for _ in range(400)])
    standard_error = draws.std() / len(draws) ** 0.5
    assert standard_error < 0.1 * expected.abs()  # else the next line could not fail
    assert (draws.mean() - expected).abs() < 4 * standard_error


@pytest.mark.parametrize(("measure_type", "power"), ESTIMATED)
def test_all_sign_vectors_together_give_the_trace_exactly(measure_type, power):
    params = quadratic_params()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    noise = {"a": signs[:, :3, None], "empty": signs[:, :0], "b": signs[:, 3]}
    value = measure_type(num_matvecs=16)(quadratic(), params, noise)
    torch.testing.assert_close(value, power(MATRIX).trace() / 4)


def test_function_is_the_trace_itself_exact_for_a_diagonal_hessian():
    params = quadratic_params()
    trace = flatness.hutchinson_trace(quadratic(MATRIX.diag().diag()), params, num_matvecs=1)
    torch.testing.assert_close(trace, MATRIX.trace())


def test_squared_trace_is_positive_where_the_trace_is_negative():
    params, loss_fn = quadratic_params(), quadratic(-torch.eye(4, dtype=torch.float64))
    noise = HutchinsonTrace().sample_noise(params)
    assert HutchinsonTrace()(loss_fn, params, noise) == -1
    assert SquaredTrace()(loss_fn, params, noise) == 1


@pytest.mark.parametrize("measure", [HutchinsonTrace(num_matvecs=3), SquaredTrace(num_matvecs=3)])
def test_gradient_agrees_with_finite_differences(measure):
    loss_fn, params = network()
    noise = measure.sample_noise(params, generator(1))
    direction = network(seed=2)[1]

    def penalty(params):
        return measure(loss_fn, params, noise)

    expected = finite_difference(penalty, params, direction)
    actual = directional_derivative(penalty, params, direction)
    assert actual.abs() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
