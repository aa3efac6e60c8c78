"""What a function computes, as a hash: its own source and that of everything of flatopt that it refers to.

Comments, docstrings and annotations do not count, so prose can be edited without another result being expected.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from types import FunctionType, ModuleType
from typing import Any

CONSTANTS = (bool, int, float, str, tuple)


def describe(value: Any) -> Any:
    """Return a call in words that JSON can hold: functions and classes by name, partials with their arguments.

    Example:
        >>> describe(partial(int, base=partial(max, 2)))
        {'call': 'int', 'base': {'call': 'max', 'args': [2]}}
    """
    if isinstance(value, partial):
        arguments = {name: describe(argument) for name, argument in value.keywords.items()}
        positional = {"args": [describe(argument) for argument in value.args]} if value.args else {}
        return {"call": describe(value.func), **positional, **arguments}
    return getattr(value, "__qualname__", value)


def problem_identity(problem: Any) -> dict[str, Any]:
    """Return the fields of a dataclass but for its name, with what it builds in words and as a hash of the code."""
    fields = {name: value for name, value in asdict(problem).items() if name not in ("name", "build")}
    return fields | {"build": describe(problem.build), "code": code_hash(problem.build)}


def code_hash(value: Callable[..., Any], room: str | tuple[str, ...] = "flatopt.evaluate") -> str:
    """Return a hash of the source of a function or class, and of whatever in ``room`` it refers to.

    Args:
        value: function, class, or a partial of one.
        room: package, or several, whose functions, classes and constants are followed.
    """
    if isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
        return _hash(*(code_hash(part, room) for part in parts if callable(part)))
    return _hash(*(source for _, source in sorted(_sources(value, room).items())))


@cache
def _sources(root: Any, room: str | tuple[str, ...]) -> dict[str, str]:
    """Return the sources by qualified name, found from one function or class."""
    found: dict[str, str] = {}
    waiting = [root]
    while waiting:
        value = inspect.unwrap(waiting.pop())
        if not isinstance(value, (FunctionType, type)) or not value.__module__.startswith(room):
            continue
        name = f"{value.__module__}.{value.__qualname__}"
        if name in found:
            continue
        tree = _Bare().visit(ast.parse(textwrap.dedent(inspect.getsource(value))))
        found[name] = _in_words(tree)
        for used, other in _references(tree, vars(sys.modules[value.__module__])):
            if isinstance(other, CONSTANTS):
                found[f"{value.__module__}.{used}"] = repr(other)
            else:
                waiting.append(other)
    return found


def _references(tree: ast.AST, names: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return what the global names in a piece of code stand for."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            found.append((node.id, names[node.id]))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            is_ours = isinstance(owner, ModuleType) and owner.__name__.startswith("flatopt")  # not torch.__version__
            if is_ours and hasattr(owner, node.attr):
                found.append((node.attr, getattr(owner, node.attr)))
    return [(name, value) for name, value in found if callable(value) or isinstance(value, CONSTANTS)]


class _Bare(ast.NodeTransformer):
    """Take docstrings and annotations out."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        node.body = _without_docstring(node.body)
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = _without_docstring(node.body)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def _in_words(node: Any) -> str:
    """Return a syntax tree as text that does not depend on the version of Python, as that of ``ast`` does."""
    if isinstance(node, list):
        return "[" + ", ".join(map(_in_words, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{name}={_in_words(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({', '.join(fields)})"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    kept = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return kept or [ast.Pass()]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
