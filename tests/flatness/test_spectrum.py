from __future__ import annotations

import pytest
import torch
from flatness.problems import (
    MATRIX,
    directional_derivative,
    explicit_hessian,
    finite_difference,
    generator,
    like,
    network,
    quadratic,
    quadratic_params,
)

from flatopt import flatness
from flatopt.flatness._lanczos import lanczos


def test_full_lanczos_reproduces_matrix_and_eigenvalues():
    factor, start = torch.randn(2, 22, 22, dtype=torch.float64, generator=generator())
    hessian = factor + factor.mT
    *_, krylov = lanczos(hessian.mv, start[0], 22)
    identity = torch.eye(22, dtype=torch.float64)
    torch.testing.assert_close(krylov.basis @ krylov.basis.mT, identity)
    torch.testing.assert_close(krylov.basis @ hessian @ krylov.basis.mT, krylov.tridiagonal)
    torch.testing.assert_close(torch.linalg.eigvalsh(krylov.tridiagonal), torch.linalg.eigvalsh(hessian))


def test_reorthogonalisation_keeps_the_basis_orthonormal_in_float32():
    levels = torch.logspace(-6, 3, 300)
    *_, krylov = lanczos(lambda vector: levels * vector, torch.randn(300, generator=generator()), 100)
    torch.testing.assert_close(krylov.basis @ krylov.basis.mT, torch.eye(100), rtol=0, atol=1e-5)


def test_breakdown_gives_zeros_and_exact_ritz_values():
    levels = torch.tensor([3.0, 3.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    *_, krylov = lanczos(lambda vector: levels * vector, torch.ones(5, dtype=torch.float64), 5)
    assert (krylov.basis[2:] == 0).all() and (krylov.tridiagonal[2:] == 0).all()
    expected = torch.tensor([-1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(krylov.tridiagonal[:2, :2]), expected)


@pytest.mark.parametrize("num_lanczos", [27, 80])
def test_quadrature_with_all_steps_is_exact_in_each_probe(num_lanczos):
    loss_fn, params = network()
    hessian = explicit_hessian(loss_fn, params)
    measure = flatness.HutchinsonTrace(num_matvecs=3)
    noise = measure.sample_noise(params, generator(5))  # the same probes, by the same seed
    nodes, weights = flatness.spectral_quadrature(
        loss_fn, params, num_matvecs=3, num_lanczos=num_lanczos, generator=generator(5)
    )
    starts = torch.cat([value.reshape(3, -1) for value in noise.values()], 1) / 27**0.5
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    for power in range(1, 6):
        moments = torch.einsum("ni,ij,nj->n", starts, torch.linalg.matrix_power(hessian, power), starts)
        torch.testing.assert_close((weights * nodes**power).sum(1), moments)
    exponentials = torch.einsum("ni,ij,nj->n", starts, torch.linalg.matrix_exp(hessian), starts)
    torch.testing.assert_close((weights * nodes.exp()).sum(1), exponentials)


def test_few_steps_are_exact_for_low_moments_only():
    loss_fn, params = network()
    full, few = (
        flatness.spectral_quadrature(loss_fn, params, num_matvecs=1, num_lanczos=steps, generator=generator())
        for steps in (27, 3)
    )

    def moment(rule, power):
        return (rule.weights * rule.nodes**power).sum()

    for power in range(1, 6):  # up to 2 * 3 - 1
        torch.testing.assert_close(moment(few, power), moment(full, power))
    assert (moment(few, 6) / moment(full, 6) - 1).abs() > 1e-6


@pytest.mark.parametrize("function", ["magnitude", "positive"])
def test_penalty_is_the_mean_of_the_eigenvalues_and_its_gradient_that_of_their_sum(function):
    chosen = {"magnitude": torch.abs, "positive": torch.relu}[function]
    loss_fn, params = network()
    measure = flatness.SpectralPenalty(function=function, num_matvecs=27, num_lanczos=27)
    # Probes whose outer products have the mean that those of random signs are expected to have: the identity.
    rows = [like(row, params) for row in 27**0.5 * torch.eye(27, dtype=torch.float64)]
    noise = {name: torch.stack([row[name] for row in rows]) for name in params}

    def exact(params):
        return chosen(torch.linalg.eigvalsh(explicit_hessian(loss_fn, params))).mean()

    torch.testing.assert_close(measure(loss_fn, params, noise), exact(params), rtol=1e-6, atol=0)
    direction = {name: torch.ones_like(param) for name, param in params.items()}
    slope = directional_derivative(lambda moved: measure(loss_fn, moved, noise), params, direction)
    torch.testing.assert_close(slope, finite_difference(exact, params, direction), rtol=1e-5, atol=1e-7)


def test_positive_part_of_a_negative_definite_hessian_is_nothing():
    params, negative = quadratic_params(), quadratic(-torch.eye(4, dtype=torch.float64))
    measure = flatness.SpectralPenalty(function="positive")
    assert measure(negative, params, measure.sample_noise(params, generator())) == 0


def test_penalty_of_one_probe_is_that_of_the_quadrature_rule():
    params, loss_fn = quadratic_params(), quadratic()
    measure = flatness.SpectralPenalty(num_lanczos=2)
    value = measure(loss_fn, params, measure.sample_noise(params, generator(3)))
    nodes, weights = flatness.spectral_quadrature(loss_fn, params, num_matvecs=1, num_lanczos=2, generator=generator(3))
    torch.testing.assert_close(value, (weights * nodes.abs()).sum())


def test_density_integrates_to_one_and_has_the_moments_of_the_spectrum():
    params = quadratic_params()
    levels = MATRIX.diag().diag()  # diagonal: each probe gives trace and trace of the square without noise
    grid, density = flatness.spectral_density(quadratic(levels), params, num_matvecs=4, width=1e-3, num_points=20_000)
    assert (density >= 0).all()
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.tensor(1.0, dtype=torch.float64))
    for power in (1, 2):
        expected = (MATRIX.diag() ** power).mean()
        torch.testing.assert_close(torch.trapezoid(density * grid**power, grid), expected, rtol=1e-3, atol=1e-3)


def test_density_of_a_single_eigenvalue_is_one_peak_there():
    grid, density = flatness.spectral_density(quadratic(2 * torch.eye(4, dtype=torch.float64)), quadratic_params())
    assert (grid[density.argmax()] - 2).abs() <= grid[1] - grid[0]
    assert density.isfinite().all()


def test_a_diverged_loss_gives_nan_not_an_exception():
    loss_fn, params = network()
    nodes, _ = flatness.spectral_quadrature(lambda params: torch.nan * loss_fn(params), params, num_matvecs=1)
    assert nodes.isnan().all()


def test_plot_draws_the_density_on_given_axes():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    grid, density = flatness.spectral_density(quadratic(), quadratic_params())
    assert flatness.plot_spectral_density(grid, density, ax=ax) is ax
    torch.testing.assert_close(torch.tensor(ax.lines[0].get_xdata()), grid)
    assert ax.get_yscale() == "log"
    plt.close(figure)
    fresh = flatness.plot_spectral_density(grid, density)
    plt.close(fresh.figure)
