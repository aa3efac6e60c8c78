"""What stands on the pages of the documentation runs: ``python`` and ``console`` blocks, in their order on the page.

A page is turned into one program that keeps the line numbers: Python as it is, each command as a call of the shell.
Commands that take minutes, or that change the machine, are replaced by the table ``INSTEAD``.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
import torch
from torchvision_import import make_torchvision_importable

from flatopt import LearnedRule
from flatopt.rules import L2ODM

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("tutorials/*.md"))]

REPRODUCTION = "flatopt-eval reproduction --fast --seeds 1 --tasks 'digits'"
PENALTY = (
    "flatopt-train run l2o-dm --out runs/squared-trace objective.flatness.name=squared-trace "
    "objective.flatness.coefficient=0.1 objective.flatness.options.num_matvecs=2 objective.flatness.schedule=last "
    "objective.flatness.fraction=0.5"
)
SMOKE = "flatopt-train run smoke --out {} num_updates=2 checkpoint_every=1"
INSTEAD: dict[str, str | None] = {
    # They install, or test everything: `.ci/run` does both.
    "pip install .": None,
    "pip install '.[train]'": None,
    "pip install '.[eval]'": None,
    "make check": None,
    ".venv/bin/pre-commit install": None,
    ".venv/bin/python -m pytest tests/rules": None,
    # The same in seconds.
    "make demo": "python -m flatopt demo --out demo-output --seeds 1 --steps 5",
    "flatopt-train run smoke --out runs/smoke": SMOKE.format("runs/smoke"),
    "flatopt-train run flat-v2 --out runs/flat-v2": SMOKE.format("runs/flat-v2"),
    "flatopt-train run flat-v2 --out runs/mine meta_lr=1e-3": SMOKE.format("runs/mine") + " meta_lr=1e-3",
    "flatopt-train run l2o-dm-hessian --out runs/l2o-dm-hessian": SMOKE.format("runs/l2o-dm-hessian"),
    "flatopt-train export runs/mine --to my-weights": (
        SMOKE.format("runs/mine") + " && flatopt-train export runs/mine --to my-weights"
    ),
    PENALTY: f"{PENALTY} num_updates=1",
    "flatopt-train run smoke --out runs/look tensorboard=true": SMOKE.format("runs/look") + " tensorboard=true",
    "flatopt-train resume runs/look num_updates=60": "flatopt-train resume runs/look num_updates=3",
    "tensorboard --logdir runs/look/tensorboard": "ls runs/look/tensorboard/events*",  # a server, which does not end
    "flatopt-eval reproduction --fast --out runs/eval/repro-fast": f"{REPRODUCTION} --out runs/eval/repro-fast",
    "flatopt-eval reproduction --seeds 10 --out runs/eval/reproduction": None,  # the line above without --fast
    "flatopt-eval reproduction --split meta --learned-only --sets runs/a/export runs/b/export --out runs/eval/sweep": (
        f"{REPRODUCTION} --split meta --learned-only --sets l2o-dm l2o-dm-hessian --out runs/eval/sweep"
    ),
}
"""What runs in place of a command: a fast form of it, or nothing."""

NEEDS = {
    "flatness.md": ("matplotlib",),
    "replace-adam.md": ("sklearn",),
    "lightning.md": ("lightning",),
    "integrations.md": ("timm.optim",),
    "hf-trainer.md": ("accelerate", "transformers.trainer"),
}
"""Modules that a page needs, beyond those that flatopt requires."""

# Names that short examples take for granted, and the shell.
PREAMBLE = """
import subprocess, torch
def shell(command):
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\\n{done.stdout}\\n{done.stderr}"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
inputs, targets = torch.randn(16, 20), torch.randint(3, (16,))
batches, num_epochs, num_steps = [(inputs, targets)], 2, 10
"""


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the first line, language and text of every block that runs."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(python|console)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text[: block.start(2)].count("\n"), block.group(1), block.group(2)


def commands(text: str) -> list[str]:
    """Return the commands of a ``console`` block, without prompt and comment."""
    joined = text.replace("\\\n", " ")
    lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+", " ", re.sub(r"\s+#.*", "", line)).strip() for line in lines]


def program(page: Path) -> str:
    """Return everything that a page runs, each block at the line where it stands."""
    lines = [""] * page.read_text(encoding="utf-8").count("\n")
    for first, language, text in blocks(page):
        if file := re.match(r"# (\w+\.py)\n", text):  # the block is that file
            lines[first] = f"open({file[1]!r}, 'w').write({text!r})"
        elif language == "python":
            lines[first : first + text.count("\n")] = text.splitlines()
        else:
            run = [INSTEAD.get(command, command) for command in commands(text)]
            lines[first] = "; ".join(f"shell({command!r})" for command in run if command)
    return "\n".join(lines)


def runs_commands(page: Path) -> bool:
    return any(
        INSTEAD.get(one, one) for _, language, text in blocks(page) if language == "console" for one in commands(text)
    )


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """A Hub on the loopback interface that holds weights ``org/name`` with a tag ``v1``."""
    server = hub_server.HubServer()
    learned = LearnedRule(L2ODM(), L2ODM().init_weights(torch.Generator().manual_seed(0)))
    with tempfile.TemporaryDirectory() as folder:
        learned.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    repo = server.repos["org/name"] = hub_server.Repo()
    repo.branches["v1"] = repo.branches["v1.0"] = repo.commit(files)
    yield server.url
    server.close()


def cases() -> list[object]:
    pages = [page for page in PAGES if any(True for _ in blocks(page))]
    return [pytest.param(page, marks=[pytest.mark.slow] * runs_commands(page), id=page.stem) for page in pages]


@pytest.mark.parametrize("page", cases())
def test_code_and_commands_of_a_page_run_in_their_order(page: Path, hub: str, tmp_path: Path) -> None:
    if page.name in NEEDS:
        make_torchvision_importable()
    for package in NEEDS.get(page.name, ()):
        try:
            importlib.import_module(package)
        except Exception as error:  # absent, or broken as it is installed here
            pytest.skip(f"{package} cannot be imported: {error}")
    for name, command in {"flatopt-train": "train", "flatopt-eval": "eval"}.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m flatopt {command} \"$@\"\n")
        script.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
        "PATH": os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub,
        "HF_TOKEN": hub_server.TOKEN,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    imports = (
        "import torchvision_import; torchvision_import.make_torchvision_importable()" if page.name in NEEDS else ""
    )
    runner = f"{PREAMBLE}\n{imports}\nexec(compile(open('page.py').read(), {str(page)!r}, 'exec'))"
    (tmp_path / "page.py").write_text(program(page), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", runner], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_replaced_command_stands_on_a_page() -> None:
    typed = {
        one for page in PAGES for _, language, text in blocks(page) if language == "console" for one in commands(text)
    }
    assert set(INSTEAD) <= typed, set(INSTEAD) - typed
