from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flatopt.evaluate._cache import RunCache

pytest.importorskip("sklearn")

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from flatopt.evaluate._cache import RunCache
from flatopt.evaluate._cells import compute_cells
from flatopt.evaluate._evaluation import one_line
from flatopt.evaluate.benchmarks import BENCHMARKS
from flatopt.evaluate.contestants import baselines

def compute(benchmark, contestant, cache):
    if benchmark.name != BENCHMARKS[0].name:
        while not cache.items():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out
    return cache.get({"task": benchmark.name}, dict)

if __name__ == "__main__":
    with one_line("flatopt-eval", ""):
        compute_cells([(one, baselines()[0]) for one in BENCHMARKS[:4]], compute, RunCache(Path(sys.argv[1])), 2)
"""


def test_a_process_that_dies_ends_the_command_with_one_line_and_the_finished_runs_are_kept(tmp_path: Path) -> None:
    script, cache = tmp_path / "script.py", tmp_path / "runs.sqlite3"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, cache], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and f"goes on from the finished runs in {cache}" in done.stderr
    assert len(RunCache(cache).items()) == 1
