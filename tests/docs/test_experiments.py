"""The scripts behind the log run, in their fast form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flatopt.tasks import load_images

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "docs" / "experiments").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_experiment_runs_and_prints_finite_numbers(script: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    try:
        load_images("fashion-mnist", 28, standardize=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--fast"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d\.\d", done.stdout) and "nan" not in done.stdout, done.stdout
