"""Rules, families and recipes of a user: made known by a module on the command line, or by an installed package."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from flatopt import FlatOpt, load_pretrained
from flatopt._extensions import extend
from flatopt.flatness import MEASURES
from flatopt.metatrain import RECIPES
from flatopt.metatrain.cli import main
from flatopt.metatrain.families import FAMILIES
from flatopt.rules import RULES

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from flatopt.flatness import GradientNorm
from flatopt.metatrain import MetaTrainConfig, ObjectiveConfig, FlatnessConfig, TaskConfig
from flatopt.rules import UpdateRule
from flatopt.tasks import MLP, Images, TaskDistribution


@dataclass(frozen=True, kw_only=True)
class LearnedStep(UpdateRule):
    """Momentum with a learned step size."""

    name: ClassVar[str] = "learned-step"

    def init_weights(self, generator=None):
        return {"log_step": torch.tensor(-3.0)}

    def init_state(self, weights, param, generator=None):
        return {"step": param.new_zeros(()), "exp_avg": torch.zeros_like(param)}

    def observe(self, weights, state, grad, *_):
        return {"exp_avg": 0.5 * (state["exp_avg"] + grad)}, []

    def propose(self, weights, state, *_):
        return {}, -weights["log_step"].exp() * state["exp_avg"]

    def step_size(self, weights, control, context):
        return weights["log_step"].exp().expand(len(control))


def learned_step():
    """Return the training of a learned step size."""
    return MetaTrainConfig(
        recipe="learned-step",
        rule="learned-step",
        tasks=(TaskConfig(name="tiny", num_tasks=2, min_steps=4, max_steps=8),),
        objective=ObjectiveConfig(flatness=FlatnessConfig(name="my-norm", coefficient=0.1)),
        num_updates=2,
        meta_lr=0.1,
    )


RULES = {"learned-step": LearnedStep}
MEASURES = {"my-norm": GradientNorm}
FAMILIES = {"tiny": TaskDistribution(model=MLP(sizes=(64, 4, 10)), data=Images(sources=(("digits", 1.0),)))}
RECIPES = {"learned-step": learned_step}
'''


@pytest.fixture
def registries(monkeypatch):
    """Leave the registries and the modules as they were."""
    found = {"RULES": RULES, "MEASURES": MEASURES, "FAMILIES": FAMILIES, "RECIPES": RECIPES}
    before = {name: dict(registry) for name, registry in found.items()}
    yield found
    sys.modules.pop("my_module", None)
    for name, registry in found.items():
        registry.clear()
        registry.update(before[name])


@pytest.fixture
def here(tmp_path, monkeypatch, registries):
    """The current folder, with a module of the user in it."""
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    importlib.invalidate_caches()
    return tmp_path


def forget(registries):
    """Do what a new process does: know nothing of the module."""
    sys.modules.pop("my_module", None)
    for registry in registries.values():
        for name in ("learned-step", "my-norm", "tiny"):
            registry.pop(name, None)


def test_a_rule_a_family_a_measure_and_a_recipe_of_a_module_train_export_and_step(here, registries, capsys):
    assert main(["--import", "my_module", "run", "learned-step", "--out", "run"]) == 0
    assert main(["export", "run", "--to", "export", "--import", "my_module"]) == 0
    assert "learned-step" in (here / "export" / "README.md").read_text()
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FlatOpt([param], pretrained="export")
    param.grad = torch.full((3,), 2.0)
    optimizer.step()
    step = load_pretrained("export").weights["log_step"].exp()
    assert step != torch.tensor(-3.0).exp()
    torch.testing.assert_close(param.detach(), 1 - step.expand(3))


def test_a_whole_checkpoint_of_an_unknown_rule_says_so(here, registries, capsys, caplog):
    assert main(["--import", "my_module", "run", "learned-step", "--out", "run"]) == 0
    sys.modules.pop("my_module")
    del RULES["learned-step"]
    capsys.readouterr()
    assert main(["export", "run", "--to", "export"]) == 2
    error = capsys.readouterr().err
    assert "is whole" in error and "unknown rule 'learned-step'" in error and "--import MODULE" in error
    assert "not whole" not in error + caplog.text
    forget(registries)
    assert main(["export", "run", "--to", "export", "--import", "my_module"]) == 0


def test_an_installed_package_needs_no_word(here, registries):
    assert main(["--import", "my_module", "run", "learned-step", "--out", "run"]) == 0
    assert main(["export", "run", "--to", "export"]) == 0
    forget(registries)
    with pytest.raises(ValueError, match="'learned-step' is unknown; .*flatopt.rules.RULES"):
        load_pretrained("export")
    install(here, "mine", "my_module")
    assert load_pretrained("export").rule.name == "learned-step"


def install(folder, package, module):
    """Do what an installer does with a package that names a module in an entry point."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[flatopt]\n{package}-entry = {module}\n")
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("not_there_mod", None, "No module named 'not_there_mod'"),
        ("broken_syntax", "def", "SyntaxError in broken_syntax.py, line 1: invalid syntax"),
        ("broken_code", "1 / 0", "ZeroDivisionError in broken_code.py, line 1: division by zero"),
        ("broken_attr:RULES", "RULES = {}", "No module named 'broken_attr:RULES'"),
        ("broken_list", "RULES = ['x']", "broken_list: RULES must be a dict whose keys are names"),
        (
            "clashing",
            "from flatopt.metatrain.families import FAMILIES as GIVEN\n"
            "FAMILIES = {'theirs': GIVEN['cnn']}\nRECIPES = {'smoke': print}",
            "clashing: there is something else called 'smoke' in RECIPES",
        ),
    ],
)
def test_a_package_that_fails_is_left_out_with_one_warning(here, registries, capsys, module, source, reason):
    assert main(["--import", "my_module", "run", "learned-step", "--out", "run"]) == 0
    assert main(["export", "run", "--to", "export"]) == 0
    forget(registries)
    if source:
        (here / f"{module.partition(':')[0]}.py").write_text(source)
    package = f"theirs-{module.partition(':')[0]}"  # each warns once
    install(here, package, module)
    install(here, "zmine", "my_module")
    with pytest.warns(UserWarning) as caught:
        assert main(["list"]) == 0
    message = f"flatopt goes on without entry point '{package}-entry' of {package}: {reason}"
    assert [str(one.message) for one in caught] == [message]
    assert "learned-step" in capsys.readouterr().out
    forget(registries)
    assert load_pretrained("export").rule.name == "learned-step"
    assert "theirs" not in FAMILIES
    with pytest.raises(ValueError, match="--import no_module: No module named 'no_module'"):
        extend(registries, ["no_module"])


def test_a_module_that_is_not_there_or_takes_a_name_is_one_line(here, registries, capsys):
    assert main(["--import", "no_module", "list"]) == 2
    assert "flatopt-train: --import no_module: No module named 'no_module'" in capsys.readouterr().err
    for source, message in (
        (
            "from flatopt.rules import Adam\nRULES = {'rnnprop': Adam}",
            "my_module: RULES['rnnprop'] calls itself 'adam'",
        ),
        ("RULES = ['x']", "my_module: RULES must be a dict whose keys are names"),
        ("RULES = {1: 'x'}", "my_module: RULES must be a dict whose keys are names"),
        ("class Rule: pass\nRULES = {'x': Rule}", "my_module: RULES['x'] must be a class with name = 'x'"),
        ("from flatopt.rules import Adam\nRULES = {'adam': Adam()}", "my_module: RULES['adam'] must be a class with"),
        ("RECIPES = {'x': 3}", "my_module: RECIPES['x'] must be a function that returns a MetaTrainConfig"),
        ("RECIPES = {'smoke': print}", "my_module: there is something else called 'smoke' in RECIPES"),
    ):
        sys.modules.pop("my_module", None)
        (here / "my_module.py").write_text(source + "\n#" + "x" * len(source))  # another size: no stale bytecode
        assert main(["--import", "my_module", "list"]) == 2
        assert message in capsys.readouterr().err


OTHER = """
from dataclasses import dataclass, replace
from flatopt.metatrain import MetaTrainConfig, TaskConfig
from flatopt.metatrain.families import FAMILIES as GIVEN
from flatopt.tasks import Tabular

@dataclass(frozen=True, kw_only=True)
class Measurements(Tabular):
    pass

def mine():
    tasks = (TaskConfig(name="measurements"), TaskConfig(name="regresion"), TaskConfig(name="regression"))
    return MetaTrainConfig(recipe="mine", rule="l2o-dm", tasks=tasks, num_updates=1)

FAMILIES = {"measurements": replace(GIVEN["tabular"], data=Measurements(num_features=20, num_classes=5, seed=1))}
RECIPES = {"mine": mine}
"""


def test_list_says_which_data_are_ones_own_and_which_family_is_unknown(here, registries, capsys):
    (here / "my_module.py").write_text(OTHER)
    assert main(["--import", "my_module", "list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mine ")]
    assert line.endswith("  Measurements, unknown family 'regresion', generated tables")
    assert main(["--import", "my_module", "run", "mine", "--out", "run"]) == 2
    assert "unknown task 'regresion'" in capsys.readouterr().err


def test_a_module_may_hold_the_registries_themselves(here, registries):
    (here / "my_module.py").write_text("from flatopt.rules import RULES\n")
    before = dict(RULES)
    extend({"RULES": RULES}, ["my_module"])
    assert before == RULES
