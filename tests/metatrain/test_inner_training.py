from __future__ import annotations

import pytest
import torch
from doubles import InDouble, as_leaves, in_double, slope
from small import assert_trees_equal, by_path, make_unroll, random_weights
from torch import Tensor

from flatopt.metatrain import MetaTrainConfig, ObjectiveConfig, TaskConfig
from flatopt.metatrain.cli import main
from flatopt.metatrain.estimators import Inner, TruncatedBackprop, build_estimator
from flatopt.metatrain.inner_training import Families
from flatopt.metatrain.recipes import smoke
from flatopt.metatrain.runs import map_tree
from flatopt.rules import Weights

PLAIN = ObjectiveConfig(train_weight=0.5)


def make_inner(*names: str, length: int = 3, second_derivatives: bool = True, **options) -> InDouble:
    unrolls = [
        make_unroll(
            name,
            objective=PLAIN,
            truncation_length=length,
            second_derivatives=second_derivatives,
            task=[("num_tasks", 2), ("weight", 1.0 + index), ("min_steps", 12), *options.items()],
        )
        for index, name in enumerate(names)
    ]
    return InDouble(inner=Families(unrolls=unrolls))


def meta_gradient(inner: Inner, weights: Weights, state: dict[str, Tensor]) -> Weights:
    return TruncatedBackprop(inner=inner).estimate(weights, state, torch.Generator().manual_seed(2))[0].gradient


@pytest.mark.parametrize("names", [("mlp",), ("mlp", "cnn")])
def test_gradient_equals_finite_differences(names):
    inner, weights = make_inner(*names), in_double(random_weights())
    generator = torch.Generator().manual_seed(1)
    state = inner.reset(weights, generator)
    _, state = TruncatedBackprop(inner=inner).estimate(weights, state, generator)  # momenta that are not zero
    gradient = meta_gradient(inner, weights, state)

    def loss(moved: Weights) -> Tensor:
        draws = inner.draw(state, torch.Generator().manual_seed(2))
        return inner.unroll(as_leaves(moved), state, draws)[0].detach()

    noise = in_double(random_weights(seed=5, std=1.0))
    for only in weights:
        direction = {name: noise[name] * (name == only) for name in weights}
        actual = (gradient[only] * direction[only]).sum()
        # Narrow: a wider difference meets a kink, of a ReLU or of a bound.
        expected = slope(loss, weights, direction, width=1e-6)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)
        assert actual != 0, only


def test_inner_gradients_are_constant_unless_asked_for():
    weights = in_double(random_weights())
    gradients = {}
    for length in (1, 3):
        for second in (False, True):
            inner = make_inner("mlp", length=length, second_derivatives=second)
            state = inner.reset(weights, torch.Generator().manual_seed(1))
            gradients[length, second] = meta_gradient(inner, weights, state)
    # The first gradient of a truncation does not depend on the weights, later ones do.
    torch.testing.assert_close(gradients[1, False], gradients[1, True], rtol=1e-9, atol=1e-12)
    one, other = (torch.cat([value.view(-1) for value in gradients[3, second].values()]) for second in (False, True))
    assert (one - other).norm() > 1e-3 * other.norm()


def test_runs_that_reached_their_horizon_start_anew():
    inner = make_inner("mlp", "norm", num_tasks=4, min_steps=3, max_steps=30).inner
    estimator = TruncatedBackprop(inner=inner)
    weights, generator = random_weights(), torch.Generator().manual_seed(0)
    state = inner.reset(weights, generator)
    num_refreshed = 0
    for _ in range(4):
        old = state
        state = inner.refresh(weights, old, generator)
        for name in ("mlp", "norm"):
            done = old[name].step >= old[name].horizon
            num_refreshed += int(done.sum())
            assert (state[name].step < state[name].horizon).all()
            before, after = by_path(old[name]), by_path(state[name])
            for key in before:
                assert torch.equal(after[key][~done], before[key][~done]), key
                if "exp_avg" in key or key == ".step":
                    assert (after[key][done] == 0).all(), key
        _, state = estimator.estimate(weights, state, generator)
    assert 0 < num_refreshed < 4 * 8


def test_families_count_by_their_weight():
    weights, generator = as_leaves(random_weights()), torch.Generator().manual_seed(0)
    inner = make_inner("mlp", "norm").inner
    state = inner.reset(weights, generator)
    draws = inner.draw(state, generator)
    loss, *_ = inner.unroll(weights, state, draws)
    alone = [Families(unrolls=[unroll]).unroll(weights, state, draws)[0] for unroll in inner.unrolls]
    torch.testing.assert_close(loss, (1 * alone[0] + 2 * alone[1]) / 3)
    assert abs(float((alone[0] - alone[1]).detach())) > 1e-3


def test_an_estimate_is_a_function_of_a_state_that_it_leaves_alone():
    weights, generator = random_weights(), torch.Generator().manual_seed(0)
    estimator = TruncatedBackprop(inner=make_inner("mlp").inner)
    state = estimator.init(weights, generator)
    first = estimator.estimate(weights, state, torch.Generator().manual_seed(3))
    copied = map_tree(torch.clone, state)
    again = estimator.estimate(weights, copied, torch.Generator().manual_seed(3))
    assert_trees_equal(first[1], again[1])
    assert_trees_equal(first[0].gradient, again[0].gradient)
    assert not any(value.requires_grad for value in by_path(first[1]).values())


def test_configuration_names_the_estimator():
    config = smoke().override(["estimator.name=truncated-backprop", "estimator.second_derivatives=true"])
    estimator = build_estimator(config, torch.device("cpu"))
    assert isinstance(estimator, TruncatedBackprop)
    assert [unroll.second_derivatives for unroll in estimator.inner.unrolls] == [True]


def test_random_scaling_of_a_configuration_is_one_number_per_coordinate():
    config = smoke().override(["estimator.name=truncated-backprop", "tasks.tabular.random_scaling=2"])
    (unroll,) = build_estimator(config, torch.device("cpu")).inner.unrolls
    problems = unroll.distribution.sample_problems(3, torch.Generator().manual_seed(0))
    for name, scale in problems.param_scales.items():
        assert scale.shape == problems.params[name].shape
        assert len(scale.unique()) > 0.99 * scale.numel()  # some draws of float32 coincide
        assert 2 > scale.log().abs().max() > 1


@pytest.mark.parametrize("name", ["persistent-es", "truncated-backprop"])
def test_an_unknown_family_is_named(name):
    config = MetaTrainConfig(recipe="", rule="adam", tasks=(TaskConfig(name="rnn"),), num_updates=1).override(
        [f"estimator.name={name}"]
    )
    with pytest.raises(ValueError, match="unknown task 'rnn': valid are .*mlp, .*transformer"):
        build_estimator(config, torch.device("cpu"))


def test_command_line_trains_by_backpropagation(tmp_path):
    options = ["estimator.name=truncated-backprop", "estimator.truncation_length=2", "num_updates=3"]
    assert main(["run", "smoke", *options, "tasks.tabular.min_steps=2", "--out", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "export")]) == 0
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_a_family_may_have_a_truncation_length_of_its_own():
    config = smoke().override(["estimator.truncation_length=5"])
    tasks = (config.tasks[0], TaskConfig(name="cnn", num_tasks=2, min_steps=12, max_steps=12, truncation_length=12))
    config = MetaTrainConfig(**{**vars(config), "tasks": tasks})
    estimator = build_estimator(config, torch.device("cpu"))
    assert [unroll.truncation_length for unroll in estimator.families.unrolls] == [5, 12]
    weights = {name: torch.zeros(4, *value.shape) for name, value in random_weights(config.build_rule()).items()}
    runs = estimator.families.unrolls[1].start(weights, 2, 2, torch.Generator().manual_seed(0))
    assert (runs.horizon == 12).all()
