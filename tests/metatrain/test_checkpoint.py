import dataclasses
import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from flatopt.metatrain import MetaTrainConfig, TaskConfig
from flatopt.metatrain.checkpoint import RunState, latest, load, save
from flatopt.metatrain.curriculum import Progress
from flatopt.metatrain.runs import Draws, Runs
from flatopt.tasks import Problems

FILES = ("state.safetensors", "run.json", "manifest.json")


def make_runs(generator):
    problem = Problems(**{name: torch.arange(2) for name in Problems._fields})._replace(params={}, param_scales={})
    params = {"w": torch.randn(2, 3, generator=generator), "b": torch.zeros(2)}
    states = {"w": {"exp_avg": torch.ones(2, 3)}, "b": {}}
    numbers = (torch.full((2,), float(value)) for value in range(4))
    return Runs(problem, params, states, {}, *numbers, {"a": torch.full((2, 3), 7.0)})


def make_state(update=3):
    generator = torch.Generator().manual_seed(update)
    shared = torch.randn(4, generator=generator)
    return RunState(
        config=MetaTrainConfig(recipe="test", rule="adam", tasks=(TaskConfig(name="mlp"),), num_updates=9),
        update=update,
        seconds=0.1 + update,
        num_dropped=1,
        smoothed_loss=1 / 3,
        best_validation={"update": 2, "loss": 0.1},
        progress=Progress(stage=1, num_evals=2, improved=True),
        sessions=[{"command": "test", "first_update": 0}],
        weights={"z": shared, "a/b": torch.randn(2, 3, generator=generator).T},
        average={"z": shared, "a/b": torch.zeros(3, 2)},
        best={"z": shared, "a/b": torch.ones(3, 2)},
        optimizer={"z": {"step": torch.tensor(3.0)}, "a/b": {}},
        estimator={
            "empty": torch.zeros(0, 5),
            "wide": torch.tensor(1.5).expand(2, 2),
            "double": torch.randn(3, generator=generator, dtype=torch.float64),
            "flags": torch.tensor([True, False]),
            "count": torch.tensor(2**60),
            "half": torch.tensor([float("nan"), float("inf")], dtype=torch.bfloat16),
            "family": {"runs": make_runs(generator), "sums": {"z": shared}},
        },
        generator=generator.get_state(),
    )


TREES = ("weights", "average", "best", "optimizer", "estimator", "generator")


def assert_same(actual, expected):
    for field in dataclasses.fields(RunState):
        left, right = getattr(actual, field.name), getattr(expected, field.name)
        if field.name not in TREES:
            assert left == right, field.name
            continue
        # Structures are equal if types, keys and their order are.
        assert str(pytree.tree_structure(left)) == str(pytree.tree_structure(right)), field.name
        for one, other in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def damage(path, name, how):
    file = path / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "longer":
        file.write_bytes(content + b"x")
    else:  # one bit in the middle
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_load_gives_back_every_value_dtype_and_order(tmp_path):
    state = make_state()
    assert_same(load(save(state, tmp_path)), state)


def test_a_state_without_inner_runs_yet_is_saved_as_such(tmp_path):
    state = RunState.fresh(dataclasses.replace(make_state().config, rule="rnnprop"))
    loaded = load(save(state, tmp_path))
    assert loaded.estimator is None and state.estimator is None
    assert_same(dataclasses.replace(loaded, estimator={}), dataclasses.replace(state, estimator={}))


def test_a_tuple_of_unknown_type_is_not_saved(tmp_path):
    state = dataclasses.replace(make_state(), estimator={"draws": Draws(*(torch.zeros(1),) * 4)})
    with pytest.raises(AssertionError, match="Draws cannot be saved"):
        save(state, tmp_path)


def test_what_an_update_changes_in_place_does_not_reach_the_state_before_it(tmp_path):
    state = load(save(make_state(), tmp_path))
    before = state.before_update()
    for tree in (state.weights, state.average, state.optimizer["z"]):
        for value in tree.values():
            value.zero_()
    state.update += 1
    assert_same(before, make_state())


def test_shipped_weights_are_the_best_then_the_average_then_the_last():
    state = make_state()
    assert state.shipped_weights is state.best
    unvalidated = dataclasses.replace(state, best={})
    assert unvalidated.shipped_weights is unvalidated.average
    assert dataclasses.replace(unvalidated, average={}).shipped_weights is state.weights


def test_latest_is_the_newest_and_two_are_kept(tmp_path):
    assert latest(tmp_path / "none") is None
    for update in (2, 9, 10, 100):
        save(make_state(update), tmp_path)
    assert latest(tmp_path).update == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-00000010", "update-00000100"]


def test_what_a_user_keeps_beside_the_checkpoints_stays_and_is_not_taken_for_one(tmp_path):
    shutil.copytree(save(make_state(10), tmp_path), tmp_path / "update-00000010-before-change")
    (tmp_path / "update-00000050.zip").touch()
    (tmp_path / "update-00000060").touch()
    for update in (20, 30, 40):
        save(make_state(update), tmp_path)
    kept = ["update-00000010-before-change", "update-00000030", "update-00000040"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "update-00000050.zip", "update-00000060"]
    assert latest(tmp_path).update == 40


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "longer", "flipped"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(tmp_path, caplog, name, how):
    save(make_state(1), tmp_path)
    path = save(make_state(2), tmp_path)
    damage(path, name, how)
    with pytest.raises(ValueError, match="update-00000002"):
        load(path)
    with caplog.at_level(logging.WARNING):
        assert_same(latest(tmp_path), make_state(1))
    assert "update-00000002" in caplog.text


def test_no_flipped_bit_passes_unseen(tmp_path):
    path, random_ = save(make_state(), tmp_path), random.Random(0)
    for name in FILES:
        content = (path / name).read_bytes()
        for _ in range(60):
            flipped = bytearray(content)
            flipped[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
            (path / name).write_bytes(flipped)
            try:
                assert_same(load(path), make_state())  # space that became another space
            except ValueError as error:
                assert str(path) in str(error)
        (path / name).write_bytes(content)


@pytest.mark.parametrize("calls_before_the_crash", range(6))
def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch, calls_before_the_crash):
    save(make_state(1), tmp_path)
    calls = iter(range(100))
    fsync, rename = os.fsync, Path.rename

    def crash_or(function):
        def call(*arguments):
            if next(calls) == calls_before_the_crash:
                raise InterruptedError
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash_or(fsync))
        patch.setattr(Path, "rename", crash_or(rename))
        with pytest.raises(InterruptedError):
            save(make_state(2), tmp_path)
    # Three files, their folder, the name, the folder above: whole from the fifth on.
    assert_same(latest(tmp_path), make_state(2 if calls_before_the_crash == 5 else 1))

    save(make_state(3), tmp_path)
    assert latest(tmp_path).update == 3
    assert all(path.name.startswith("update-") for path in tmp_path.iterdir())


def test_a_damaged_later_checkpoint_does_not_outlive_the_resumed_run(tmp_path):
    save(make_state(5), tmp_path)
    damage(save(make_state(8), tmp_path), "state.safetensors", "truncated")
    save(make_state(6), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-00000005", "update-00000006"]


def test_the_same_update_can_be_written_over(tmp_path):
    damage(save(make_state(5), tmp_path), "run.json", "empty")
    save(make_state(5), tmp_path)
    assert_same(latest(tmp_path), make_state(5))


def test_a_checkpoint_of_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("flatopt.metatrain.checkpoint.FORMAT_VERSION", 1)
    path = save(make_state(), tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format_version 1 is not 6"):
        load(path)


def test_nothing_but_safetensors_and_json_is_written(tmp_path):
    path = save(make_state(), tmp_path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    for name in ("run.json", "manifest.json"):
        json.loads((path / name).read_text())
