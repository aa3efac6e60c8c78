"""A learned optimizer that is a drop-in ``torch.optim.Optimizer``."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .optimizer import FlatOpt
    from .pretrained import LearnedRule, list_pretrained, load_pretrained, push_to_hub

__all__ = ["FlatOpt", "LearnedRule", "__version__", "list_pretrained", "load_pretrained", "push_to_hub"]


if not TYPE_CHECKING:  # a type checker would take every name for one that there is

    def __getattr__(name):
        """Import what is asked for: torch takes seconds, and the commands answer before it is there."""
        if name in __all__:
            home = "optimizer" if name == "FlatOpt" else "pretrained"
            value = getattr(import_module(f".{home}", __name__), name)
        elif find_spec(f"{__name__}.{name}"):
            value = import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
