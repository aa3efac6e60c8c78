"""Sphinx configuration; `make docs` builds with warnings as errors."""

import sys
from importlib.metadata import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "flatopt"
author = "The flatopt developers"
copyright = f"2026, {author}. Apache License 2.0"
release = metadata("flatopt")["Version"]
urls = dict(line.split(", ", 1) for line in metadata("flatopt").get_all("Project-URL", []))

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "command_output",
    "katex",
    "public_symbols",
]
# Tables without a title are parts of other pages.
fragments = [path for path in Path(__file__).parent.glob("results/*.md") if "\n# " not in path.read_text("utf-8")]
exclude_patterns = ["_build", *(f"results/{path.name}" for path in fragments)]
html_theme = "furo"
html_title = f"flatopt {release}"
if "Repository" in urls:
    html_theme_options = {"source_repository": urls["Repository"], "source_branch": "main", "source_directory": "docs/"}
html_static_path = ["_static"]
html_css_files = ["flatopt.css"]
html_math_renderer = "katex"
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
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
