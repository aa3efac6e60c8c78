"""What a table is: a dataclass whose fields are its options, and the command line made from them."""

from __future__ import annotations

import argparse
import sqlite3
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from .._checks import check_extra, how_to_install
from ._cache import RunCache
from ._report import Report

T = TypeVar("T")


def option(default: T, help_text: str) -> T:
    """Declare an option of a table: a dataclass field with the text that ``--help`` shows; an integer is at least 1."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """A table of measured results.  Each field is an option of its subcommand of ``flatopt-eval``."""

    summary: ClassVar[str]
    """Help of the subcommand, one line."""

    seeds: int = option(5, "runs per cell")
    fast: bool = option(False, "toy sizes: shows that it works, the numbers mean nothing")

    @abstractmethod
    def report(self, cache: RunCache) -> Report:
        """Compute what is not in the cache, and return the tables and figures."""


def add_options(parser: argparse.ArgumentParser, evaluation: type[Evaluation]) -> None:
    """Add an option for every field: flags, choices, numbers, texts and lists of texts."""
    hints = get_type_hints(evaluation)
    for one in fields(evaluation):
        hint, text = hints[one.name], one.metadata["help"]
        if one.metadata.get("positional"):
            parser.add_argument(one.name, help=text)
            continue
        default: Any = one.default
        how: dict[str, Any] = {"default": default, "help": text}
        if hint is bool:
            how["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif shown := " ".join(map(str, default)) if get_origin(hint) is tuple else str(default):
            how["help"] = f"{text} (default: {shown})"
        if hint is int:
            how["type"] = integer
        elif get_origin(hint) is Literal:
            how["choices"] = get_args(hint)
        elif get_origin(hint) is tuple:
            how |= {"nargs": "+", "metavar": "NAME"}
        parser.add_argument("--" + one.name.replace("_", "-"), **how)


def read_options(evaluation: type[Evaluation], chosen: argparse.Namespace) -> Evaluation:
    """Make the table that the command line asked for."""
    given = ((one.name, getattr(chosen, one.name)) for one in fields(evaluation))
    options: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given}
    return evaluation(**options)


def integer(text: str) -> int:
    """Read an integer of the command line, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def progress(items: Iterable[T], name: str | Callable[[T], str], total: int | None = None) -> Iterator[T]:
    """Show a bar on a terminal, and nothing elsewhere.

    Args:
        items: what is done, one after the other.
        name: text before the bar, or what makes it of the item that is being done.
        total: number of items, if they have no length.
    """
    from tqdm import tqdm

    with tqdm(items, desc=None if callable(name) else name, total=total, disable=None) as bar:
        for item in bar:
            if callable(name):
                bar.set_description(name(item))
            yield item


@contextmanager
def one_line(program: str, after_stop: str) -> Iterator[None]:
    """Turn what a user can mend, a missing extra, and Ctrl-C, into one line on the standard error.

    The line begins with ``program``; after Ctrl-C it says ``after_stop``.

    Raises:
        SystemExit: with code 2, and with 130 after Ctrl-C.
    """
    try:
        check_extra("eval")  # here, and not when the figure is drawn after hours
        yield
    except KeyboardInterrupt:
        code, text = 130, f"stopped; {after_stop}"
    except ImportError as error:
        code, text = 2, how_to_install(error, "eval")
    except (ValueError, OSError, sqlite3.Error) as error:
        code, text = 2, str(error)
    else:
        return
    print(f"{program}: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(code)


def matching(names: Sequence[str], parts: Sequence[str], what: str) -> list[str]:
    """Return the names that have one of the parts in them, all when there is no part.

    Raises:
        ValueError: for a part that is in no name; lists the names.

    Example:
        >>> matching(["digits MLP", "digits CNN"], ["CNN"], "task")
        ['digits CNN']
    """
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"no {what} has {part!r} in its name: there are {', '.join(names)}")
    return [name for name in names if not parts or any(part in name for part in parts)]
