from __future__ import annotations

import math
import multiprocessing
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from flatopt.evaluate import models
from flatopt.evaluate._cache import NotComputed, RunCache
from flatopt.evaluate._code import code_hash, describe


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
    monkeypatch.setitem(__import__("sys").modules, name, module)
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
