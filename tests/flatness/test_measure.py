"""What holds for every measure and for every function."""

from __future__ import annotations

import pytest
import torch
from flatness.problems import directional_derivative, generator, network, quadratic, quadratic_params

from flatopt import flatness
from flatopt.flatness import (
    EntropySurrogate,
    FlatnessMeasure,
    GradientNorm,
    HutchinsonTrace,
    PerturbationGap,
    SamGap,
    SpectralPenalty,
    SquaredTrace,
    TopEigenvalue,
)

MEASURES = [
    GradientNorm(),
    HutchinsonTrace(num_matvecs=2),
    SquaredTrace(num_matvecs=2),
    TopEigenvalue(num_iterations=5),
    TopEigenvalue(num_iterations=5, tol=0.0),
    TopEigenvalue(num_iterations=30, tol=1e-2),
    EntropySurrogate(num_steps=4),
    SpectralPenalty(num_matvecs=2, num_lanczos=4),
    SpectralPenalty(function="positive", num_lanczos=4),
    SamGap(),
    PerturbationGap(num_perturbations=2),
]
RANDOM = [measure for measure in MEASURES if not isinstance(measure, (GradientNorm, SamGap))]
NON_NEGATIVE = [
    GradientNorm(),
    SquaredTrace(),
    TopEigenvalue(),
    EntropySurrogate(),
    SpectralPenalty(),
]
FUNCTIONS = {
    "top_eigenvalue": lambda loss_fn, params, g: flatness.top_eigenvalue(
        loss_fn, params, num_iterations=2, generator=g
    ),
    "hutchinson_trace": lambda loss_fn, params, g: flatness.hutchinson_trace(
        loss_fn, params, num_matvecs=2, generator=g
    ),
    "spectral_density": lambda loss_fn, params, g: (
        flatness.spectral_density(loss_fn, params, num_matvecs=2, num_lanczos=4, generator=g).density
    ),
    "local_entropy": lambda loss_fn, params, g: flatness.local_entropy(
        loss_fn, params, EntropySurrogate(gamma=50.0, num_steps=3), generator=g
    ).gradient["w1"],
}
ids = [repr(measure) for measure in MEASURES]
COLD = EntropySurrogate(temperature=0.0)


def stacked_tasks(count=3):
    """Parameters of several networks, stacked; they share one loss."""
    loss_fn, _ = network()
    tasks = [network(seed)[1] for seed in range(count)]
    return loss_fn, tasks, {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}


def noise_of(noise, index):
    return {name: value[:, index] for name, value in noise.items()}


@pytest.mark.parametrize("measure", MEASURES, ids=ids)
def test_vmap_equals_a_loop_in_value_and_gradient(measure):
    loss_fn, tasks, stacked = stacked_tasks()
    noise = measure.sample_noise(stacked, generator())

    def penalty(params, noise):
        return measure(loss_fn, params, noise)

    values = torch.func.vmap(penalty, in_dims=(0, 1))(stacked, noise)
    grads = torch.func.vmap(torch.func.grad(penalty), in_dims=(0, 1))(stacked, noise)
    for index, task in enumerate(tasks):
        torch.testing.assert_close(values[index], penalty(task, noise_of(noise, index)))
        expected = torch.func.grad(penalty)(task, noise_of(noise, index))
        torch.testing.assert_close({name: grad[index] for name, grad in grads.items()}, expected)


@pytest.mark.parametrize("measure", MEASURES, ids=ids)
def test_autograd_through_vmap_equals_autograd_of_each(measure):
    loss_fn, tasks, stacked = stacked_tasks()
    noise = measure.sample_noise(stacked, generator())
    directions = {name: torch.ones_like(value) for name, value in stacked.items()}

    def total(stacked):
        return torch.func.vmap(lambda p, n: measure(loss_fn, p, n), in_dims=(0, 1))(stacked, noise).sum()

    expected = sum(
        directional_derivative(
            lambda params, index=index: measure(loss_fn, params, noise_of(noise, index)),
            task,
            {name: torch.ones_like(value) for name, value in task.items()},
        )
        for index, task in enumerate(tasks)
    )
    torch.testing.assert_close(directional_derivative(total, stacked, directions), expected)


@pytest.mark.parametrize("measure", MEASURES, ids=ids)
def test_meta_gradient_reaches_what_an_unrolled_loss_closes_over(measure):
    loss_fn, params = network()
    noise = measure.sample_noise(params, generator())
    log_lr = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def objective(log_lr):
        moved = params
        for _ in range(2):
            grads = torch.func.grad(loss_fn)(moved)
            moved = {name: param - log_lr.exp() * grads[name] for name, param in moved.items()}
        return measure(loss_fn, moved, noise)

    (slope,) = torch.autograd.grad(objective(log_lr), log_lr)
    assert slope.isfinite() and slope.abs() > 1e-6
    if not isinstance(
        measure, (EntropySurrogate, SamGap, PerturbationGap, SpectralPenalty, TopEigenvalue)
    ):  # these hold a part fixed
        with torch.no_grad():
            difference = (objective(log_lr + 1e-5) - objective(log_lr - 1e-5)) / 2e-5
        torch.testing.assert_close(slope.detach(), difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("measure", RANDOM, ids=repr)
def test_noise_is_fresh_in_each_call_and_repeats_with_the_seed(measure):
    loss_fn, params = network()
    g = generator()
    first, second = (measure.sample_noise(params, g) for _ in range(2))
    again = measure.sample_noise(params, generator())
    assert not torch.equal(first["w1"], second["w1"])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert torch.equal(measure(loss_fn, params, first), measure(loss_fn, params, again))
    assert all(value.shape[1:] == params[name].shape for name, value in first.items())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_use_fresh_probes_and_repeat_with_the_seed(name):
    loss_fn, params = network()
    g = generator()
    first, second, again = (FUNCTIONS[name](loss_fn, params, which) for which in (g, g, generator()))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("measure", NON_NEGATIVE, ids=repr)
def test_non_negative_where_the_hessian_is_negative_definite(measure):
    loss_fn = quadratic(-torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64)))
    for seed in range(3):
        params = quadratic_params(seed)
        assert measure(loss_fn, params, measure.sample_noise(params, generator(seed))) > 0


@pytest.mark.parametrize("measure", MEASURES, ids=ids)
def test_measures_are_final_frozen_and_take_keywords_only(measure):
    assert isinstance(measure, FlatnessMeasure) and type(measure).__mro__[1] is FlatnessMeasure
    with pytest.raises(AttributeError):
        measure.tol = 1.0
    with pytest.raises(TypeError):
        type(measure)(1)


@pytest.mark.parametrize("measure", MEASURES, ids=ids)
def test_zero_dimensional_and_empty_tensors_are_parameters(measure):
    params = {"x": torch.tensor(0.7), "none": torch.zeros(0, 3)}
    value = measure(lambda params: params["x"].cosh() + params["none"].sum(), params, measure.sample_noise(params))
    assert value.shape == () and value.isfinite()


@pytest.mark.parametrize("params", [{}, {"none": torch.zeros(0)}], ids=["no tensor", "no scalar"])
@pytest.mark.parametrize("name", [*FUNCTIONS, "gradient_norm", "sam_gap", "hvp"])
def test_no_parameter_is_an_error(name, params):
    def call(loss_fn):
        if name in FUNCTIONS:
            return FUNCTIONS[name](loss_fn, params, None)
        return getattr(flatness, name)(loss_fn, params, *([params] if name == "hvp" else []))

    with pytest.raises(ValueError, match="at least one scalar"):
        call(lambda params: torch.tensor(1.0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_that_is_not_a_scalar_is_an_error(name):
    _, params = network()
    with pytest.raises(ValueError, match=r"0-D tensor, got shape \(4,\)"):
        FUNCTIONS[name](lambda params: params["b1"], params, None)


def test_integer_parameters_are_an_error():
    with pytest.raises(ValueError, match="real floating point tensors, got 'x' with dtype torch.int64"):
        flatness.hutchinson_trace(lambda params: params["x"].sum(), {"x": torch.ones(2, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EntropySurrogate(gamma=0.0), "gamma must be > 0, got 0.0"),
        (lambda: EntropySurrogate(num_steps=0), "num_steps must be > 0, got 0"),
        (lambda: EntropySurrogate(step_size=float("nan")), "step_size must be > 0, got nan"),
        (lambda: EntropySurrogate(temperature=-1.0), "temperature must be >= 0, got -1.0"),
        (lambda: HutchinsonTrace(num_matvecs=0), "num_matvecs must be > 0, got 0"),
        (lambda: SquaredTrace(num_matvecs=0), "num_matvecs must be > 0, got 0"),
        (lambda: TopEigenvalue(num_iterations=0), "num_iterations must be > 0, got 0"),
        (lambda: TopEigenvalue(tol=-1.0), "tol must be >= 0, got -1.0"),
        (lambda: SamGap(rho=0.0), "rho must be > 0, got 0.0"),
        (lambda: PerturbationGap(radius=-0.1), "radius must be > 0, got -0.1"),
        (lambda: PerturbationGap(num_perturbations=0), "num_perturbations must be > 0, got 0"),
        (lambda: flatness.local_entropy(*network(), COLD), "temperature must be > 0, got 0.0"),
        (lambda: flatness.spectral_density(*network(), num_lanczos=0), "num_lanczos must be > 0, got 0"),
        (lambda: flatness.spectral_density(*network(), num_points=1), "num_points must be > 1, got 1"),
        (lambda: flatness.top_eigenvalue(*network(), which="top"), "which must be 'magnitude' or 'algebraic'"),
    ],
)
def test_values_out_of_range_are_refused_with_value_and_bound(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_a_cpu_generator_gives_the_same_noise_on_a_gpu():
    params = {"x": torch.zeros(5)}
    on_gpu = HutchinsonTrace().sample_noise({"x": params["x"].cuda()}, generator())
    assert on_gpu["x"].is_cuda
    torch.testing.assert_close(on_gpu["x"].cpu(), HutchinsonTrace().sample_noise(params, generator())["x"])
