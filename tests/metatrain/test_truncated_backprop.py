import torch
from toy_metatrain import NUM_PROBLEMS, Quadratics, StepSize

from flatopt.metatrain.estimators import TruncatedBackprop


def make_weights():
    weights = StepSize().init_weights(torch.Generator().manual_seed(0))
    return {name: weight.double() for name, weight in weights.items()}


def finite_difference(function, weights, name, index, epsilon=1e-5):
    """Central difference of a scalar function along one coordinate of one weight."""
    values = []
    for sign in (1, -1):
        moved = {key: value.clone() for key, value in weights.items()}
        moved[name].view(-1)[index] += sign * epsilon
        values.append(function(moved))
    return (values[0] - values[1]) / (2 * epsilon)


def check_gradient(state, weights):
    """The estimate equals the finite difference of one truncation from the same, constant, state and draws."""
    inner = Quadratics()
    meta, _ = TruncatedBackprop(inner=inner).estimate(weights, state, torch.Generator().manual_seed(5))

    def loss(moved):
        generator = torch.Generator().manual_seed(5)
        start = inner.refresh(moved, state, generator)
        return inner.unroll(moved, start, inner.draw(start, generator))[0]

    torch.testing.assert_close(meta.loss, loss(weights), rtol=0, atol=0)
    for name, weight in weights.items():
        expected = [finite_difference(loss, weights, name, index) for index in range(weight.numel())]
        torch.testing.assert_close(meta.gradient[name].reshape(-1), torch.stack(expected), rtol=1e-6, atol=1e-8)
    return meta


def test_gradient_of_the_first_truncation_equals_finite_differences():
    weights = make_weights()
    state = TruncatedBackprop(inner=Quadratics()).init(weights, torch.Generator().manual_seed(1))
    check_gradient(state, weights)


def test_gradient_of_a_later_truncation_sees_the_carried_state_as_constant():
    weights, generator = make_weights(), torch.Generator().manual_seed(1)
    estimator = TruncatedBackprop(inner=Quadratics())
    state = estimator.init(weights, generator)
    for _ in range(2):
        _, state = estimator.estimate(weights, state, generator)
    assert not any(value.requires_grad for value in state.values())
    # The learned start has no part in a truncation that does not begin a problem.
    assert check_gradient(state, weights).gradient["start"].abs().max() == 0


def test_learned_start_gets_a_gradient_when_a_problem_begins_anew():
    weights, generator = make_weights(), torch.Generator().manual_seed(1)
    estimator = TruncatedBackprop(inner=Quadratics())
    state = estimator.init(weights, generator)
    for _ in range(3):
        _, state = estimator.estimate(weights, state, generator)
    assert (state["age"] == 3).all()  # the first of them is due
    assert check_gradient(state, weights).gradient["start"].abs().min() > 0


def test_state_shares_no_storage_with_the_weights():
    weights = make_weights()
    inner = Quadratics()
    state = TruncatedBackprop(inner=inner).init(weights, torch.Generator().manual_seed(1))
    before = {key: value.clone() for key, value in state.items()}
    for weight in weights.values():
        weight.zero_()
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert state["x"].shape[0] == NUM_PROBLEMS
