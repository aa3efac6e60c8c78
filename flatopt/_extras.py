"""What the commands import that the package itself does not need."""

from __future__ import annotations

from importlib.util import find_spec

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
