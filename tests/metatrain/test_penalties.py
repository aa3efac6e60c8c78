"""Flatness in the meta-objective and in the inner loss."""

from __future__ import annotations

import math

import pytest
import torch
from doubles import InDouble, as_leaves, in_double, slope
from small import assert_trees_equal, make_unroll, random_weights

from flatopt.flatness import MEASURES, EntropySurrogate, GradientNorm
from flatopt.metatrain import FlatnessConfig, ObjectiveConfig
from flatopt.metatrain.estimators import TruncatedBackprop
from flatopt.metatrain.inner_training import Families
from flatopt.metatrain.objective import penalty, schedule_mask, transform_loss
from flatopt.metatrain.runs import Draws, Terms, map_tree
from flatopt.rules import L2ODM, Adam

OPTIONS = {
    "top-eigenvalue": {"num_iterations": 40},
    "local-entropy": {"gamma": 2.0, "num_steps": 3, "temperature": 1e-3},
    "spectral-quadrature": {"num_lanczos": 5},
}
EXACT = ("top-eigenvalue", "trace", "squared-trace", "gradient-norm")
"""Measures whose gradient is that of their value; the others hold a part of themselves fixed."""


def term(name: str, **changes) -> FlatnessConfig:
    defaults = {"name": name, "coefficient": 2.0, "options": OPTIONS.get(name, {})}
    return FlatnessConfig(**{**defaults, **changes})


def make_inner(objective: ObjectiveConfig, *, model: str = "mlp", second_derivatives: bool = True, **task) -> Families:
    unroll = make_unroll(
        model,
        objective=objective,
        second_derivatives=second_derivatives,
        task=[("num_tasks", 2), ("min_steps", 12), *task.items()],
    )
    return Families(unrolls=[unroll])


def started(inner, weights, seed: int = 1):
    """Runs with momenta that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    state = inner.reset(weights, generator)
    return TruncatedBackprop(inner=inner).estimate(weights, state, generator)[1]


def loss_of(inner, state):
    draws = inner.draw(state, torch.Generator().manual_seed(2))
    return lambda moved: inner.unroll(as_leaves(moved), state, draws)[0].detach()


def gradient_of(inner, weights, state):
    return TruncatedBackprop(inner=inner).estimate(weights, state, torch.Generator().manual_seed(2))[0].gradient


def check_slopes(inner, weights, state):
    gradient, loss = gradient_of(inner, weights, state), loss_of(inner, state)
    noise = in_double(random_weights(seed=5, std=1.0))
    actual = sum((gradient[name] * noise[name]).sum() for name in weights)
    torch.testing.assert_close(actual, slope(loss, weights, noise), rtol=1e-4, atol=1e-8)
    assert actual.abs() > 1e-6


@pytest.mark.parametrize("name", EXACT)
def test_gradient_of_a_penalty_equals_finite_differences(name):
    # Only the penalty: the losses have their own test.
    objective = ObjectiveConfig(meta_weight=0.0, flatness=term(name))
    inner, weights = InDouble(inner=make_inner(objective)), in_double(random_weights())
    check_slopes(inner, weights, started(inner, weights))


def test_gradient_of_the_entropy_equals_finite_differences_with_the_mean_held_fixed(monkeypatch):
    objective = ObjectiveConfig(meta_weight=0.0, flatness=term("local-entropy"))
    inner, weights = InDouble(inner=make_inner(objective)), in_double(random_weights())
    state = started(inner, weights)
    original, kept = EntropySurrogate.mean, []

    def record(measure, loss_fn, params, noise):
        kept.append(original(measure, loss_fn, params, noise))
        return kept[-1]

    gradient = gradient_of(inner, weights, state)
    # Under vmap the means of two runs cannot be kept: the differences are taken one run at a time.
    first = map_tree(lambda value: value[:1], state)
    single = InDouble(inner=make_inner(objective, num_tasks=1))
    with monkeypatch.context() as patch:
        patch.setattr("flatopt.metatrain.unroll.vmap", loop_of_one)
        patch.setattr(EntropySurrogate, "mean", record)
        gradient = gradient_of(single, weights, first)
        loss, noise = loss_of(single, first), in_double(random_weights(seed=5, std=1.0))
        means = [{name: value.detach() for name, value in mean.items()} for mean in kept]
        assert len(means) == 3
        turn = iter(means * 2)
        patch.setattr(EntropySurrogate, "mean", lambda *_: next(turn))
        expected = slope(loss, weights, noise)
    actual = sum((gradient[name] * noise[name]).sum() for name in weights)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-8)
    assert actual.abs() > 1e-6


def loop_of_one(function, in_dims=0):
    """What vmap does for a single run, without its tensors."""
    from torch.utils import _pytree as pytree

    def call(*arguments):
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)
        chosen = [
            pytree.tree_map(lambda value, dim=dim: value.select(dim, 0), one)
            for one, dim in zip(arguments, dims, strict=True)
        ]
        return pytree.tree_map(lambda value: value.unsqueeze(0), function(*chosen))

    return call


@pytest.mark.parametrize("second_derivatives", [False, True])
@pytest.mark.parametrize("name", MEASURES)
def test_every_penalty_changes_the_meta_gradient_by_its_coefficient(name, second_derivatives):
    weights, found = random_weights(), []
    for coefficient in (0.0, 1.0, 2.0):
        # Signed: a difference of losses may happen to be negative, and would count as zero.
        config = term(name, coefficient=coefficient, signed=True)
        objective = ObjectiveConfig(train_weight=1.0, flatness=config)
        inner = make_inner(objective, second_derivatives=second_derivatives)
        gradient = gradient_of(inner, weights, started(inner, weights))
        found.append(torch.cat([value.reshape(-1) for value in gradient.values()]))
    assert all(gradient.isfinite().all() for gradient in found)
    assert (found[1] - found[0]).norm() > 1e-5 * found[0].norm()
    torch.testing.assert_close(found[2] - found[0], 2 * (found[1] - found[0]), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"schedule": "first", "fraction": 0.25}, [0, 1]),
        ({"schedule": "first", "fraction": 1.0}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"schedule": "last", "fraction": 0.5}, [4, 5, 6, 7]),
        ({"schedule": "every", "every": 3}, [2, 5]),
    ],
)
def test_schedule_is_on_at_these_of_eight_steps(options, steps):
    mask = schedule_mask(FlatnessConfig(**options), torch.arange(8.0), torch.tensor(8.0))
    assert mask.nonzero()[:, 0].tolist() == steps


def test_runs_at_different_steps_follow_the_schedule_each_by_itself():
    objective = ObjectiveConfig(flatness=term("gradient-norm", schedule="last", fraction=0.5))
    inner = make_inner(objective, min_steps=12, max_steps=12)
    unroll, weights = inner.unrolls[0], as_leaves(random_weights())
    repeated = {name: value.expand(2, *value.shape) for name, value in weights.items()}
    runs = unroll.start(repeated, 2, 1, torch.Generator().manual_seed(0))._replace(step=torch.tensor([0.0, 5.0]))
    _, losses = unroll.run(repeated, runs, 1, torch.Generator().manual_seed(1))
    assert (losses.flatness != 0).tolist() == [[False, False], [False, True], [False, True]]


def test_where_the_schedule_is_off_for_all_runs_the_measure_is_not_computed(monkeypatch):
    calls = []
    original = GradientNorm.__call__
    monkeypatch.setattr(GradientNorm, "__call__", lambda *one: calls.append(None) or original(*one))
    objective = ObjectiveConfig(flatness=term("gradient-norm", schedule="every", every=3))
    inner, weights = make_inner(objective), random_weights()
    state = inner.reset(weights, torch.Generator().manual_seed(0))
    for _ in range(2):
        _, state = TruncatedBackprop(inner=inner).estimate(weights, state, torch.Generator().manual_seed(0))
    assert len(calls) == 2


def test_a_penalty_that_is_off_leaves_the_same_objective_as_none():
    weights, found = random_weights(), []
    for config in (FlatnessConfig(), term("gradient-norm", schedule="every", every=100)):
        inner = make_inner(ObjectiveConfig(flatness=config))
        state = inner.reset(weights, torch.Generator().manual_seed(0))
        loss, after, _ = inner.unroll(weights, state, inner.draw(state, torch.Generator().manual_seed(1)))
        found.append((loss, after))
    assert torch.equal(found[0][0], found[1][0])
    assert_trees_equal(found[0][1], found[1][1])


def test_negative_curvature_is_not_rewarded_unless_asked_for():
    measured, zero = torch.tensor([-2.0, 3.0, math.nan, 900.0]), torch.zeros(4)
    assert penalty(FlatnessConfig(), measured, zero, zero).tolist() == [0.0, 3.0, 100.0, 100.0]
    assert penalty(FlatnessConfig(signed=True, clip=6.0), measured, zero, zero).tolist() == [-2.0, 3.0, 6.0, 6.0]
    with pytest.raises(ValueError, match="options.subtract_loss must be false in a penalty"):
        term("local-entropy", options={"subtract_loss": True})


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "local-entropy"])
def test_a_recorded_step_evaluates_the_same_penalty(name):
    """What an evolution strategy sees equals what backpropagation sees."""
    rule = L2ODM(hidden=2)
    options = {"num_iterations": 4} if name == "top-eigenvalue" else OPTIONS.get(name, {})
    config = term(name, signed=True, options=options)
    unroll = make_unroll("linear", rule=rule, objective=ObjectiveConfig(flatness=config))
    weights = {key: value.expand(3, *value.shape) for key, value in random_weights(rule).items()}
    runs = unroll.start(weights, 3, 1, torch.Generator().manual_seed(0))
    draws = unroll.draw(runs, 1, torch.Generator().manual_seed(1))
    _, recorded = unroll.unroll(weights, runs, draws, 1)
    _, plain = unroll.unroll(as_leaves(weights), runs, draws, 1)
    assert (recorded.flatness != 0).all() and not recorded.flatness.requires_grad
    torch.testing.assert_close(recorded.flatness, plain.flatness.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["squared-trace", "local-entropy", "sam-gap"])
def test_the_rule_sees_the_gradient_of_the_regularised_inner_loss(name):
    config = term(name, schedule="every", every=2)
    objective = ObjectiveConfig(inner_flatness=config)
    # With these decays the first moment is half of the last gradient and a quarter of the one before.
    unroll = make_unroll("mlp", rule=Adam(betas=(0.5, 0.9)), objective=objective, task=[("num_tasks", 2)])
    weights = {"unused": torch.zeros(2)}
    runs = unroll.start(weights, 2, 1, torch.Generator().manual_seed(0))
    draws = unroll.draw(runs, 1, torch.Generator().manual_seed(1))
    seen = []
    for on in (False, True):  # off in the first step of a run, on in the second
        index = int(runs.step[0])
        inner_noise = {key: value[index] for key, value in draws.inner_noise.items()}
        batches = [type(batch)(batch.inputs[index], batch.targets[index]) for batch in draws[:2]]
        before = runs
        runs, losses = unroll.step(weights, runs, Draws(*batches, {}, inner_noise), Terms(False, True))
        for run in range(2):
            problem = before.problem._replace(
                **{
                    key: value[run]
                    for key, value in before.problem._asdict().items()
                    if isinstance(value, torch.Tensor)
                }
            )
            params = {key: value[run].clone().requires_grad_() for key, value in before.params.items()}
            batch = type(batches[0])(batches[0].inputs[run], batches[0].targets[run])

            def loss_fn(params, problem=problem, batch=batch):
                return unroll.distribution.loss(problem, params, batch)

            loss = loss_fn(params)
            noise = {key: value[:, run] for key, value in inner_noise.items()}
            total = loss + 2.0 * on * config.build_measure()(loss_fn, params, noise).clamp(min=0)
            grads = dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))
            torch.testing.assert_close(losses.train[run], loss.detach())  # without the penalty
            for key, grad in grads.items():
                old = before.states[key]["exp_avg"][run]
                torch.testing.assert_close(2 * runs.states[key]["exp_avg"][run] - old, grad, rtol=1e-3, atol=1e-5)
            seen.append(grads)
    assert len(seen) == 4


def test_log_objective_is_relative_to_the_start_of_the_run():
    objective = ObjectiveConfig(transform="log", base_weight=1.0, final_weight=0.0)
    inner = make_inner(objective, max_steps=12)
    weights, generator = random_weights(), torch.Generator().manual_seed(0)
    unroll = inner.unrolls[0]
    repeated = {name: value.expand(2, *value.shape) for name, value in as_leaves(weights).items()}
    runs = unroll.start(repeated, 2, 1, generator)
    runs, first = unroll.run(repeated, runs, 1, generator)
    start = first.train[0].detach()
    _, later = unroll.run(repeated, runs, 1, generator)
    for losses in (first, later):
        torch.testing.assert_close(losses.objective, torch.log(losses.meta / (start + 1e-6) + 1e-6))
    torch.testing.assert_close(runs.initial_loss, start)


def test_log_of_a_loss_of_zero_is_finite():
    config = ObjectiveConfig(transform="log")
    value = transform_loss(config, torch.tensor([0.0, -1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0]))
    torch.testing.assert_close(value, torch.tensor([math.log(1e-6), math.log(1e-6), 0.0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", ["meta", "train"])
def test_the_loss_after_the_step_is_on_the_split_that_is_asked_for(split):
    unroll = make_unroll("mlp", objective=ObjectiveConfig(meta_split=split))
    runs = unroll.start(
        {name: value.expand(3, *value.shape) for name, value in random_weights().items()},
        3,
        1,
        torch.Generator().manual_seed(0),
    )
    draws = unroll.draw(runs, 1, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for drawn, name in ((draws.train, "train"), (draws.meta, split)):
        expected = unroll.distribution.sample_batches(runs.problem, 3, name, generator)
        assert torch.equal(drawn.inputs, expected.inputs)
