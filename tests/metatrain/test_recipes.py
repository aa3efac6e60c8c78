from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flatopt.metatrain import RECIPES, FlatnessConfig
from flatopt.metatrain.estimators import build_estimator
from flatopt.metatrain.families import FAMILIES

NAMES = [f"{rule}{end}" for rule in ("l2o-dm", "rnnprop", "l2o-scale") for end in ("", "-hessian", "-entropy")]


def test_every_published_recipe_is_tested_here():
    assert set(NAMES) == RECIPES.keys() - {"smoke", "flat-v2"}


@pytest.mark.parametrize("name", NAMES)
def test_variants_differ_by_their_penalty_alone(name):
    config = RECIPES[name]()
    plain = RECIPES[config.rule]()
    flatness = FlatnessConfig()
    same = replace(config, recipe=plain.recipe, objective=replace(config.objective, flatness=flatness))
    assert same == plain
    assert (config.objective.flatness == flatness) == (name == config.rule)


@pytest.mark.parametrize("name", NAMES)
def test_one_update_of_each_recipe_is_finite_and_measures_its_penalty(name):
    # The same rule and objective on a smaller net.
    tasks = ['tasks=[{"name": "mlp", "num_tasks": 1}]', "estimator.truncation_length=2", "imitation.probabilities=[]"]
    config = RECIPES[name]().override(tasks)
    estimator, generator = build_estimator(config, torch.device("cpu")), torch.Generator()
    weights = config.build_rule().init_weights(generator.manual_seed(0))
    meta, _ = estimator.estimate(weights, estimator.init(weights, generator), generator)
    assert all(value.isfinite().all() for value in meta.gradient.values())
    assert (meta.metrics["mlp/flatness"] > 0) == (name != config.rule)


def test_the_optimizee_is_the_published_one():
    distribution = FAMILIES["mnist-mlp"]
    generator = torch.Generator().manual_seed(0)
    problems = distribution.sample_problems(2, generator)
    flat = torch.cat([value[0].reshape(-1) for value in problems.params.values()])
    assert len(flat) == 15_910
    torch.testing.assert_close(flat.std(), torch.tensor(0.01), rtol=0.02, atol=0)
    assert all(value.std() > 0.005 for value in problems.params.values())  # biases too
    batch = distribution.sample_batches(problems, 3, "train", generator)
    assert batch.inputs.shape == (3, 2, 128, 784)
    assert batch.inputs.min() == 0 and batch.inputs.max() == 1
    assert (problems.label_noise == 0).all() and (problems.num_train == 50_000).all()
    assert torch.equal(problems.label_permutation, torch.arange(10).expand(2, 10))
