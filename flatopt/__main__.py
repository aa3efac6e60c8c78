"""``python -m flatopt``: the commands under one name, for where no scripts are installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from ._version import __version__
from .pretrained import list_pretrained

COMMANDS = {"train": "flatopt.metatrain.cli", "eval": "flatopt.evaluate.cli", "demo": "flatopt.evaluate.demo"}
"""Modules whose ``main`` takes the rest of the line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the line to a command, or say what there is, and return the exit code.

    Args:
        argv: arguments after the program's name, those of the process if ``None``.
    """
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in COMMANDS:
        return import_module(COMMANDS[command]).main(rest) or 0
    if command == "--version":
        print(f"flatopt {__version__}")
    elif command in ("-h", "--help"):
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


if __name__ == "__main__":
    sys.exit(main())
