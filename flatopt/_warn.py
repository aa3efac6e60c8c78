"""Warnings that point at the user's own line."""

from __future__ import annotations

import os
import sys
import warnings

import torch

_OURS = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, str(torch.__file__)))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as from the innermost line that is neither in this package nor in torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def reason_of(error: Exception) -> str:
    """Return the first line of what an error says, or what it is where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
