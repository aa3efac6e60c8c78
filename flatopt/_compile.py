"""The phases of a rule on coordinates through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch

from ._torch import compile_errors
from ._warn import reason_of, warn
from .rules import Coordinates, Phases

COMPILED = ("observe", "propose")
"""``matrix`` is as fast without: the call of a compiled function costs more than it saves."""


class CompiledPhases:
    """Compiles the phases that act on coordinates; goes on with plain ones, after a warning, where that fails."""

    def __init__(self, plain: Phases):
        self.plain = plain
        self.fast: dict[tuple[str, frozenset[str]], Callable[..., Any]] | None = {}
        """By phase and by the keys of the state: matrices and vectors may differ in them."""

    def phases(self) -> Phases:
        """Return the phases as the driver takes them."""
        calls: dict[str, Any] = {name: partial(self._call, name) for name in COMPILED}
        return self.plain._replace(**calls)

    def _call(self, name: str, *arguments: Any) -> Any:
        if self.fast is not None:
            (part,) = (argument for argument in arguments if isinstance(argument, Coordinates))
            kind = name, frozenset(part.state)
            if kind not in self.fast:
                phase = _with_own_code(getattr(self.plain, name))
                self.fast[kind] = torch.compile(phase, fullgraph=True, dynamic=True)
            try:
                return self.fast[kind](*arguments)
            except compile_errors() as error:
                warn(f"FlatOpt goes on without torch.compile: {reason_of(error)}", RuntimeWarning)
                self.fast = None
        return getattr(self.plain, name)(*arguments)


def _with_own_code(phase: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a phase, with a code object that no other has.

    torch counts compilations by code object, and gives up at the ninth.  Partial functions share one.
    """

    def call(*arguments: Any) -> Any:
        return phase(*arguments)

    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
