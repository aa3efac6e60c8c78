import json
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from flatopt.flatness import MEASURES
from flatopt.metatrain import RECIPES, EstimatorConfig, FlatnessConfig, MetaTrainConfig, ObjectiveConfig, TaskConfig
from flatopt.pretrained import list_pretrained, load_pretrained
from flatopt.rules import RULES, Adam


def make_config(**changes):
    defaults = {
        "recipe": "test",
        "rule": "adam",
        "rule_options": {"betas": [0.8, 0.9]},
        "estimator": EstimatorConfig(std=0.02),
        "tasks": (TaskConfig(name="mlp"), TaskConfig(name="cnn", num_tasks=4)),
        "objective": ObjectiveConfig(flatness=FlatnessConfig(name="trace", coefficient=0.1)),
        "num_updates": 12,
    }
    return MetaTrainConfig(**{**defaults, **changes})


@pytest.mark.parametrize("config", [make_config(), *(recipe() for recipe in RECIPES.values())])
def test_json_round_trip_is_the_identity(config):
    assert MetaTrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_called_by_its_own_name(name):
    assert RECIPES[name]().recipe == name


@pytest.mark.parametrize(
    ("assignment", "read", "expected"),
    [
        ("num_updates=100", lambda config: config.num_updates, 100),
        ("meta_lr=1e-3", lambda config: config.meta_lr, 1e-3),
        ("meta_lr=1", lambda config: config.meta_lr, 1.0),
        ("estimator.std=.5", lambda config: config.estimator.std, 0.5),
        ("tasks.cnn.num_tasks=8", lambda config: [task.num_tasks for task in config.tasks], [32, 8]),
        ('tasks=[{"name": "lstm"}]', lambda config: config.tasks, (TaskConfig(name="lstm"),)),
        ("max_grad_norm=none", lambda config: config.max_grad_norm, None),
        ("max_grad_norm=2", lambda config: config.max_grad_norm, 2.0),
        ("compile=true", lambda config: config.compile, True),
        ("objective.flatness.name=none", lambda config: config.objective.flatness.name, None),
        ("recipe=a=b", lambda config: config.recipe, "a=b"),
        (
            "objective.flatness.options.num_matvecs=3",
            lambda config: config.objective.flatness.options["num_matvecs"],
            3,
        ),
        ("curriculum.stages=[]", lambda config: config.curriculum.stages, ()),
        ("imitation.probabilities=[0, 0.5]", lambda config: config.imitation.probabilities, (0.0, 0.5)),
        ("rule_options.lr=0.5", lambda config: config.build_rule(), Adam(lr=0.5, betas=(0.8, 0.9))),
    ],
)
def test_override_sets_one_value_with_its_type(assignment, read, expected):
    value = read(make_config().override([assignment]))
    assert value == expected
    assert type(value) is type(expected)


def choices(kinds):
    """Return name, field and value of every choice of a ``Literal`` field."""
    return [
        (name, field.name, value)
        for name, kind in kinds.items()
        for field in fields(kind)
        if get_origin(hint := get_type_hints(kind)[field.name]) is Literal
        for value in get_args(hint)
    ]


def test_there_are_choices_to_test():
    assert ("l2o-scale", "global_pool", "last") in choices(RULES)
    assert ("spectral-quadrature", "function", "positive") in choices(MEASURES)


@pytest.mark.parametrize(("name", "field", "value"), choices(RULES))
def test_every_choice_of_a_rule_comes_from_recipe_checkpoint_and_command_line(name, field, value):
    config = make_config(rule=name, rule_options={field: value})
    typed = make_config(rule=name, rule_options={}).override([f"rule_options.{field}={value}"])
    for one in (config, typed, MetaTrainConfig.from_json(config.to_json())):
        assert getattr(one.build_rule(), field) == value


@pytest.mark.parametrize(("name", "field", "value"), choices(MEASURES))
def test_every_choice_of_a_measure_comes_from_recipe_checkpoint_and_command_line(name, field, value):
    config = make_config(objective=ObjectiveConfig(flatness=FlatnessConfig(name=name, options={field: value})))
    typed = make_config().override(
        [f"objective.flatness.name={name}", f"objective.flatness.options.{field}={value}"],
    )
    for one in (config, typed, MetaTrainConfig.from_json(config.to_json())):
        assert getattr(one.objective.flatness.build_measure(), field) == value


def test_bounds_hold_for_a_configuration_made_in_python():
    with pytest.raises(ValueError, match=r"EstimatorConfig.std must be a number above 0, not -1"):
        EstimatorConfig(std=-1.0)
    with pytest.raises(ValueError, match="FlatnessConfig.schedule must be one of always, first, last, every, not"):
        FlatnessConfig(schedule="never")


def test_overrides_are_checked_together():
    # Either alone would put the shortest horizon above the longest.
    config = make_config().override(["tasks.mlp.min_steps=5000", "tasks.mlp.max_steps=9000"])
    assert (config.tasks[0].min_steps, config.tasks[0].max_steps) == (5000, 9000)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("num_update=1", "unknown key 'num_update': valid are recipe, rule, .*num_updates"),
        ("estimator.stdev=1", "unknown key 'estimator.stdev': valid are .*estimator.std"),
        ("tasks.rnn.num_tasks=1", "unknown key 'tasks.rnn.num_tasks': valid are tasks.mlp.KEY, tasks.cnn.KEY"),
        ("tasks.mlp.size=1", "unknown key 'tasks.mlp.size': valid are .*tasks.mlp.num_tasks"),
        ("tasks.mlp=1", "unknown key 'tasks.mlp'"),
        ("rule_options.beta=1", "unknown key 'rule_options.beta': valid are .*rule_options.betas"),
        ("rule_options.betas=[1]", "rule_options.betas must be a list of 2, not"),
        ("seed.low=1", "seed has no parts"),
        ("rule=sgd", "unknown rule 'sgd': valid are .*adam"),
        ("num_updates=ten", "num_updates must be an integer of at least 1, not 'ten'"),
        ("num_updates=1.5", "num_updates must be an integer of at least 1, not 1.5"),
        ("num_updates=true", "num_updates must be an integer of at least 1, not True"),
        ("num_updates=none", "num_updates must be an integer of at least 1, not None"),
        ("meta_lr=fast", "meta_lr must be a number above 0, not 'fast'"),
        ("compile=maybe", "compile must be true or false, not 'maybe'"),
        ("tensorboard=1", "tensorboard must be true or false, not 1"),
        ("objective=1", "objective must be an object, not 1"),
        ("num_updates=0", "num_updates must be an integer of at least 1, not 0"),
        ("tasks.mlp.max_steps=1", "tasks.mlp: max_steps must be at least min_steps, 150, not 1"),
        ("tasks=[]", "tasks must name at least one family"),
        ('tasks=[{"name": "mlp"}, {"name": "mlp"}]', "tasks must have distinct names"),
        ("ema_decay=1", "ema_decay must be a number of at least 0 and below 1, not 1"),
        ("meta_lr=-1", "meta_lr must be a number above 0, not -1"),
        ("meta_lr=NaN", "meta_lr must be"),
        ("meta_lr=inf", "meta_lr must be"),
        ("max_grad_norm=0", "max_grad_norm must be a number above 0 or none, not 0"),
        (
            "objective.flatness.name=sharpness",
            "objective.flatness: unknown name 'sharpness' of a measure: valid are none, top-eigenvalue, trace, ",
        ),
        (
            "objective.flatness.options.rho=1",
            "objective.flatness: unknown key 'options.rho': valid are options.num_matvecs",
        ),
        (
            "objective.flatness.options.num_matvecs=0.5",
            "flatness: options.num_matvecs must be an integer, not 0.5",
        ),
        ("objective.flatness.options.num_matvecs=0", "objective.flatness: options: num_matvecs must be > 0, got 0"),
        (
            "objective.flatness.schedule=never",
            "flatness.schedule must be one of always, first, last, every, not 'never'",
        ),
        ("objective.flatness.coefficient=-1", "flatness.coefficient must be a number of at least 0, not -1"),
        ("objective.flatness.name=local-entropy", "no meaningful value, and persistent-es only evaluates"),
        (
            "objective.inner_flatness.fraction=0",
            "objective.inner_flatness.fraction must be a number above 0 and at most 1",
        ),
        ("objective.meta_split=test", "objective.meta_split must be one of meta, train, not 'test'"),
        ("objective.transform=exp", "objective.transform must be one of none, log, not 'exp'"),
        ("curriculum.stages=[200,100]", "curriculum: stages must increase"),
        ("curriculum.stages=[100]", "validate_every must be at least 1 with a curriculum"),
        ('imitation.teachers=["sgd"]', r"imitation.teachers\[0\] must be one of adam, rmsprop, not 'sgd'"),
        (
            "imitation.probabilities=[2]",
            r"imitation.probabilities\[0\] must be a number of at least 0 and at most 1",
        ),
        ("meta_optimizer=sgd", "meta_optimizer must be one of adam, not 'sgd'"),
        ("validation.patience=0", "validation.patience must be an integer of at least 1 or none, not 0"),
        ("num_updates", "'num_updates' is not of the form key=value"),
        ("estimator.second_derivatives=true", "persistent-es has no use for second_derivatives: leave second_deriv"),
        ("estimator.name=guess", "estimator.name must be one of persistent-es, truncated-es, truncated-backprop, not"),
        ("rule_options.betas.low=1", "'rule_options.betas.low': rule_options.betas has no parts"),
    ],
)
def test_a_wrong_override_says_what_is_valid(assignment, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_config().override([assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("assignment", ["std=0.03", 'only=["constants.*"]', "families_per_update=1"])
def test_what_backpropagation_does_not_use_cannot_be_set(assignment):
    backprop = make_config().override(["estimator.name=truncated-backprop", "estimator.std=0.01"])
    message = r"estimator: .* no use for .*: leave std=0.01 families_per_update=null only=\[\]"
    with pytest.raises(ValueError, match=message):
        backprop.override([f"estimator.{assignment}"])
    backprop.override([f"estimator.{assignment}", "estimator.name=truncated-es"])


def test_backpropagation_compiles_nothing_but_validation():
    backprop = make_config().override(["estimator.name=truncated-backprop", "estimator.std=0.01"])
    with pytest.raises(ValueError, match="truncated-backprop compiles nothing but validations"):
        backprop.override(["compile=true", "validation.compile=true"])
    assert backprop.override(["compile=true", "validation.compile=true", "validate_every=5"]).compile


STAGED = ["validate_every=5", "estimator.truncation_length=20", "curriculum.stages=[40, 60]"]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("curriculum.stages=[40, 50]", r"stages must be multiples of 20, mlp's truncation, not \[40, 50\]"),
        ("tasks.cnn.truncation_length=15", r"multiples of 15, cnn's truncation, not \[40, 60\]"),
        ("validation.patience=1", "a curriculum has no use for validation.patience: leave none"),
        ("validation.num_steps=7", "no use for validation.num_steps"),
        ("validation.num_lengths=3", "no use for validation.num_lengths"),
    ],
)
def test_a_curriculum_refuses_what_it_would_round_or_ignore(assignment, message):
    assert make_config().override(STAGED).curriculum.stages == (40, 60)
    with pytest.raises(ValueError, match=message):
        make_config().override([*STAGED, assignment])


@pytest.mark.parametrize("name", list_pretrained())
def test_configurations_of_shipped_weights_are_valid(name):
    config = MetaTrainConfig.from_json(json.dumps(load_pretrained(name).training))
    assert config.rule == load_pretrained(name).rule.name


def test_a_configuration_from_before_an_option_is_one_without_it():
    data = json.loads(make_config().to_json())
    assert data["tasks"][0].pop("num_train", 0) is None
    assert MetaTrainConfig.from_json(json.dumps(data)) == make_config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("seed"), "missing key 'seed'"),
        (lambda data: data["estimator"].pop("std"), "missing key 'estimator.std'"),
        (lambda data: data["tasks"][1].pop("weight"), "missing key 'tasks.cnn.weight'"),
        (lambda data: data.update(speed=1), "unknown key 'speed'"),
        (lambda data: data.update(seed="1"), "seed must be an integer of at least 0"),
    ],
)
def test_from_json_is_strict(change, message):
    data = json.loads(make_config().to_json())
    change(data)
    with pytest.raises(ValueError, match=message):
        MetaTrainConfig.from_json(json.dumps(data))


def test_from_json_refuses_what_is_not_json():
    with pytest.raises(ValueError, match="configuration: not valid JSON"):
        MetaTrainConfig.from_json("{")
