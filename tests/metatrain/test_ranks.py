"""One run by several processes, on the CPU with gloo."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from small import by_path, make_unroll, stack_weights

import flatopt
from flatopt.metatrain import _ranks, cli
from flatopt.metatrain._ranks import Ranks, agree, own_device
from flatopt.metatrain._session import describe_session
from flatopt.metatrain.checkpoint import RunState, latest, save
from flatopt.metatrain.cli import main
from flatopt.metatrain.recipes import RECIPES
from flatopt.metatrain.runs import map_tree
from flatopt.metatrain.trainer import _begin

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

# Three problems for two processes, and validation of one family.
RUN = ["run", "smoke", "num_updates=6", "tasks.tabular.num_tasks=3", "validate_every=3", "validation.num_tasks=1"]


class Alone(Ranks):
    """One of several processes, without the others: the sum is its own part."""

    def sum(self, tree):
        return tree


def launch(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(flatopt.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen([*launcher, *arguments], env=environment, stderr=subprocess.PIPE, text=True)


def start(out: Path, *arguments: str, torchrun: Sequence[str] = ()) -> subprocess.Popen[str]:
    return launch(*torchrun, "-m", "flatopt", "train", *arguments, "--out", str(out))


def test_parts_of_all_processes_add_up_to_a_run_of_one():
    unroll, weights = make_unroll("linear", mode="plain"), stack_weights(6)
    runs = unroll.start(weights, 3, 2, torch.Generator().manual_seed(1))
    expected = unroll.run(weights, runs, 2, torch.Generator().manual_seed(2))
    for size in (2, 5):  # of five processes two have nothing to do
        parts = [
            Alone(rank=rank, size=size).run(unroll, weights, runs, 2, torch.Generator().manual_seed(2))
            for rank in range(size)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = map_tree(torch.add, total, part)
        actual = by_path(total)
        for name, value in by_path(expected).items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)


def agreed(store: torch.distributed.Store, ranks: Sequence[int], size: int) -> list[str]:
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: agree(store, rank, size), ranks))


def test_processes_agree_on_a_new_name_whatever_dead_ones_left_in_the_store():
    store, size = torch.distributed.HashStore(), 3
    store.set("flatopt/1", "number of a process that is dead")
    names = [agreed(store, ranks, size) for ranks in ([0, 1, 2], [2, 1, 0], [1, 2, 0])]
    assert all(len(set(one)) == 1 for one in names)
    assert len({one[0] for one in names}) == 3


def test_the_first_process_waits_for_a_missing_one_for_a_bounded_time(monkeypatch):
    monkeypatch.setattr(_ranks, "TIMEOUT", timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"no word of the processes \[1\] of 2"):
        agree(torch.distributed.HashStore(), 0, 2)


def test_only_the_torchrun_that_began_a_run_goes_on_with_it(tmp_path, monkeypatch):
    config = RECIPES["smoke"]()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1234")
    state = RunState.fresh(config)
    state.update, state.sessions = 3, [describe_session(torch.device("cpu"), "test")]
    save(state, tmp_path / "checkpoints")
    with _begin(config, tmp_path, Ranks(), resume=False) as found:
        assert found.update == 3
    with (
        pytest.raises(ValueError, match="another configuration"),
        _begin(config.override(["seed=1"]), tmp_path, Ranks(), resume=False),
    ):
        pass
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "5678")
    with pytest.raises(ValueError, match="is not empty"), _begin(config, tmp_path, Ranks(), resume=False):
        pass
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(ValueError, match="is not empty"), _begin(config, tmp_path, Ranks(), resume=False):
        pass
    with _begin(config, tmp_path, Ranks(), resume=True) as found:
        assert found.update == 3


def test_backpropagation_is_refused_where_every_process_would_do_the_same(tmp_path):
    config = RECIPES["l2o-dm"]()
    with (
        pytest.raises(ValueError, match="not shared among processes"),
        _begin(config, tmp_path, Ranks(rank=0, size=2), resume=False),
    ):
        pass
    with _begin(config, tmp_path, Ranks(), resume=False) as found:
        assert found.update == 0


def test_what_the_first_process_refuses_all_do_and_it_alone_says_why(monkeypatch, capsys, tmp_path):
    """One of two processes, which hears what the other says."""
    said: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", said.append)
    with pytest.raises(OSError, match="no such folder"):
        Ranks(rank=0, size=2).share(lambda: Path(tmp_path, "absent").rename(tmp_path / "no such folder"))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects: objects.__setitem__(0, said[0][0]))
    with pytest.raises(ValueError, match="no such folder"):
        Ranks(rank=1, size=2).share(lambda: pytest.fail("made here"))
    monkeypatch.setattr(cli, "train", lambda *_, **__: Ranks(rank=1, size=2).share(lambda: None))
    assert main([*RUN, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
def test_where_the_first_process_fails_in_another_way_all_do(kind, monkeypatch):
    def fail():
        raise kind("x")

    said: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", said.append)
    with pytest.raises(kind):
        Ranks(rank=0, size=2).share(fail)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects: objects.__setitem__(0, said[0][0]))
    with pytest.raises(_ranks.LostProcessError, match=f"the first process of this run failed .{kind.__name__}"):
        Ranks(rank=1, size=2).share(lambda: pytest.fail("made here"))


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(device) for device in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_the_documented_commands_are_those_of_torchrun_and_of_ours():
    parse_args = importlib.import_module("torch.distributed.run").parse_args
    page = (Path(__file__).parents[2] / "docs" / "meta-training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:srun .*?)?torchrun (.*)$", page, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        launch = parse_args(shlex.split(line.replace('"$SLURM_NNODES"', "4")))
        assert launch.module and launch.training_script == "flatopt" and launch.training_script_args[0] == "train"
        arguments = cli._parse(launch.training_script_args[1:])
        assert arguments.device == "cuda" and arguments.out.name == "flat-v2"
        assert launch.standalone or (launch.rdzv_backend == "c10d" and launch.rdzv_id and launch.rdzv_endpoint)


LEAVES = """
import pathlib

import torch
from flatopt.metatrain._ranks import joined

with joined(torch.device("cpu")) as ranks:
    import torch.distributed.nn.functional  # as the compiler does
    ranks.sum(torch.ones(()))
for task in pathlib.Path("/proc/self/task").iterdir():
    assert "gloo" not in (task / "comm").read_text()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES, encoding="utf-8")
    process = launch(str(script))
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0, err


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one_and_one_of_them_writes(tmp_path):
    assert main([*RUN, "--out", str(tmp_path / "one")]) == 0
    process = start(tmp_path / "two", *RUN)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0, err
    assert err.count("smoke: ") == 1
    one, two = (latest(tmp_path / name / "checkpoints") for name in ("one", "two"))
    for name, value in by_path((one.weights, one.best)).items():
        torch.testing.assert_close(by_path((two.weights, two.best))[name], value, rtol=1e-3, atol=1e-5)
    assert one.best_validation["loss"] == pytest.approx(two.best_validation["loss"], rel=1e-3)
    assert torch.equal(one.generator, two.generator)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_torchrun_goes_on_from_the_last_checkpoint_when_any_process_dies(tmp_path):
    """Killed first one, then the other: what either leaves in the store of torchrun must not be taken for alive."""
    arguments = ["smoke", "num_updates=14", "tasks.tabular.num_tasks=3", "estimator.truncation_length=20"]
    process = start(tmp_path / "run", "run", *arguments, "checkpoint_every=1", torchrun=["--max-restarts", "2"])
    num_updates, dead = 0, set[int]()
    for rank in (1, 0):
        num_updates = wait_for_updates(tmp_path / "run", num_updates + 3, process)
        victim = pids_of_ranks(process.pid)[rank]
        assert victim not in dead
        os.kill(victim, signal.SIGKILL)
        dead.add(victim)
    err = process.communicate(timeout=200)[1]
    assert process.returncode == 0, err
    begun = re.findall(r"^smoke: .*?(\d+)(?: of 14)? updates", err, re.MULTILINE)
    assert len(begun) == 3 and begun[0] == "14" and 3 <= int(begun[1]) < int(begun[2]) < 14, err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(1, 15))
    whole = start(tmp_path / "whole", "run", *arguments)
    err = whole.communicate(timeout=200)[1]
    cut, whole = (latest(tmp_path / name / "checkpoints") for name in ("run", "whole"))
    for name, value in by_path((whole.weights, whole.average)).items():
        assert torch.equal(by_path((cut.weights, cut.average))[name], value), name


def wait_for_updates(out: Path, number: int, process: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
        if len(lines) >= number:
            return len(lines)
        time.sleep(0.02)
    pytest.fail(f"no {number} updates: {process.communicate(timeout=10)[1] if process.poll() is not None else 'hangs'}")


def pids_of_ranks(parent: int) -> dict[int, int]:
    """Return the processes that a torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            environment = (folder / "environ").read_bytes().split(b"\0") if is_child else []
        except OSError:  # gone
            continue
        ranks = [int(entry.removeprefix(b"RANK=")) for entry in environment if entry.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = int(folder.name)
    return found
