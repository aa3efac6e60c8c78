from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from doubles import InDouble, as_leaves, in_double, slope
from small import RULE, assert_trees_equal, make_unroll, random_weights

from flatopt.metatrain import ImitationConfig, ObjectiveConfig
from flatopt.metatrain.estimators import GradientEstimator, MetaGradient, TruncatedBackprop, build_estimator
from flatopt.metatrain.estimators.imitation import TeacherForced, WithImitation, build_teacher
from flatopt.metatrain.inner_training import Families
from flatopt.metatrain.recipes import smoke
from flatopt.metatrain.runs import map_tree
from flatopt.rules import OrthogonalizedMomentum

OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.Adam(params, lr=0.01, betas=(0.0, 0.9)),
}


def make_forced(
    name: str = "adam",
    *,
    length: int = 4,
    num_tasks: int = 2,
    coefficient: float = 3.0,
    rule: OrthogonalizedMomentum = RULE,
) -> TeacherForced:
    unroll = make_unroll(
        "mlp",
        rule=rule,
        objective=ObjectiveConfig(meta_weight=0.0),
        truncation_length=length,
        task=[("num_tasks", num_tasks), ("min_steps", 2 * length), ("max_steps", 2 * length)],
    )
    students = Families(unrolls=[unroll])
    return TeacherForced(students=students, teacher=build_teacher(name, 0.01), coefficient=coefficient)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_runs_follow_the_teacher_over_truncations_and_start_anew_at_their_horizon(name):
    forced, weights, generator = make_forced(name), random_weights(), torch.Generator().manual_seed(0)
    unroll = forced.students.unrolls[0]
    state = forced.reset(weights, generator)
    for _ in range(2):  # two runs of two truncations, each with an optimizer of its own
        state = forced.refresh(weights, state, generator)
        runs = state["runs"]["mlp"]
        assert (runs.step == 0).all()
        leaves = {key: value.clone().requires_grad_() for key, value in runs.params.items()}
        optimizer = OPTIMIZERS[name](list(leaves.values()))
        for _ in range(2):
            state = forced.refresh(weights, state, generator)
            draws = forced.draw(state, generator)
            train = draws["mlp"].train
            for inputs, targets in zip(*train, strict=True):
                batch = type(train)(inputs, targets)
                optimizer.zero_grad()
                torch.func.vmap(unroll.distribution.loss)(runs.problem, leaves, batch).sum().backward()
                optimizer.step()
            _, state, _ = forced.unroll(as_leaves(weights), state, draws)
            state = map_tree(torch.Tensor.detach, state)
            after = state["runs"]["mlp"].params
            for key, leaf in leaves.items():
                torch.testing.assert_close(after[key], leaf.detach(), rtol=1e-4, atol=1e-5)


def test_loss_is_half_the_mean_squared_difference_of_the_steps():
    forced, weights, generator = make_forced(length=1), random_weights(), torch.Generator().manual_seed(0)
    unroll = forced.students.unrolls[0]
    state = forced.reset(weights, generator)
    draws = forced.draw(state, generator)
    loss, after, _ = forced.unroll(as_leaves(weights), state, draws)
    runs, taught = state["runs"]["mlp"], after["runs"]["mlp"]
    repeated = {name: value.expand(2, *value.shape) for name, value in as_leaves(weights).items()}
    own, _ = unroll.unroll(repeated, runs, draws["mlp"], 1)
    squares = [(own.params[key] - taught.params[key]).square().sum() for key in runs.params]
    count = sum(value.numel() for value in runs.params.values())
    torch.testing.assert_close(loss, 3.0 * 0.5 * sum(squares) / count)
    # The state of the student has seen the gradient of the teacher's point.
    assert_trees_equal(own.states, taught.states)


def test_gradient_equals_finite_differences_and_no_run_depends_on_the_weights():
    inner, weights = InDouble(inner=make_forced(coefficient=1e4)), in_double(random_weights())
    generator = torch.Generator().manual_seed(1)
    state = inner.reset(weights, generator)
    estimator = TruncatedBackprop(inner=inner)
    gradient, after = estimator.estimate(weights, state, torch.Generator().manual_seed(2))

    def loss(moved):
        draws = inner.draw(state, torch.Generator().manual_seed(2))
        return inner.unroll(as_leaves(moved), state, draws)[0].detach()

    noise = in_double(random_weights(seed=5, std=1.0))
    actual = sum((gradient.gradient[name] * noise[name]).sum() for name in weights)
    torch.testing.assert_close(actual, slope(loss, weights, noise), rtol=1e-5, atol=1e-9)
    others = in_double(random_weights(seed=9))
    _, also = estimator.estimate(others, state, torch.Generator().manual_seed(2))
    assert_trees_equal(after["runs"]["mlp"].params, also["runs"]["mlp"].params)


def test_imitation_teaches_the_steps_of_adam():
    rule = OrthogonalizedMomentum(strip_size=0)  # whose steps can be those of Adam
    forced, generator = make_forced(num_tasks=4, rule=rule), torch.Generator().manual_seed(0)
    estimator = TruncatedBackprop(inner=forced)
    weights = rule.init_weights(torch.Generator().manual_seed(0))
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    optimizer = torch.optim.Adam(list(leaves.values()), lr=0.03)
    state, losses = estimator.init(weights, generator), []
    for _ in range(60):
        meta, state = estimator.estimate({k: v.detach() for k, v in leaves.items()}, state, generator)
        for name, leaf in leaves.items():
            leaf.grad = meta.gradient[name]
        optimizer.step()
        losses.append(float(meta.loss))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@dataclass(frozen=True, kw_only=True)
class Named(GradientEstimator):
    """Counts its calls in its state, and checks that the state is its own."""

    value: float

    def init(self, weights, generator, num_steps=None):
        return {"count": torch.tensor(0)}

    def estimate(self, weights, state, generator, num_steps=None):
        assert state.keys() == {"count"}
        return MetaGradient(weights, torch.tensor(self.value), {"steps": num_steps}), {"count": state["count"] + 1}


def test_a_share_of_the_updates_imitates_by_stage_each_part_with_a_state_of_its_own():
    parts = [Named(value=float(index)) for index in range(3)]
    both = WithImitation(estimator=parts[0], imitations=parts[1:], probabilities={5: 0.0, 7: 0.4})
    weights, generator = {"z": torch.zeros(1)}, torch.Generator().manual_seed(0)
    state = both.init(weights, generator, 5)
    for _ in range(50):
        meta, state = both.estimate(weights, state, generator, 5)
        assert float(meta.loss) == 0.0
    imitated = 0
    for _ in range(500):
        meta, state = both.estimate(weights, state, generator, 7)
        assert meta.metrics["steps"] == 7
        imitated += "imitation" in meta.metrics
        assert math.isnan(float(meta.loss)) == ("imitation" in meta.metrics)
    assert abs(imitated - 200) < 4 * math.sqrt(500 * 0.4 * 0.6)
    counts = [int(state[f"imitation-{index}"]["count"]) for index in range(2)]
    assert sum(counts) == imitated and min(counts) > 0.3 * imitated
    assert int(state["objective"]["count"]) == 50 + 500 - imitated


def test_the_last_share_of_imitation_is_that_of_all_later_stages():
    options = ["imitation.probabilities=[0.5, 0.3]", "validate_every=1"]
    for stages, expected in (("[10, 20, 50]", {10: 0.5, 20: 0.3, 50: 0.3}), ("[]", {None: 0.5})):
        config = smoke().override([*options, f"curriculum.stages={stages}"])
        assert build_estimator(config, torch.device("cpu")).probabilities == expected


@pytest.mark.parametrize("name", ["persistent-es", "truncated-backprop"])
def test_configuration_adds_imitation_to_any_estimator(name):
    config = smoke().override([f"estimator.name={name}"])
    assert not isinstance(build_estimator(config, torch.device("cpu")), WithImitation)
    config = config.override(['imitation.teachers=["adam", "rmsprop"]', "imitation.probabilities=[0.5]"])
    estimator = build_estimator(config, torch.device("cpu"))
    assert isinstance(estimator, WithImitation) and len(estimator.imitations) == 2
    assert config.imitation == ImitationConfig(teachers=("adam", "rmsprop"), probabilities=(0.5,))
