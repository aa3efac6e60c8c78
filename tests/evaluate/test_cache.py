from __future__ import annotations

import ast
import math
import multiprocessing
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flatopt import load_pretrained
from flatopt.evaluate import _code, models
from flatopt.evaluate._cache import NotComputed, RunCache
from flatopt.evaluate._code import code_hash, describe
from flatopt.evaluate._training import results
from flatopt.evaluate.contestants import default_name, learned_contestant


def test_cache_computes_once_and_survives_a_new_process(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"loss": math.inf}

    for _ in range(3):
        cache = RunCache(tmp_path / "runs.sqlite3")
        assert cache.get({"lr": 0.1, "seed": 0}, compute) == {"loss": math.inf}
        assert cache.get({"seed": 0, "lr": 0.1}, compute) == {"loss": math.inf}
    assert len(calls) == 1
    assert cache.items() == [({"lr": 0.1, "seed": 0}, {"loss": math.inf})]


def test_cached_only_computes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite3"
    RunCache(path).get({"seed": 0}, lambda: {"value": 0})
    cache = RunCache(path, cached_only=True)
    assert cache.get({"seed": 0}, lambda: pytest.fail("computed")) == {"value": 0}
    with pytest.raises(NotComputed):
        cache.get({"seed": 1}, lambda: pytest.fail("computed"))


def fill(path: Path, first: int) -> None:
    cache = RunCache(path)
    for seed in range(first, first + 20):
        cache.get({"seed": seed}, lambda seed=seed: {"value": seed})  # type: ignore[misc]


def test_processes_share_a_cache_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite3"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(path, first)) for first in (0, 10, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(result["value"] for _, result in RunCache(path).items()) == list(range(40))


def test_a_description_shows_every_argument_of_nested_partials() -> None:
    build = partial(models.small_start, build=partial(models.mlp, width=20))
    assert describe(build) == {"call": "small_start", "build": {"call": "mlp", "width": 20}}


SOURCE = """
'''A module.'''
SIZE = 3
class Layer:
    def scale(self, x: int) -> int:
        return x * SIZE
def unrelated():
    return 1
def build(x):
    '''Build.'''
    return Layer().scale(x)
"""


def hash_of(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"flatopt.evaluate.made_{abs(hash(source))}"
    path = folder / f"{abs(hash(source))}.py"
    path.write_text(source)
    module = ModuleType(name)
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, path, "exec"), vars(module))
    return code_hash(module.build)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("SIZE = 3", "SIZE = 4", False),
        ("x * SIZE", "x + SIZE", False),
        ("Layer().scale(x)", "Layer().scale(x + 1)", False),
        ("return 1", "return 2", True),
        ("Build.", "Build it all.", True),
        ("x: int) -> int", "x: float) -> float", True),
        ("    return Layer", "    # a comment\n    return Layer", True),
    ],
)
def test_a_hash_follows_what_the_code_computes_and_not_its_prose(
    old: str, new: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in SOURCE
    first, second = (hash_of(source, tmp_path, monkeypatch) for source in (SOURCE, SOURCE.replace(old, new)))
    assert (first == second) is same


def test_the_key_of_a_learned_optimizer_follows_the_code_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    contestant = learned_contestant("FlatOpt", load_pretrained(default_name()), horizon_known=True)
    before = contestant.identity()
    sources = _code._sources
    changed = "flatopt.rules._driver.apply_rule", "flatopt._averages.advance_averages", "flatopt.optimizer.FlatOpt"
    for name in changed:

        def with_change(root: Any, room: Any, name: str = name) -> dict[str, str]:
            found = sources(root, room)
            return found | {name: found[name] + "changed"} if name in found else found

        monkeypatch.setattr(_code, "_sources", with_change)
        assert contestant.identity() != before


def test_a_hash_does_not_depend_on_the_version_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = code_hash(results)  # which notes the version in what it returns
    _code._sources.cache_clear()
    monkeypatch.setattr(torch, "__version__", "another")
    assert code_hash(results) == expected


def pythons() -> list[str]:
    """Return the supported interpreters of this machine, this one among them."""
    versions = Path.home() / ".pyenv" / "versions"
    found = [str(path) for minor in range(10, 15) for path in sorted(versions.glob(f"3.{minor}.*/bin/python"))[:1]]
    named = [shutil.which(f"python3.{minor}") for minor in range(10, 15)]
    return [sys.executable, *found, *filter(None, named)]


def test_a_hash_does_not_depend_on_the_version_of_python() -> None:
    code = f"""
import ast, importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("_code", {_code.__file__!r})
module = sys.modules["_code"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sources = sorted(pathlib.Path({str(Path(models.__file__).parents[1])!r}).rglob("*.py"))
trees = [module._Bare().visit(ast.parse(path.read_text("utf-8"))) for path in sources]
print(sys.version_info[:2], module._hash(*map(module._in_words, trees)))
"""
    told = {}
    for python in pythons():
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
        if done.returncode == 0:  # else: a shim of pyenv, without a Python behind it
            version, _, told_hash = done.stdout.strip().rpartition(" ")
            told[version] = told_hash
    assert str(sys.version_info[:2]) in told
    assert len(set(told.values())) == 1, told


# Each is what some version of ast.unparse writes in its own way.
@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "for a, b in c: pass",
            "Module(body=[For(target=Tuple(elts=[Name(id='a', ctx=Store()), Name(id='b', ctx=Store())], ctx=Store()), "
            "iter=Name(id='c', ctx=Load()), body=[Pass()])])",
        ),
        (
            "f'{None:.{1}f}'",
            "Module(body=[Expr(value=JoinedStr(values=[FormattedValue(value=Constant(), conversion=-1, "
            "format_spec=JoinedStr(values=[Constant(value='.'), FormattedValue(value=Constant(value=1), "
            "conversion=-1), Constant(value='f')]))]))])",
        ),
        ("def f(): 0", "Module(body=[FunctionDef(name='f', args=arguments(), body=[Expr(value=Constant(value=0))])])"),
    ],
)
def test_code_in_words_is_the_same_text_under_every_python(source: str, words: str) -> None:
    assert _code._in_words(ast.parse(source)) == words
