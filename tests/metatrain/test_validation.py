from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from small import RULE, assert_trees_equal, make_unroll, random_weights

from flatopt.metatrain import RECIPES, FlatnessConfig, ObjectiveConfig
from flatopt.metatrain.checkpoint import latest
from flatopt.metatrain.cli import main
from flatopt.metatrain.inner_training import Families
from flatopt.metatrain.recipes import smoke
from flatopt.metatrain.unroll import Unroll, can_compile
from flatopt.metatrain.validation import Validation, build_validation
from flatopt.pretrained import load_folder


def families(*unrolls) -> Families:
    return Families(unrolls=unrolls)


def make_validation(**changes) -> Validation:
    return Validation(
        **{"families": families(make_unroll(objective=ObjectiveConfig())), "num_steps": None, "seed": 3, **changes}
    )


@pytest.fixture(scope="module")
def validation():
    """Recorded once for all tests."""
    return make_validation()


def test_the_same_weights_have_the_same_loss_and_others_another(validation):
    weights = random_weights()
    state = torch.get_rng_state()
    first = validation(weights, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert validation({name: value.clone().requires_grad_() for name, value in weights.items()}, 6) == first
    assert validation(random_weights(seed=4), 6) != first
    assert Validation(families=validation.families, num_steps=6, seed=3)(weights) == first
    assert Validation(families=validation.families, num_steps=6, seed=4)(weights) != first


def test_loss_is_that_of_the_meta_split_in_the_last_truncation(validation):
    weights = random_weights()
    unroll, generator = validation.families.unrolls[0], torch.Generator().manual_seed(3)
    repeated = {name: value.expand(3, *value.shape) for name, value in weights.items()}
    runs = unroll.start(repeated, 3, 1, generator, 6)
    assert (runs.horizon == 6).all()
    for _ in range(2):
        runs, losses = unroll.run(repeated, runs, 1, generator)
    assert validation(weights, 6).loss == pytest.approx(float(losses.meta.mean()))
    assert (runs.step == 6).all()


def test_families_have_seeds_of_their_own_and_count_by_their_weight(validation):
    first = validation.families.unrolls[0]
    two = [replace(first, task=replace(first.task, name=name, weight=weight)) for name, weight in (("a", 1), ("b", 3))]
    weights = random_weights()
    loss, values = make_validation(families=families(*two))(weights, 6)
    assert values["a"] == validation(weights, 6).loss
    assert values["b"] == make_validation(families=families(two[1]), seed=4)(weights, 6).loss != values["a"]
    assert loss == pytest.approx((values["a"] + 3 * values["b"]) / 4)


def end_losses(unroll, weights, told, length, seed=3):
    """Mean meta loss of the last truncation of runs whose horizon is told or not, from a loop of steps."""
    generator = torch.Generator().manual_seed(seed)
    repeated = {name: value.expand(3, *value.shape) for name, value in weights.items()}
    runs = unroll.start(repeated, 3, 1, generator, length)
    runs = runs._replace(num_steps=runs.horizon if told else torch.full_like(runs.horizon, math.inf))
    for _ in range(length // 3):
        runs, losses = unroll.run(repeated, runs, 1, generator)
    return float(losses.meta.mean())


@pytest.mark.parametrize(("untold", "lengths"), [(0.25, None), (0.0, None), (1.0, None), (0.25, 3)])
def test_relative_loss_is_the_formula(untold, lengths):
    task = [("unknown_horizon_probability", untold), ("min_steps", 3), ("max_steps", 12)]
    unroll = make_unroll(objective=ObjectiveConfig(), task=task)
    validation = make_validation(families=families(unroll), relative=True, num_lengths=lengths or 1)
    weights, untrained = random_weights(), RULE.init_weights(torch.Generator().manual_seed(0))
    expected = 0.0
    for length in (3, 6, 12) if lengths else (12,):
        for told, share in ((True, 1 - untold), (False, untold)):
            ratio = end_losses(unroll, weights, told, length) / end_losses(unroll, untrained, told, length)
            expected += share * math.log(ratio) / (lengths or 1)
    assert validation(weights).loss == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert validation(untrained).loss == 0.0


def test_the_untrained_rule_is_measured_once(monkeypatch):
    validation, weights = make_validation(relative=True), random_weights()
    calls = []
    monkeypatch.setattr(
        Unroll, "run", lambda self, *arguments, run=Unroll.run: calls.append(1) or run(self, *arguments)
    )
    first = validation(weights, 6)
    assert len(calls) == 4  # two truncations each
    assert validation(weights, 6) == first
    assert len(calls) == 6
    validation(weights, 3)  # another length, as in the next stage of a curriculum
    assert len(calls) == 8


def test_relative_validation_of_long_truncations_looks_at_the_end_of_a_run():
    options = ["estimator.truncation_length=400", "validation.relative=true", "validation.num_lengths=2"]
    config = smoke().override(options)
    validation = build_validation(config, torch.device("cpu"))
    assert validation.families.unrolls[0].truncation_length == 20
    assert validation.relative and validation.num_lengths == 2


def test_compiled_validation_takes_the_step_of_training():
    config = smoke().override(["compile=true", "validation.relative=true", "objective.train_weight=0.5"])
    modes = {}
    for choice in ("none", "true"):
        chosen = config.override([f"validation.compile={choice}"])
        (unroll,) = build_validation(chosen, torch.device("cpu")).families.unrolls
        modes[choice] = unroll.mode, unroll.objective.train_weight
    assert modes["none"] == ("recorded", 0.0)
    assert modes["true"] == ("compiled" if can_compile(torch.device("cpu")) else "recorded", 0.5)


def test_validation_of_a_configuration_is_plain():
    objective = ObjectiveConfig(
        train_weight=1.0,
        transform="log",
        meta_split="train",
        flatness=FlatnessConfig(name="trace", coefficient=1.0),
        inner_flatness=FlatnessConfig(name="squared-trace", coefficient=0.1),
    )
    config = smoke().override(["tasks.tabular.random_scaling=2", "validation.num_tasks=5", "validation.num_steps=15"])
    config = type(config)(**{**vars(config), "objective": objective})
    validation = build_validation(config, torch.device("cpu"))
    (unroll,) = validation.families.unrolls
    assert unroll.objective == ObjectiveConfig(inner_flatness=objective.inner_flatness)
    assert unroll.task.num_tasks == 5 and validation.num_steps == 15
    assert unroll.distribution.reparametrization_range == (1.0, 1.0)


def test_the_size_of_the_training_set_is_that_of_the_configuration():
    config = smoke().override(["tasks.tabular.num_train=70"])
    (unroll,) = build_validation(config, torch.device("cpu")).families.unrolls
    problems = unroll.distribution.sample_problems(5, torch.Generator().manual_seed(0))
    assert problems.num_train.tolist() == [70] * 5


def test_a_recipe_with_validation_trains_exports_the_best_and_resumes_bit_for_bit(tmp_path):
    options = ["num_updates=12", "validate_every=3", "validation.num_tasks=2", "validation.num_steps=10", "seed=5"]
    assert main(["run", "smoke", *options, "--out", str(tmp_path / "whole")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["update"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert list(losses) == [3, 6, 9, 12]
    checkpoint = latest(tmp_path / "whole" / "checkpoints")
    best = min(losses, key=losses.__getitem__)
    assert checkpoint.best_validation == {"update": best, "loss": losses[best]}
    assert main(["export", str(tmp_path / "whole"), "--to", str(tmp_path / "export")]) == 0
    learned = load_folder(tmp_path / "export")
    validation = build_validation(checkpoint.config, torch.device("cpu"))
    assert validation(learned.weights).loss == pytest.approx(losses[best], rel=1e-5)
    assert f"the best by validation, of update {best} (moving average)" in learned.card


@pytest.mark.slow
def test_published_training_resumes_bit_for_bit_over_stages_and_imitation(tmp_path):
    options = [
        "num_updates=14",
        "validate_every=2",
        "checkpoint_every=1",
        "curriculum.stages=[10,20]",
        "curriculum.min_num_eval=1",
        "validation.num_tasks=1",
        "imitation.probabilities=[0.5]",
        "estimator.truncation_length=5",
        "meta_lr=2",  # too much: validation gets worse, and the stages go by
    ]
    config = RECIPES["l2o-scale"]().override(options)
    tasks = ['tasks=[{"name": "mlp", "num_tasks": 1, "min_steps": 10, "max_steps": 10}]']
    assert main(["run", "l2o-scale", *options, *tasks, "--out", str(tmp_path / "whole")]) == 0
    whole = latest(tmp_path / "whole" / "checkpoints")
    assert whole.progress.stage == 1 and config.curriculum.stages == (10, 20)

    cut = tmp_path / "cut"
    assert main(["run", "l2o-scale", *options, *tasks, "--out", str(cut)]) == 0
    kept = sorted((cut / "checkpoints").iterdir())
    (kept[-1] / "run.json").write_text("")  # the last checkpoint is damaged: the run goes on from the one before
    assert main(["resume", str(cut)]) == 0
    resumed = latest(cut / "checkpoints")
    assert len(resumed.sessions) == 2
    for group in ("weights", "best", "optimizer", "estimator", "generator"):
        assert_trees_equal(getattr(whole, group), getattr(resumed, group))
    assert (resumed.progress, resumed.best_validation) == (whole.progress, whole.best_validation)
