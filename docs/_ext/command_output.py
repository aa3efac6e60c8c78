"""Show a command with its output, which is that of this build: ``{command} flatopt-train list``.

Options ``first`` and ``last`` keep so many lines only.  A command that fails is a warning, which ``sphinx -W`` makes an
error.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
COMMANDS = {"flatopt-train": "train", "flatopt-eval": "eval"}

logger = logging.getLogger(__name__)


class Command(Directive):
    """The command as it is typed, and what it prints."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"first": directives.positive_int, "last": directives.positive_int}

    def run(self) -> list[nodes.Node]:
        """Run the command in an empty folder."""
        line = " ".join(self.arguments[0].split())
        output = run(line).splitlines()
        if (first := self.options.get("first", len(output))) < len(output):
            output = [*output[:first], "..."]
        if (last := self.options.get("last", len(output))) < len(output):
            output = ["...", *output[-last:]]
        text = "\n".join([f"$ {line}", *output])
        block = nodes.literal_block(text, text)
        block["language"] = "console"
        return [block]


def run(line: str) -> str:
    """Return what a command of flatopt prints."""
    name, *arguments = shlex.split(line)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "flatopt", COMMANDS[name], *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        logger.warning("%s exits with %d: %s", line, done.returncode, done.stderr[-500:])
    return done.stdout


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
