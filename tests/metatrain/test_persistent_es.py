"""The estimator on runs of ``x <- a x + w + noise`` with loss ``x^2 / 2``, whose meta-gradient has a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from small import assert_trees_equal, make_unroll, random_weights
from torch import Tensor

from flatopt.metatrain import TaskConfig
from flatopt.metatrain.estimators.persistent_es import PersistentES, chosen_names, signal_to_noise, variance_of_mean
from flatopt.metatrain.inner_training import Families
from flatopt.metatrain.runs import map_tree

DECAY, WEIGHT, STD = 0.9, 0.5, 0.05


class ToyRuns(NamedTuple):
    x: Tensor
    step: Tensor
    horizon: Tensor
    problem: Tensor


class ToyLosses(NamedTuple):
    objective: Tensor
    train: Tensor
    meta: Tensor
    flatness: Tensor


@dataclass(frozen=True, kw_only=True)
class ToyUnroll:
    """The part of ``Unroll`` that the estimator uses."""

    task: TaskConfig
    truncation_length: int = 2
    num_truncations: tuple[int, int] = (4, 4)
    log: list[dict[str, Tensor]] = field(default_factory=list)

    def start(self, weights_N, num_pairs, copies, generator, num_steps=None):
        low, high = self.num_truncations
        truncations = torch.randint(low, high + 1, (num_pairs,), generator=generator)
        problem = torch.randn(num_pairs, generator=generator)
        zeros = torch.zeros(copies * num_pairs)
        self.log.append({"started": problem})
        horizon = (truncations * self.truncation_length).float()
        return ToyRuns(zeros, zeros, horizon.repeat(copies), problem.repeat(copies))

    def run(self, weights_N, runs, copies, generator):
        noise = 0.1 * torch.randn(self.truncation_length, len(runs.x) // copies, generator=generator)
        noise = noise.repeat(1, copies)
        self.log.append({"weights": weights_N["w"].clone(), "noise": noise, "problem": runs.problem, "step": runs.step})
        losses = []
        for batch in noise:
            x = DECAY * runs.x + weights_N["w"] + batch
            runs = runs._replace(x=x, step=runs.step + 1)
            losses.append(x.square() / 2)
        loss = torch.stack(losses)
        return runs, ToyLosses(loss, loss, loss, loss)


def make_toy(name="toy", num_tasks=4, weight=1.0, num_truncations=(4, 4), truncation_length=2):
    shortest, longest = (truncation_length * number for number in num_truncations)
    task = TaskConfig(name=name, num_tasks=num_tasks, weight=weight, min_steps=shortest, max_steps=longest)
    return ToyUnroll(task=task, num_truncations=num_truncations, truncation_length=truncation_length)


def make_estimator(*unrolls, **options):
    return PersistentES(families=Families(unrolls=unrolls or [make_toy()]), std=STD, **options)


def begin(estimator, seed=0):
    weights = {"w": torch.tensor(WEIGHT)}
    generator = torch.Generator().manual_seed(seed)
    return weights, estimator.init(weights, generator), generator


def exact_gradient(num_steps: int) -> float:
    """Derivative of the mean loss of a run: ``E x_t = c_t w`` with ``c_t = a c_{t-1} + 1``; the noise drops out."""
    c, total = 0.0, 0.0
    for _ in range(num_steps):
        c = DECAY * c + 1
        total += c * c * WEIGHT
    return total / num_steps


def standard_errors_off(persistent: bool) -> float:
    """Distance of the mean estimate over all phases of a run from the exact gradient, in its standard errors."""
    num_pairs, num_repeats = 500, 20
    estimates = []
    for seed in range(num_repeats):
        unroll = make_toy(num_tasks=num_pairs)
        estimator = make_estimator(unroll, persistent=persistent)
        weights, state, generator = begin(estimator, seed)
        # A run's perturbations before the first update are not in its sum, so every run first begins anew.
        for _ in range(4):
            _, state = estimator.estimate(weights, state, generator)
        gradients = []
        for _ in range(4):  # each run once through all of its phases
            meta, state = estimator.estimate(weights, state, generator)
            gradients.append(meta.gradient["w"])
        estimates.append(torch.stack(gradients).mean())
    estimates = torch.stack(estimates)
    error = estimates.std() / num_repeats**0.5
    assert error < 0.02 * exact_gradient(8)  # sharp enough to tell
    return float((estimates.mean() - exact_gradient(8)).abs() / error)


def test_persistent_estimate_is_unbiased():
    assert standard_errors_off(persistent=True) < 4


def test_truncated_estimate_fails_the_same_test():
    assert standard_errors_off(persistent=False) > 4


def test_copies_of_a_pair_share_problem_and_batches_and_differ_by_sign():
    unroll = make_toy(num_tasks=5)
    estimator = make_estimator(unroll)
    weights, state, generator = begin(estimator)
    unroll.log.clear()
    for _ in range(6):
        _, state = estimator.estimate(weights, state, generator)
    for entry in unroll.log:
        for name in entry.keys() & {"noise", "problem", "step"}:
            first, second = entry[name].chunk(2, -1)
            assert torch.equal(first, second), name
        if "weights" in entry:
            plus, minus = entry["weights"].chunk(2)
            torch.testing.assert_close(plus + minus, torch.full((5,), 2 * WEIGHT))
            assert len(plus.unique()) == 5
            assert 0.2 * STD < float((plus - WEIGHT).abs().mean()) < 3 * STD
    pluses = torch.stack([entry["weights"][:5] for entry in unroll.log if "weights" in entry])
    assert len(pluses.unique()) == pluses.numel()  # drawn anew for every truncation


def test_estimate_is_the_formula():
    unroll = make_toy(num_tasks=3, num_truncations=(2, 5))
    estimator = make_estimator(unroll)
    weights, state, generator = begin(estimator)
    sums = torch.zeros(3)
    for _ in range(7):
        before = restore(state)
        unroll.log.clear()
        meta, state = estimator.estimate(weights, state, generator)
        run = unroll.log[-1]
        noise = run["weights"][:3] - WEIGHT
        done = (before.step >= before.horizon)[:3]
        sums = torch.where(done, torch.zeros(()), sums) + noise
        # A run that begins anew does so on another problem, from its start.
        assert (run["step"][:3][done] == 0).all()
        assert torch.equal(run["step"][:3][~done], before.step[:3][~done])
        assert torch.equal(run["problem"][:3] == before.problem[:3], ~done)
        torch.testing.assert_close(state["toy"]["sums"]["w"], sums)
        x = torch.where(done.repeat(2), torch.zeros(()), before.x)
        loss = torch.zeros(6)
        for batch in run["noise"]:
            x = DECAY * x + run["weights"] + batch
            loss += x.square() / 2 / 2
        slope = (loss[:3] - loss[3:]) / (2 * STD**2)
        torch.testing.assert_close(meta.gradient["w"], (sums * slope).mean(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(meta.loss, loss.mean())
        torch.testing.assert_close(meta.metrics["toy/train"], float(loss.mean()))


def restore(state, name="toy"):
    return state[name]["runs"]


def test_runs_begin_spread_over_their_horizons():
    unroll = make_toy(num_tasks=400, num_truncations=(10, 10))
    _, state, _ = begin(make_estimator(unroll))
    runs = restore(state)
    assert (runs.step % 2 == 0).all() and (runs.step < runs.horizon).all()
    assert torch.equal(runs.step[:400], runs.step[400:])
    counts = torch.bincount((runs.step[:400] / 2).long(), minlength=10)
    assert counts.min() > 20 and counts.max() < 70  # 40 expected, deviation 6
    # They have been trained up to there: E x_t = c_t w.
    c = (1 - DECAY**runs.step) / (1 - DECAY)
    assert float((runs.x - c * WEIGHT).abs().mean()) < 0.3
    assert (state["toy"]["sums"]["w"] == 0).all()


def test_whole_runs_start_at_once_and_begin_anew_in_every_update():
    """With truncations as long as the runs: nothing is run in advance, and perturbations are of one update only."""
    unroll = make_toy(num_tasks=3, num_truncations=(1, 1), truncation_length=7)
    estimator = make_estimator(unroll)
    weights, state, generator = begin(estimator)
    assert unroll.log == [] and state["toy"] == {}
    for _ in range(3):
        unroll.log.clear()
        meta, state = estimator.estimate(weights, state, generator)
        (run,) = [entry for entry in unroll.log if "noise" in entry]
        assert (run["step"] == 0).all() and state["toy"] == {}  # a checkpoint holds no runs that are over
        x, loss = torch.zeros(6), torch.zeros(6)
        for batch in run["noise"]:
            x = DECAY * x + run["weights"] + batch
            loss += x.square() / 2 / 7
        slope = (loss[:3] - loss[3:]) / (2 * STD**2)
        expected = (slope * (run["weights"][:3] - WEIGHT)).mean()
        torch.testing.assert_close(meta.gradient["w"], expected, rtol=1e-3, atol=1e-4)


def test_families_take_turns():
    unrolls = [make_toy(name, num_tasks=1) for name in ("a", "b", "c")]
    estimator = make_estimator(*unrolls, families_per_update=2)
    weights, state, generator = begin(estimator)
    seen = []
    for _ in range(4):
        meta, state = estimator.estimate(weights, state, generator)
        seen.append("".join(sorted(key[0] for key in meta.metrics if key.endswith("/train"))))
    assert seen == ["ab", "ac", "bc", "ab"]


def test_families_that_do_not_take_part_stay_as_they_are():
    estimator = make_estimator(make_toy("a"), make_toy("b"), families_per_update=1)
    weights, state, generator = begin(estimator)
    _, after = estimator.estimate(weights, state, generator)
    assert_trees_equal(state["b"], after["b"])
    assert not torch.equal(restore(state, "a").x, restore(after, "a").x)


def test_what_is_not_chosen_is_not_perturbed():
    names = ["constants.a", "constants.b", "matrices.weight"]
    assert chosen_names([], names) is None
    assert chosen_names(["constants.*", "matrices.weight"], names) == frozenset(names)
    with pytest.raises(ValueError, match="no weight is called 'vectors.*': there are constants.a, "):
        chosen_names(["constants.a", "vectors.*"], names)
    estimator = make_estimator(make_toy("a"), only=frozenset())
    weights, state, generator = begin(estimator)
    meta, after = estimator.estimate(weights, state, generator)
    assert not meta.gradient["w"].any()
    assert not torch.equal(restore(state, "a").x, restore(after, "a").x)
    up, down = restore(after, "a").x.chunk(2)
    assert torch.equal(up, down)


def test_families_count_by_their_weight():
    a, b = make_toy("a", weight=1.0), make_toy("b", weight=3.0)
    both = make_estimator(a, b)
    weights, state, _ = begin(both)
    meta, _ = both.estimate(weights, state, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    alone = [
        make_estimator(unroll).estimate(weights, state | {"turn": torch.tensor(0)}, generator) for unroll in (a, b)
    ]
    torch.testing.assert_close(meta.loss, (alone[0][0].loss + 3 * alone[1][0].loss) / 4)
    expected = (alone[0][0].gradient["w"] + 3 * alone[1][0].gradient["w"]) / 4
    torch.testing.assert_close(meta.gradient["w"], expected)


def test_variance_of_the_mean_is_that_of_the_estimates_one_by_one():
    generator = torch.Generator().manual_seed(0)
    slope, sums = torch.randn(6, generator=generator), {"a": torch.randn(6, 2, 3, generator=generator)}
    sums["b"] = torch.randn(6, generator=generator)
    estimates = torch.cat([(slope[:, None] * value.reshape(6, -1)) for value in sums.values()], 1)
    mean = {"all": estimates.mean(0)}
    variance = variance_of_mean(slope, sums, mean)
    assert variance == pytest.approx(float(estimates.var(0).sum()) / 6, rel=1e-5)
    assert signal_to_noise(mean, variance) == pytest.approx(float(mean["all"].square().sum()) / variance - 1)
    assert math.isnan(variance_of_mean(slope[:1], {"a": sums["a"][:1]}, mean))


@pytest.mark.parametrize(("signal", "expected"), [(0.0, 0.0), (0.5, 10 * 0.25)])
def test_signal_to_noise_is_nothing_in_the_mean_without_a_signal(signal, expected):
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        estimates = {"w": signal + torch.randn(10, 50, generator=generator)}
        mean = {"w": estimates["w"].mean(0)}
        found.append(signal_to_noise(mean, variance_of_mean(torch.ones(10), estimates, mean)))
    found = torch.tensor(found)
    # The inverse of a variance is larger than the inverse of its mean, by 1 + 2 / (9 * 50) for normal numbers.
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / 20 + 0.01 * (1 + expected)


def test_snr_of_an_update_counts_families_by_the_squares_of_their_shares():
    a, b = make_toy("a", num_tasks=5, weight=1.0), make_toy("b", num_tasks=7, weight=3.0)
    both = make_estimator(a, b)
    weights, state, generator = begin(both)
    meta, _ = both.estimate(weights, state, generator)
    variances = []
    for unroll in (a, b):
        run = unroll.log[-1]
        x, loss = restore(state, unroll.task.name).x, torch.zeros(())
        for batch in run["noise"]:
            x = DECAY * x + run["weights"] + batch
            loss = loss + x.square() / 4
        pairs = unroll.task.num_tasks
        estimates = (loss[:pairs] - loss[pairs:]) / (2 * STD**2) * (run["weights"][:pairs] - WEIGHT)
        variances.append(float(estimates.var()) / pairs)
        expected = float(estimates.mean()) ** 2 / variances[-1] - 1
        assert meta.metrics[f"{unroll.task.name}/snr"] == pytest.approx(expected, rel=0.02, abs=0.02)
    expected = float(meta.gradient["w"]) ** 2 / (variances[0] / 16 + variances[1] * 9 / 16) - 1
    assert meta.metrics["snr"] == pytest.approx(expected, rel=0.02, abs=0.02)


def test_estimates_repeat_from_a_copied_state_and_generator():
    estimator = PersistentES(families=Families(unrolls=[make_unroll("mlp", task=[("max_steps", 9)])]), std=0.05)
    weights, generator = random_weights(), torch.Generator().manual_seed(0)
    state = estimator.init(weights, generator)
    saved = map_tree(torch.clone, state), generator.get_state()
    ends = []
    for _ in range(2):
        for _ in range(4):  # long enough for runs to begin anew
            meta, state = estimator.estimate(weights, state, generator)
        ends.append((meta, state))
        state = map_tree(torch.clone, saved[0])
        generator.set_state(saved[1])
    assert_trees_equal(ends[0][0].gradient, ends[1][0].gradient)
    assert_trees_equal(ends[0][1], ends[1][1])
    assert ends[0][0].metrics == ends[1][0].metrics
    assert all(torch.isfinite(value).all() and value.abs().max() > 0 for value in meta.gradient.values())


def test_state_does_not_share_storage_with_the_weights():
    estimator = make_estimator()
    weights, state, generator = begin(estimator)
    meta, state = estimator.estimate(weights, state, generator)
    before = map_tree(torch.clone, (state, meta.gradient, meta.loss))
    weights["w"].zero_()
    assert_trees_equal((state, meta.gradient, meta.loss), before)


def test_what_is_recorded_in_the_preparation_serves_all_updates():
    shown = []

    def track(names, doing):
        for name in names:
            shown.append((doing, name))
            yield name

    unrolls = [make_unroll(name, task=[("max_steps", 9)]) for name in ("linear", "mlp")]
    estimator = PersistentES(families=Families(unrolls=unrolls), std=0.05, track=track)
    weights, generator = random_weights(), torch.Generator().manual_seed(0)
    before = generator.get_state()
    estimator.prepare(weights)
    assert torch.equal(generator.get_state(), before)
    recorded = [dict(unroll._recorder.graphs) for unroll in unrolls]
    state = estimator.init(weights, generator)
    for _ in range(4):
        _, state = estimator.estimate(weights, state, generator)
    assert [unroll._recorder.graphs for unroll in unrolls] == recorded
    assert [len(graphs) for graphs in recorded] == [1, 1]
    assert shown == [(doing, name) for doing in ("preparing", "first inner runs") for name in ("linear", "mlp")]
