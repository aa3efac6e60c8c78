"""A run folder belongs to one training process as long as that lives."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_metatrain import toy_config, toy_estimator

import flatopt
from flatopt.metatrain import train
from flatopt.metatrain._lock import locked
from flatopt.metatrain._log import read_metrics
from flatopt.metatrain.checkpoint import latest
from flatopt.metatrain.cli import main


@pytest.fixture
def busy(tmp_path):
    """A folder, and a process that trains in it."""
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(Path(flatopt.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flatopt", "train", "run", "smoke", "num_updates=10000", "checkpoint_every=1"]
    command += ["log_every=1", "--out", str(out)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "update-00000003").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    yield out, process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_in_one_line_until_the_first_is_dead(busy, capsys):
    out, process = busy
    assert main(["resume", str(out)]) == 2
    assert capsys.readouterr().err == f"flatopt-train: {out} is in use: another process trains in it\n"
    process.kill()
    process.wait()
    end = latest(out / "checkpoints").update + 2
    assert main(["resume", str(out), f"num_updates={end}"]) == 0
    assert [line["update"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, end + 1))


def test_two_that_begin_at_once_do_not_share_a_folder(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="run is in use: another process trains in it"):
        train(toy_config(num_updates=1), tmp_path / "run", estimator=toy_estimator())
    train(toy_config(num_updates=1), tmp_path / "run", estimator=toy_estimator())  # what is left is no run


def test_a_folder_without_a_run_is_not_touched_by_resuming(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        train(toy_config(), tmp_path / "none", estimator=toy_estimator(), resume=True)
    assert not any(tmp_path.iterdir())


def test_a_file_system_without_locks_does_not_hinder_a_run(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    train(toy_config(num_updates=1), tmp_path / "run", estimator=toy_estimator())
