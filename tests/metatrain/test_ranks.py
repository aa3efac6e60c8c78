"""One run by several processes, on the CPU with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import by_path, make_unroll, stack_weights

import flatopt
from flatopt.metatrain._ranks import Ranks
from flatopt.metatrain.checkpoint import latest
from flatopt.metatrain.cli import main
from flatopt.metatrain.runs import map_tree

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

# Three problems for two processes, and validation of one family.
RUN = ["run", "smoke", "num_updates=6", "tasks.mlp.num_tasks=3", "validate_every=3", "validation.num_tasks=1"]


class Alone(Ranks):
    """One of several processes, without the others: the sum is its own part."""

    def sum(self, tree):
        return tree


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(flatopt.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "flatopt.metatrain", *arguments, "--out", str(out)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


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


def test_a_restarted_command_goes_on_from_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    arguments = [*RUN, "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(arguments) == 0
    assert "6 of 6 updates done" in capsys.readouterr().err


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
