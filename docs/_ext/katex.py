"""Formulas by KaTeX from files of this site, so that they show without a network.

KaTeX is in ``docs/_static/katex`` (npm package ``katex``, its minified script and styles and its woff2 fonts).  Sphinx
writes the TeX of a formula into the page, and ``katex-render.js`` renders it there.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def visit_math(translator: Any, node: nodes.math) -> None:
    """Write a formula in a line."""
    text = translator.encode(node.astext())
    translator.body.append(f'<span class="math notranslate nohighlight">{text}</span>')
    raise nodes.SkipNode


def visit_displaymath(translator: Any, node: nodes.math_block) -> None:
    """Write a formula of its own, aligned where it has several lines."""
    tex = node.astext().strip()
    if "\\\\" in tex and "\\begin" not in tex:
        tex = f"\\begin{{aligned}}{tex}\\end{{aligned}}"
    translator.body.append(f'<div class="math notranslate nohighlight">{translator.encode(tex)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer and its files."""
    app.add_html_math_renderer("katex", (visit_math, None), (visit_displaymath, None))
    app.add_css_file("katex/katex.min.css")
    app.add_js_file("katex/katex.min.js", defer="defer")
    app.add_js_file("katex-render.js", defer="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
