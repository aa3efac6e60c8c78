"""What commands check before they begin anything: extras, device and folders."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

EXTRAS = {
    "train": ("numpy", "sklearn"),
    "eval": ("numpy", "scipy", "sklearn", "tqdm", "matplotlib", "schedulefree", "prodigyopt"),
}
"""Modules by the extra that installs them."""


def check_extra(extra: str) -> None:
    """Raise ``ModuleNotFoundError`` unless everything is there, before a command has begun anything."""
    for name in EXTRAS[extra]:
        if find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


def how_to_install(error: ImportError, extra: str) -> str:
    """Return one line that says what is missing, and the command that installs it.

    Example:
        >>> how_to_install(ModuleNotFoundError(name="sklearn"), "train")
        "sklearn is not installed: pip install 'flatopt[train]'"
    """
    missing = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
    return f"{missing}: pip install 'flatopt[{extra}]'"


def check_device(device: str | torch.device) -> torch.device:
    """Return the device; ``ValueError`` if it cannot be used."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' cannot be used: it computes no values")
    return device


def check_folder(folder: Path) -> None:
    """Raise ``ValueError`` unless files can be written into a folder, which need not be there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is not a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} cannot be written to")
