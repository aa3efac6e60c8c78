from __future__ import annotations

import pytest
import torch
from flatness.problems import (
    MATRIX,
    directional_derivative,
    explicit_hessian,
    finite_difference,
    flat,
    generator,
    like,
    network,
    quadratic,
    quadratic_params,
)

from flatopt import flatness
from flatopt.flatness import MeanLoss


def unit_vectors(params):
    count = flat(params).numel()
    return [like(row, params) for row in torch.eye(count, dtype=torch.float64)]


@pytest.mark.parametrize(
    ("loss_fn", "params"), [(quadratic(), quadratic_params()), network()], ids=["quadratic", "network"]
)
def test_hvp_with_unit_vectors_is_the_explicit_hessian(loss_fn, params):
    columns = [flat(flatness.hvp(loss_fn, params, vector)) for vector in unit_vectors(params)]
    torch.testing.assert_close(torch.stack(columns), explicit_hessian(loss_fn, params))


def test_hvp_keeps_shapes_and_accepts_another_order_of_names():
    params = quadratic_params()
    vector = quadratic_params(seed=1)
    product = flatness.hvp(quadratic(), params, dict(reversed(vector.items())))
    assert {name: value.shape for name, value in product.items()} == {name: p.shape for name, p in params.items()}
    torch.testing.assert_close(flat(product), MATRIX @ flat(vector))


def test_hvp_can_be_differentiated_in_params_and_vector():
    loss_fn, params = network()
    vector, direction = (like(torch.randn(27, dtype=torch.float64, generator=generator(s)), params) for s in (1, 2))

    def through_params(params):
        return flat(flatness.hvp(loss_fn, params, vector)).square().sum()

    def through_vector(vector):
        return flat(flatness.hvp(loss_fn, params, vector)).square().sum()

    for function, point in [(through_params, params), (through_vector, vector)]:
        expected = finite_difference(function, point, direction)
        torch.testing.assert_close(directional_derivative(function, point, direction), expected, rtol=1e-6, atol=1e-8)


def test_hvp_of_an_unrolled_training_is_its_explicit_hessian():
    loss_fn, params = network()

    def unrolled(params):
        for _ in range(3):
            grads = torch.func.grad(loss_fn)(params)
            params = {name: param - 0.5 * grads[name] for name, param in params.items()}
        return loss_fn(params)

    vector = like(torch.randn(27, dtype=torch.float64, generator=generator()), params)
    actual = flat(flatness.hvp(unrolled, params, vector))
    torch.testing.assert_close(actual, explicit_hessian(unrolled, params) @ flat(vector))


def test_gradient_norm_is_that_of_autograd_over_all_tensors():
    params = quadratic_params()
    grad = MATRIX @ flat(params)
    torch.testing.assert_close(flatness.gradient_norm(quadratic(), params), grad.norm())
    torch.testing.assert_close(flatness.GradientNorm()(quadratic(), params, {}), grad.square().mean())


def test_gradient_norm_has_a_finite_derivative_at_a_stationary_point():
    point = {name: torch.zeros_like(param) for name, param in quadratic_params().items()}
    direction = quadratic_params(seed=1)
    slope = directional_derivative(lambda params: flatness.gradient_norm(quadratic(), params), point, direction)
    assert slope == 0


def test_mean_loss_has_value_gradient_and_hessian_of_the_weighted_sum():
    (first, params), (second, _) = network(0), network(1)
    split = MeanLoss(terms=[first, second], weights=[0.25, 0.75])

    def joint(params):
        return 0.25 * first(params) + 0.75 * second(params)

    vector = like(torch.randn(27, dtype=torch.float64, generator=generator()), params)
    torch.testing.assert_close(split(params), joint(params))
    torch.testing.assert_close(flatness.gradient_norm(split, params), flatness.gradient_norm(joint, params))
    torch.testing.assert_close(flatness.hvp(split, params, vector), flatness.hvp(joint, params, vector))


@pytest.mark.parametrize("vector", [{"a": torch.ones(2)}, {"b": torch.ones(3)}, {}], ids=["shape", "name", "empty"])
def test_hvp_refuses_a_vector_unlike_the_params(vector):
    with pytest.raises(ValueError, match="names and shapes of params"):
        flatness.hvp(lambda params: params["a"].sum(), {"a": torch.ones(3)}, vector)
