"""Fail the build when a public name is missing from the API page or has no docstring.

Public names of a package are its ``__all__`` or, without one, the names in it that do not begin with an
underscore and are not modules.  Names that come from outside flatopt do not count.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)


def public_names(package: types.ModuleType) -> list[str]:
    """Return the names that a reader may import from a package."""
    if hasattr(package, "__all__"):
        names = list(package.__all__)
    else:
        names = [name for name in vars(package) if not name.startswith("_") and name != "annotations"]
    return [
        name
        for name in names
        if not name.startswith("__")
        and not inspect.ismodule(getattr(package, name))
        and (getattr(getattr(package, name), "__module__", None) or "flatopt").startswith("flatopt")
    ]


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn about every public name without an entry; ``sphinx -W`` makes that an error."""
    documented = env.domains["py"].data["objects"]
    for package_name in app.config.public_packages:
        package = importlib.import_module(package_name)
        for name in public_names(package):
            value = getattr(package, name)
            if f"{package_name}.{name}" not in documented:
                logger.warning("public name %s.%s is missing from the API page", package_name, name)
            elif (inspect.isclass(value) or inspect.isfunction(value)) and not typing.get_origin(value):
                if not (value.__doc__ or "").strip():
                    logger.warning("public name %s.%s has no docstring", package_name, name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the check."""
    app.add_config_value("public_packages", [], "env")
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
