"""The commands, which ``python -m flatopt`` has under one name, for where no scripts are installed.

Whatever takes time to import is imported in a command, so that Ctrl-C ends it in one line from the start.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from ._version import __version__

COMMANDS = {"train": "flatopt.metatrain.cli", "eval": "flatopt.evaluate.cli", "demo": "flatopt.evaluate.demo"}
"""Modules whose ``main`` takes the rest of the line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand a line, that of the process if ``None``, to a command, or say what there is; return the exit code."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in COMMANDS:
        return _run(command, rest)
    if command == "--version":
        print(f"flatopt {__version__}")
    elif command in ("-h", "--help"):
        # Imported here: with it comes torch.
        from .pretrained import list_pretrained

        print(
            f"flatopt {__version__}, a learned optimizer for PyTorch\n\n"
            "  python -m flatopt train   learn weights of your own, as flatopt-train\n"
            "  python -m flatopt eval    measure optimizers, as flatopt-eval\n"
            "  python -m flatopt demo    train on handwritten digits with Adam and with FlatOpt\n\n"
            f"Weights in this package: {', '.join(list_pretrained())}"
        )
    else:
        print(f"flatopt: unknown command {command!r}: valid are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return 0


def train() -> int:
    """Run ``flatopt-train``."""
    return _run("train", sys.argv[1:])


def evaluate() -> int:
    """Run ``flatopt-eval``."""
    return _run("eval", sys.argv[1:])


def _run(command: str, arguments: Sequence[str]) -> int:
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not where the shell has it ignored
        signal.signal(signal.SIGINT, _stop)
    try:
        module = import_module(COMMANDS[command])
    finally:
        signal.signal(signal.SIGINT, before)
    return module.main(arguments) or 0


def _stop(*_: object) -> None:
    """End at once: an exception in the middle of an import might be taken for another one."""
    print("flatopt: stopped before anything was done", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
