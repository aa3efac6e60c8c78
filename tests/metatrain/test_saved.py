"""What a checkpoint says of a run: enough to go on with the same, or a refusal, at the start where that is possible."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from toy_metatrain import StepSize, toy_config, toy_estimator

from flatopt.flatness import MEASURES, HutchinsonTrace
from flatopt.metatrain import RECIPES, FlatnessConfig, ObjectiveConfig, TaskConfig, train
from flatopt.metatrain._saved import check_rule, definitions
from flatopt.metatrain.checkpoint import RunState, latest
from flatopt.metatrain.cli import main
from flatopt.metatrain.families import FAMILIES
from flatopt.rules import RULES

LARGE = ["seed=1764270000000000000", "validation.seed=9223372036854775807", "rule_options.initial_step=1e19"]


def test_a_run_with_large_numbers_is_read_back(tmp_path):
    config = toy_config(num_updates=1).override(LARGE)
    train(config, tmp_path, estimator=toy_estimator())
    assert latest(tmp_path / "checkpoints").config == config


@pytest.mark.parametrize("start", ["fresh", "resume"])
def test_a_configuration_that_could_not_be_read_back_is_refused_before_anything_is_made(tmp_path, start):
    if start == "resume":
        train(toy_config(num_updates=1), tmp_path / "run", estimator=toy_estimator())
    config = toy_config(log_every=10**19)
    with pytest.raises(ValueError, match="configuration: not valid JSON: number out of range"):
        train(config, tmp_path / "run", estimator=toy_estimator(), resume=start == "resume")
    assert (tmp_path / "run").exists() == (start == "resume")


@dataclass(frozen=True, kw_only=True)
class OtherDefault(StepSize):
    initial_step: float = 0.5


OtherDefault.__qualname__ = StepSize.__qualname__  # the same class, after a change of the code


@dataclass(frozen=True, kw_only=True)
class OtherTrace(HutchinsonTrace):
    pass


FAMILY = FAMILIES["mlp"]
OBJECTIVE = ObjectiveConfig(inner_flatness=FlatnessConfig(name="trace", coefficient=0.1))


@pytest.mark.parametrize(
    ("registry", "name", "value", "message"),
    [
        (RULES, "toy", OtherDefault, "rule=toy is not .*: it was 'initial_step=0.05.*, now it is 'initial_step=0.5"),
        (FAMILIES, "mine", replace(FAMILY, batch_size=32), r"tasks.mine is not .*'batch_size=64.*'batch_size=32"),
        (FAMILIES, "mine", None, "tasks.mine is not .*now it is 'unknown'"),
        (MEASURES, "trace", OtherTrace, "objective.inner_flatness is not .*'HutchinsonTrace.*'OtherTrace"),
    ],
)
def test_what_stands_for_something_else_than_when_the_run_began_is_named(
    tmp_path, capsys, monkeypatch, registry, name, value, message
):
    monkeypatch.setitem(FAMILIES, "mine", FAMILY)
    config = toy_config(num_updates=1, tasks=(TaskConfig(name="mine"),), objective=OBJECTIVE)
    out, commands = tmp_path / "run", (["resume", "OUT"], ["export", "OUT", "--to", "OUT-export"])
    train(config, out, estimator=toy_estimator())
    assert latest(out / "checkpoints").config == config
    capsys.readouterr()
    monkeypatch.setitem(registry, name, value)
    if value is None:
        monkeypatch.delitem(registry, name)
    for command in commands:
        assert main([word.replace("OUT", str(out)) for word in command]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is whole, but" in line and re.search(message, line)


class Unprintable:
    """Has the repr of ``object``, with an address."""


def test_a_definition_does_not_depend_on_where_it_is_in_memory(monkeypatch):
    config, found = toy_config(), []
    for data in (Unprintable(), Unprintable()):
        monkeypatch.setitem(FAMILIES, "quadratics", replace(FAMILIES["mlp"], data=data))
        found.append(definitions(config))
    assert found[0] == found[1] and "Unprintable object>" in found[0]["tasks.quadratics"]


@dataclass(frozen=True, kw_only=True)
class WithDict(StepSize):
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WithList(StepSize):
    sizes: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class WithInfinity(StepSize):
    bound: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class WithOtherHint(StepSize):
    sizes: tuple[int, int] = (1, 2, 3)  # type: ignore[assignment]


class Undecorated(StepSize):
    kind: ClassVar[str] = "no field"
    beta: float = 0.9


@dataclass(frozen=True, kw_only=True)
class OfWeights(StepSize):
    dtype: ClassVar[Any] = torch.int64

    def init_weights(self, generator=None):
        return {**StepSize.init_weights(self, generator), "count": torch.ones(2, dtype=self.dtype)}


@dataclass(frozen=True, kw_only=True)
class OfDoubles(OfWeights):
    dtype: ClassVar[Any] = torch.float64


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (WithDict, "unhashable type: 'dict'"),
        (WithList, "unhashable type: 'list'"),
        (WithInfinity, "Out of range float values are not JSON compliant"),
        (WithOtherHint, "sizes must be a list of 2, not"),
        (Undecorated, "beta would be lost: Undecorated needs @dataclass"),
        (OfWeights, "'count' must be float32, got 'torch.int64'"),
        (OfDoubles, "'count' must be float32, got 'torch.float64'"),
    ],
)
def test_a_rule_that_could_not_be_exported_does_not_begin(tmp_path, capsys, monkeypatch, rule, message):
    config = toy_config(tasks=(TaskConfig(name="mlp"),))
    monkeypatch.setitem(RULES, "toy", rule)
    monkeypatch.setitem(RECIPES, "mine", lambda: config)
    with pytest.raises(ValueError, match=f"rule=toy could not be exported: .*{message}"):
        train(config, tmp_path / "run", estimator=toy_estimator())
    assert main(["run", "mine", "--dry-run", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True, kw_only=True)
class Part:
    width: int = 3


@dataclass(frozen=True, kw_only=True)
class Nested(StepSize):
    part: Part = Part()


def test_what_can_be_exported_begins():
    check_rule(Nested(), Nested().init_weights())
    for recipe in RECIPES.values():
        RunState.fresh(recipe())
