from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import ToyMixer
from small import WITH_FLATNESS, assert_trees_equal, by_path, make_unroll, stack_weights

from flatopt.flatness import PerturbationGap
from flatopt.metatrain import FlatnessConfig, ObjectiveConfig
from flatopt.metatrain.objective import clip_loss, step_weight
from flatopt.metatrain.runs import Draws, Runs, StepLosses, join_losses, map_tree, replace_runs
from flatopt.metatrain.unroll import Unroll, can_compile
from flatopt.rules import StepContext, Weights, apply_rule
from flatopt.tasks import Batch

NUM_PAIRS, COPIES = 2, 2
META_ONLY = ObjectiveConfig()


def start(unroll: Unroll, num_problems: int = NUM_PAIRS, copies: int = COPIES) -> tuple[Weights, Runs]:
    weights = stack_weights(num_problems * copies, rule=unroll.rule)
    return weights, unroll.start(weights, num_problems, copies, torch.Generator().manual_seed(1))


def row(tree, index: int):
    return map_tree(lambda value: value[index], tree)


def train_one(unroll: Unroll, weights: Weights, runs: Runs, draws: Draws, run: int) -> tuple[Runs, StepLosses]:
    """Train one run, step by step, with autograd, the driver's defaults and the formulas of the objective."""
    problem = row(runs.problem, run)
    params, states = row(runs.params, run), {name: row(state, run) for name, state in runs.states.items()}
    shared, pair = row(runs.shared, run), run % NUM_PAIRS
    average = row(runs.average, run)  # stands for the parameters
    losses: list[list[float]] = []
    for index in range(unroll.truncation_length):
        step = float(runs.step[run]) + index + 1
        train, meta = (Batch(batch.inputs[index, pair], batch.targets[index, pair]) for batch in draws[:2])
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        loss = unroll.distribution.loss(problem, leaves, train)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        moved = {
            name: value + 0.1 * value.square().mean().sqrt() * draws.noise[name][index, 0, pair]
            for name, value in average.items()
        }
        gap = float(unroll.distribution.loss(problem, moved, train) - unroll.distribution.loss(problem, average, train))
        update = apply_rule(
            unroll.rule,
            row(weights, run),
            list(params.values()),
            list(grads),
            list(states.values()),
            shared,
            StepContext(torch.tensor(step), runs.num_steps[run]),
        )
        params = {name: value + delta for (name, value), delta in zip(params.items(), update.deltas, strict=True)}
        states, shared = dict(zip(states, update.states, strict=True)), update.shared
        average = {name: (step - 1) / (step + 8) * average[name] + 9 / (step + 8) * params[name] for name in params}
        after = float(unroll.distribution.loss(problem, average, meta))
        weight = 0.1 + 3 * (step / float(runs.horizon[run])) ** 4
        value = 0.5 * float(loss.detach()) + after + 0.3 * gap
        losses.append([weight * value, float(loss.detach()), after, gap])
    final = runs._replace(params=params, states=states, shared=shared, step=torch.tensor(step), average=average)
    final = final._replace(initial_loss=torch.tensor(losses[0][1]) if runs.step[run] == 0 else runs.initial_loss[run])
    return final, StepLosses(*torch.tensor(losses).unbind(1))


@pytest.fixture(scope="module")
def unrolls() -> dict[str, Unroll]:
    """Recorded once for all tests: it takes seconds."""
    return {name: make_unroll(name) for name in ("mlp", "norm", "cnn")}


@pytest.mark.parametrize("name", ["mlp", "norm", "cnn"])
def test_recorded_steps_of_many_runs_equal_a_loop_over_single_runs(unrolls, name):
    unroll = unrolls[name]
    weights, runs = start(unroll)
    runs = runs._replace(num_steps=torch.where(torch.tensor([True, False, True, False]), math.inf, runs.horizon))
    draws = unroll.draw(runs, COPIES, torch.Generator().manual_seed(2))
    after, losses = unroll.unroll(weights, runs, draws, COPIES)
    for run in range(len(runs.step)):
        expected, expected_losses = train_one(unroll, weights, runs, draws, run)
        for key in ("params", "states", "shared", "step", "average"):
            torch.testing.assert_close(
                by_path(row(getattr(after, key), run)),
                by_path(getattr(expected, key)),
                rtol=1e-3,
                atol=3e-5,
            )
        actual = StepLosses(*(value[:, run] for value in losses))
        torch.testing.assert_close(actual, expected_losses, rtol=1e-4, atol=1e-4)
    # Same problems and batches, but other weights: the copies went different ways.
    assert (losses.train[0, :NUM_PAIRS] == losses.train[0, NUM_PAIRS:]).all()
    assert (losses.train[-1, :NUM_PAIRS] != losses.train[-1, NUM_PAIRS:]).all()


def test_recorded_step_equals_the_step(unrolls):
    unroll = unrolls["mlp"]
    weights, runs = start(unroll)
    draws = unroll.draw(runs, COPIES, torch.Generator().manual_seed(2))
    recorded = unroll.unroll(weights, runs, draws, COPIES)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    plain = unroll.unroll(leaves, runs, draws, COPIES)
    for one, other in zip(recorded, plain, strict=True):
        torch.testing.assert_close(by_path(one), by_path(other), rtol=1e-4, atol=1e-6)
    assert plain[1].objective.requires_grad and not recorded[1].objective.requires_grad


def test_recorded_steps_follow_a_schedule_that_alternates():
    flatness = FlatnessConfig(name="gradient-norm", coefficient=1.0, schedule="every", every=2)
    unroll = make_unroll("linear", objective=ObjectiveConfig(flatness=flatness))
    weights, runs = start(unroll)
    draws = unroll.draw(runs, COPIES, torch.Generator().manual_seed(2))
    (after, losses), (expected, plain) = (
        one.unroll(weights, runs, draws, COPIES) for one in (unroll, replace(unroll, mode="plain"))
    )
    assert {bool(on.any()) for on in losses.flatness != 0} == {True, False}
    torch.testing.assert_close(by_path(after), by_path(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_steps_launched_together_equal_plain_ones():
    """Also after other graphs were captured: memory that a graph reads is not given to them."""
    flatness = FlatnessConfig(name="perturbation-gap", coefficient=0.3, signed=True, schedule="every", every=2)
    device, objective = torch.device("cuda"), replace(WITH_FLATNESS, flatness=flatness)
    unrolls = [make_unroll(name, device=device, objective=objective) for name in ("linear", "mlp", "norm", "cnn")]
    begun = []
    for unroll in unrolls:
        weights = map_tree(lambda value: value.to(device), stack_weights(NUM_PAIRS * COPIES))
        runs = unroll.start(weights, NUM_PAIRS, COPIES, torch.Generator().manual_seed(1))
        begun.append((weights, runs, unroll.draw(runs, COPIES, torch.Generator().manual_seed(2))))
        unroll.unroll(*begun[-1], COPIES)
    for unroll, arguments in zip(unrolls, begun, strict=True):
        together, plain = (one.unroll(*arguments, COPIES) for one in (unroll, replace(unroll, mode="plain")))
        for one, other in zip(together, plain, strict=True):
            torch.testing.assert_close(by_path(one), by_path(other), rtol=1e-3, atol=3e-5)


def test_recorded_steps_go_by_the_names_of_the_state_not_by_their_order():
    unroll = make_unroll("linear")
    weights, runs = start(unroll)
    draws = unroll.draw(runs, COPIES, torch.Generator().manual_seed(2))
    expected, _ = unroll.unroll(weights, runs, draws, COPIES)
    reordered = {name: dict(reversed(state.items())) for name, state in runs.states.items()}
    after, _ = unroll.unroll(weights, runs._replace(states=reordered), draws, COPIES)
    assert all(list(after.states[name]) == list(state) for name, state in reordered.items())
    assert_trees_equal(after.params, expected.params)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself, when inductor is imported
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_compiled_step_equals_the_recorded_one():
    # The toy rule uses every path of the driver and compiles in a fraction of the flagship's minutes.
    recorded, compiled = (
        make_unroll("linear", rule=ToyMixer(), mode=mode, objective=META_ONLY) for mode in ("recorded", "compiled")
    )
    weights, runs = start(recorded)
    draws = recorded.draw(runs, COPIES, torch.Generator().manual_seed(2))
    one, other = (unroll.unroll(weights, runs, draws, COPIES) for unroll in (recorded, compiled))
    torch.testing.assert_close(by_path(one[0]), by_path(other[0]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one[1].objective, other[1].objective, rtol=1e-3, atol=1e-4)


def test_two_truncations_equal_one_of_twice_the_length(unrolls):
    short, long = unrolls["mlp"], make_unroll("mlp", truncation_length=6)
    object.__setattr__(long, "_recorder", short._recorder)  # the same step
    weights, runs = start(short)
    draws = long.draw(runs, COPIES, torch.Generator().manual_seed(2))
    whole, whole_losses = long.unroll(weights, runs, draws, COPIES)
    parts = []
    for half in (slice(0, 3), slice(3, 6)):
        part = map_tree(lambda value, half=half: value[half], draws)
        runs, losses = short.unroll(weights, runs, part, COPIES)
        parts.append(losses)
    assert_trees_equal(runs, whole)
    joined = StepLosses(*(torch.cat(pair) for pair in zip(*parts, strict=True)))
    assert_trees_equal(joined, whole_losses)


def test_running_is_drawing_then_unrolling(unrolls):
    unroll = unrolls["mlp"]
    weights, runs = start(unroll)
    one = unroll.run(weights, runs, COPIES, torch.Generator().manual_seed(2))
    draws = unroll.draw(runs, COPIES, torch.Generator().manual_seed(2))
    other = unroll.unroll(weights, runs, draws, COPIES)
    assert_trees_equal(one[0], other[0])
    assert_trees_equal(one[1], other[1])


def test_a_long_truncation_is_drawn_in_parts_and_goes_the_same_way(unrolls, monkeypatch):
    unroll = unrolls["mlp"]
    weights, runs = start(unroll)
    monkeypatch.setattr("flatopt.metatrain.unroll.MAX_DRAWN", 2)
    whole, losses = unroll.run(weights, runs, COPIES, torch.Generator().manual_seed(2))
    generator, parts = torch.Generator().manual_seed(2), []
    for length in (2, 1):  # of three steps
        draws = unroll.draw(runs, COPIES, generator, length)
        assert len(draws.train.inputs) == len(draws.noise["layers.0.bias"]) == length
        runs, part = unroll.unroll(weights, runs, draws, COPIES)
        parts.append(part)
    assert_trees_equal(whole, runs)
    assert_trees_equal(losses, join_losses(parts))


def test_draws_have_train_and_meta_batches_then_noise_of_step_after_step():
    unroll = make_unroll("mlp")
    _, runs = start(unroll)
    draws = unroll.draw(runs, COPIES, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    first = map_tree(lambda value: value[:NUM_PAIRS], runs)
    for split, actual in (("train", draws.train), ("meta", draws.meta)):
        expected = unroll.distribution.sample_batches(first.problem, 3, split, generator)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    for index in range(3):
        expected = PerturbationGap(radius=0.1).sample_noise(first.params, generator)
        assert_trees_equal({name: value[index] for name, value in draws.noise.items()}, expected)


def test_copies_share_problem_start_and_horizon():
    unroll = make_unroll("norm")
    weights, runs = start(unroll, num_problems=3, copies=2)
    for name, value in by_path(runs).items():
        if not name.startswith(".states"):
            assert torch.equal(value[:3], value[3:]), name
    assert not torch.equal(runs.params["layers.0.weight"][0], runs.params["layers.0.weight"][1])
    assert (runs.step == 0).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_horizons_are_log_uniform_multiples_of_the_truncation(probability):
    bounds = [("min_steps", 30), ("max_steps", 3000), ("unknown_horizon_probability", probability)]
    unroll = make_unroll("mlp", task=bounds)
    runs = start(unroll, num_problems=800, copies=1)[1]
    assert (runs.horizon % 3 == 0).all() and (runs.horizon >= 30).all() and (runs.horizon <= 3000).all()
    # Uniform between log 30 and log 3000: mean 5.7, deviation log(100) / sqrt(12); four standard errors.
    log = runs.horizon.log()
    deviation = math.log(100) / math.sqrt(12)
    assert abs(float(log.mean()) - math.log(300)) < 4 * deviation / math.sqrt(800)
    assert abs(float(log.std()) - deviation) < 0.1
    unknown = torch.isinf(runs.num_steps)
    assert torch.equal(runs.num_steps[~unknown], runs.horizon[~unknown])
    spread = math.sqrt(probability * (1 - probability) / 800)
    assert abs(float(unknown.float().mean()) - probability) <= 4 * spread


def test_horizon_is_at_least_one_truncation():
    unroll = make_unroll("mlp", task=[("min_steps", 1), ("max_steps", 2)])
    assert (start(unroll)[1].horizon == 3).all()


def test_replaced_runs_are_the_named_ones():
    unroll = make_unroll("mlp")
    _, old = start(unroll, num_problems=4, copies=1)
    fresh = unroll.start(stack_weights(2), 2, 1, torch.Generator().manual_seed(9))
    mixed = replace_runs(old, fresh, torch.tensor([3, 1]))
    for name, value in by_path(mixed).items():
        one, other = by_path(old)[name], by_path(fresh)[name]
        assert torch.equal(value, torch.stack([one[0], other[1], one[2], other[0]])), name


def test_draws_do_not_depend_on_the_runs_being_compiled_or_differentiated():
    flat = [
        by_path(make_unroll("mlp", **options).draw(start(make_unroll())[1], 2, torch.Generator().manual_seed(0)))
        for options in ({}, {"mode": "compiled"}, {"second_derivatives": True})
    ]
    assert_trees_equal(flat[0], flat[1])
    assert_trees_equal(flat[0], flat[2])


def test_flatness_term_counts_by_its_coefficient():
    objectives = (ObjectiveConfig(train_weight=0.5), WITH_FLATNESS)
    found = []
    for objective in objectives:
        unroll = make_unroll("mlp", objective=objective)
        weights, runs = start(unroll)
        draws = make_unroll("mlp").draw(runs, COPIES, torch.Generator().manual_seed(2))
        leaves = {name: value.requires_grad_() for name, value in weights.items()}
        found.append(
            unroll.unroll(leaves, runs, draws if objective.flatness.name else draws._replace(noise={}), COPIES)[1]
        )
    without, with_it = found
    assert (without.flatness == 0).all() and (with_it.flatness != 0).all()
    steps = torch.arange(1.0, 4.0)[:, None].expand(3, 4)
    weight = step_weight(WITH_FLATNESS, steps, runs.horizon)
    expected = without.objective + weight * 0.3 * with_it.flatness
    torch.testing.assert_close(with_it.objective, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", ["train", "meta"])
def test_objective_may_ask_for_one_loss_only(split):
    objective = ObjectiveConfig(train_weight=float(split == "train"), meta_weight=float(split == "meta"))
    unroll = make_unroll("mlp", objective=objective)
    weights, runs = start(unroll)
    leaves = {name: value.requires_grad_() for name, value in weights.items()}
    _, losses = unroll.run(leaves, runs, COPIES, torch.Generator().manual_seed(2))
    steps = torch.arange(1.0, 4.0)[:, None].expand(3, 4)
    weight = step_weight(objective, steps, runs.horizon)
    torch.testing.assert_close(losses.objective, weight * getattr(losses, split))
    assert split == "meta" or (losses.meta == 0).all()


def test_a_diverged_run_counts_as_the_bound_and_leaves_the_others_alone():
    unroll = make_unroll("mlp")
    weights, runs = start(unroll)
    draws = unroll.draw(runs, COPIES, torch.Generator().manual_seed(2))
    leaves = {name: value.requires_grad_() for name, value in weights.items()}
    good, expected = unroll.unroll(leaves, runs, draws, COPIES)
    broken = runs._replace(params={name: value.clone() for name, value in runs.params.items()})
    broken.params["layers.1.bias"][1] = math.nan
    _, losses = unroll.unroll(leaves, broken, draws, COPIES)
    assert (losses.train[:, 1] == 6).all() and (losses.meta[:, 1] == 6).all()
    others = [0, 2, 3]
    torch.testing.assert_close(losses.objective[:, others], expected.objective[:, others])


def test_step_weight_is_the_formula():
    config = ObjectiveConfig(base_weight=0.2, final_weight=2.0, final_power=3.0)
    weights = step_weight(config, torch.tensor([1.0, 50.0, 100.0]), torch.tensor(100.0))
    torch.testing.assert_close(weights, torch.tensor([0.2 + 2e-6, 0.2 + 2 / 8, 2.2]))


def test_losses_are_clipped_on_both_sides_and_not_a_number_is_bad():
    losses = torch.tensor([1.5, -1.5, 7.0, -7.0, math.inf, -math.inf, math.nan])
    assert clip_loss(losses, 6.0).tolist() == [1.5, -1.5, 6.0, -6.0, 6.0, 6.0, 6.0]


def test_the_error_counts_by_its_weight_beside_the_loss():
    generator = torch.Generator().manual_seed(0)
    weights = stack_weights(4)
    losses = {}
    for error_weight in (None, 1.0, 3.0):
        objective = ObjectiveConfig(error_weight=error_weight, base_weight=1.0, final_weight=0.0)
        unroll = make_unroll(objective=objective)
        runs = unroll.start(weights, 4, 1, generator.manual_seed(0))
        runs, steps = unroll.run(weights, runs, 1, generator)
        losses[error_weight] = steps.objective
    error = losses[1.0] - losses[None]
    batch = unroll.distribution.batch_size
    torch.testing.assert_close((error * batch).round(), error * batch, atol=1e-3, rtol=0)  # counts of wrong classes
    assert 0 < error.mean() < 1
    torch.testing.assert_close(losses[3.0] - losses[None], 3 * error, atol=1e-4, rtol=0)
