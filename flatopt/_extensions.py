"""Rules, measures, families and recipes of one's own, known by name without a fork.

A module declares them in dicts that are called as those of flatopt::

    RULES = {"my-rule": MyRule}
    RECIPES = {"my-recipe": my_recipe}

It is named by ``flatopt-train --import my_module``, or by an entry point of an installed package, in which case nothing
has to be said at all::

    [project.entry-points.flatopt]
    mine = "my_package.my_module"
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from ._warn import warn

GROUP = "flatopt"
"""Group of the entry points."""

_LIBRARIES = (os.path.dirname(__file__), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
"""Folders whose code is not what a user looks at first."""


def extend(registries: Mapping[str, dict[str, Any]], modules: Iterable[str] = ()) -> None:
    """Add to registries what modules declare, those of installed packages included.

    Args:
        registries: dicts to add to, by the name of the dict in the module.
        modules: names of modules to import, from the current folder or anywhere that Python looks.

    A package that cannot be imported or added is left out, with one warning: nobody may have asked for it.

    Raises:
        ValueError: if one of ``modules`` cannot be imported or declares what cannot be added, such as a name that
            something else has already.
    """
    for name in modules:
        _add(import_here(name, f"--import {name}"), registries)
    for entry in entry_points(group=GROUP):
        try:
            _add(_import(entry.value), registries)
        except ValueError as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            _warn_once(f"flatopt goes on without entry point {entry.name!r} of {package}: {error}")


def _add(module: ModuleType, registries: Mapping[str, dict[str, Any]]) -> None:
    """Add what a module declares to registries: all of it, or nothing with a ``ValueError``."""
    found = {attribute: getattr(module, attribute, {}) for attribute in registries}
    for attribute, declared in found.items():
        if not isinstance(declared, Mapping) or not all(isinstance(name, str) for name in declared):
            raise ValueError(f"{module.__name__}: {attribute} must be a dict whose keys are names")
        for name, value in declared.items():
            problem = _problem(attribute, name, value)
            if problem:
                raise ValueError(f"{module.__name__}: {attribute}[{name!r}] {problem}")
            if registries[attribute].get(name, value) is not value:
                raise ValueError(f"{module.__name__}: there is something else called {name!r} in {attribute}")
    for attribute, declared in found.items():
        registries[attribute].update(declared)


def _problem(attribute: str, name: str, value: Any) -> str | None:
    """Return what is wrong with something that is declared, as far as it would break all commands."""
    if attribute == "RULES" and not (isinstance(value, type) and hasattr(value, "name")):
        return f"must be a class with name = {name!r}"
    if attribute == "RULES" and value.name != name:  # what config.json will say
        return f"calls itself {value.name!r}"
    if attribute == "RECIPES" and not callable(value):
        return "must be a function that returns a MetaTrainConfig"
    return None


@cache
def _warn_once(message: str) -> None:
    warn(message)


def import_here(name: str, asked: str) -> ModuleType:
    """Import a module of the user, from the current folder or anywhere that Python looks.

    Raises:
        ValueError: if it cannot be imported; the message begins with ``asked``.
    """
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` does; the folder of the command is of no use
        sys.path.insert(0, here)
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{asked}: {name!r} is not the name of a module, which has no slash and no ending")
    try:
        return _import(name)
    except ValueError as error:
        raise ValueError(f"{asked}: {error}") from error


def _import(name: str) -> ModuleType:
    """Import a module; ``ValueError``, in one line, if that fails for whatever reason."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        raise ValueError(where(error)) from error


def where(error: Exception) -> str:
    """Return kind, place and message of an error, in one line; the place is where code of the user was last.

    Example:
        >>> try:
        ...     exec(compile("1 / 0", "my_module.py", "exec"))
        ... except ZeroDivisionError as error:
        ...     print(where(error))
        ZeroDivisionError in my_module.py, line 1: division by zero
    """
    if isinstance(error, SyntaxError):
        path, line, text = error.filename or "", error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<frozen"))]
        last = (own or frames)[-1]
        path, line, text = last.filename, last.lineno, str(error)
    return f"{type(error).__name__} in {os.path.basename(path)}, line {line}: {text}"
