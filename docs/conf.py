"""Sphinx configuration; `make docs` builds with warnings as errors."""

import sys
from importlib.metadata import version as distribution_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "flatopt"
author = "The flatopt developers"
release = distribution_version("flatopt")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "public_symbols",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"flatopt {release}"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# A class is listed by its public package; a short name in a docstring may then match two packages.
suppress_warnings = ["ref.python"]

# Packages whose public names must all appear in the built API page, with a docstring (docs/_ext/public_symbols.py).
public_packages = [
    "flatopt",
    "flatopt.rules",
    "flatopt.flatness",
    "flatopt.tasks",
    "flatopt.metatrain",
    "flatopt.evaluate",
]
