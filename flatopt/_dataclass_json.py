"""One strict reader of parsed JSON: values, dataclasses of them, and ``key=value`` assignments, all by type hints.

A hint says everything about a value: its type, the choices of a ``Literal``, and the bounds of an ``Annotated``::

    @dataclass(frozen=True, kw_only=True)
    class Options:
        width: Annotated[int, at_least(1)] = 8
        kind: Literal["tanh", "relu"] = "tanh"

        def __post_init__(self) -> None:
            check(self)

Nothing is converted but an integer to a float and a list to a tuple.  A wrong value gives one line that names the key,
what may stand there and what does.
"""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints


class Bound(NamedTuple):
    """A bound on the values of a field, to be put into ``Annotated``."""

    text: str
    """What follows the type in a message: ``of at least 1``."""
    holds: Callable[[Any], bool]


def at_least(low: float) -> Bound:
    """Bound values from below."""
    return Bound(f"of at least {low}", lambda value: value >= low)


def above(low: float) -> Bound:
    """Bound values from below, the bound excluded."""
    return Bound(f"above {low}", lambda value: value > low)


def at_most(high: float) -> Bound:
    """Bound values from above."""
    return Bound(f"at most {high}", lambda value: value <= high)


def below(high: float) -> Bound:
    """Bound values from above, the bound excluded."""
    return Bound(f"below {high}", lambda value: value < high)


class _Mismatch(Exception):
    """A value is not what its hint says; the caller, who knows the key, makes the message."""


def read(value: Any, hint: Any, where: str = "", *, complete: bool = False) -> Any:
    """Return parsed JSON as a value of a type.

    Args:
        value: what :func:`parse_json` returned, or a part of it.
        hint: ``Any``, ``bool``, ``int``, ``float``, ``str``, ``None``, ``dict``, ``tuple``, a union, a ``Literal``, an
            ``Annotated`` with bounds, or a dataclass of such fields.
        where: key of the value, for messages.
        complete: require every field of a dataclass but those whose default is ``None``: such a key, when missing,
            belongs to an option that the version which wrote the file did not have.

    Raises:
        ValueError: for an unknown or a missing key, or a value that does not fit.

    Example:
        >>> read([1, 2], tuple[float, float], "betas")
        (1.0, 2.0)
        >>> read("sigmoid", Literal["tanh", "relu"], "kind")
        Traceback (most recent call last):
        ...
        ValueError: kind must be one of tanh, relu, not 'sigmoid'
    """
    try:
        return _read(value, hint, where, complete)
    except _Mismatch:
        what = where or "the whole"
        raise ValueError(f"{what} must be {_describe(hint)}, not {shorten(value)}") from None


def check(instance: Any) -> None:
    """Raise ``ValueError`` unless every field of a dataclass fits its hint; for ``__post_init__``."""
    kind: Any = type(instance)
    for name, hint in _hints(kind).items():
        read(getattr(instance, name), hint, f"{kind.__name__}.{name}")


def assign(data: dict[str, Any], hint: Any, assignment: str) -> None:
    """Put the value of ``key=value`` into a nested dict, by the type found at the key; :func:`read` has the last word.

    Keys of nested values are dotted; an entry of a list of dataclasses goes by its field ``name``.

    Args:
        data: ``asdict`` of an instance of ``hint``, changed in place.
        hint: a dataclass.
        assignment: for example ``estimator.std=0.02``.

    Raises:
        ValueError: for an unknown key, naming the valid ones.
    """
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"{assignment!r} is not of the form key=value")
    parts, place = key.split("."), cast(Any, data)
    for depth, part in enumerate(parts):
        prefix, is_last = "".join(f"{one}." for one in parts[:depth]), depth == len(parts) - 1
        if is_dataclass(hint):
            hints = _hints(cast(Any, hint))
            if part not in hints:
                raise ValueError(_unknown(key, hints, prefix))
            hint = hints[part]
        elif get_origin(hint) is tuple and is_dataclass(get_args(hint)[0]):
            place, hint = {entry["name"]: entry for entry in place}, get_args(hint)[0]
            if part not in place or is_last:
                raise ValueError(_unknown(key, [f"{name}.KEY" for name in place], prefix))
        elif isinstance(place, dict):
            hint = Any
        else:
            raise ValueError(f"unknown key {key!r}: {prefix[:-1]} has no parts")
        if is_last:
            place[part] = _parse(text, hint, key)
        else:
            place = place.setdefault(part, {})


def parse_json(text: str | bytes, where: object) -> Any:
    """Parse strict JSON: no duplicate keys, no NaN, no numbers that do not fit 64 bits, no bottomless nesting.

    Raises:
        ValueError: for anything else; the message begins with ``where``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"duplicate key {shorten(next(key for key in keys if keys.count(key) > 1))}")
        return parsed

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise ValueError(f"number out of range: {digits[:40]}")
        return number

    def bounded(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"number out of range: {digits[:40]}")
        return int(digits)

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_int=bounded, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def shorten(value: object) -> str:
    """Return a repr that a hostile file cannot make long."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def _read(value: Any, hint: Any, where: str, complete: bool) -> Any:
    """Return the value, or raise ``_Mismatch``; parts of it, which have keys of their own, raise ``ValueError``."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        value = _read(value, args[0], where, complete)
        if all(bound.holds(value) for bound in args[1:]):
            return value
    elif origin in (Union, types.UnionType):
        for option in args:
            try:
                return _read(value, option, where, complete)
            except _Mismatch:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif is_dataclass(origin):
        if type(value) is origin:
            return value
        if isinstance(value, dict):
            return _build(value, origin, where, complete)
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            keys = [_entry_key(one, where, index) for index, one in enumerate(value)]
            return tuple(read(*one, complete=complete) for one in zip(value, kinds, keys, strict=True))
    elif origin is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # not NaN
        return float(value)
    elif origin in (int, bool, str, dict, types.NoneType) and type(value) is origin:
        return value
    raise _Mismatch


def _build(data: dict[str, Any], cls: Any, where: str, complete: bool) -> Any:
    hints, prefix = _hints(cls), f"{where}." if where else ""
    for name in data:
        if name not in hints:
            raise ValueError(_unknown(f"{prefix}{name}", hints, prefix))
    for one in fields(cls):
        required = one.default is not None and (complete or one.default is one.default_factory is MISSING)
        if required and one.name not in data:
            raise ValueError(f"missing key {prefix + one.name!r}")
    values = {name: read(value, hints[name], prefix + name, complete=complete) for name, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _entry_key(value: Any, where: str, index: int) -> str:
    """Return the key of an entry of a list: the name that :func:`assign` knows it by, where it has one."""
    has_name = isinstance(value, dict) and isinstance(value.get("name"), str)
    return f"{where}.{value['name']}" if has_name else f"{where}[{index}]"


def _parse(text: str, hint: Any, key: str) -> Any:
    """Read a value from the command line: plain text for ``str``, else JSON, with Python's ``None`` and numbers."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    word = text.lower()
    if word in ("none", "null") and types.NoneType in (*options, hint):
        return None
    if any(option is str or get_origin(option) is Literal for option in options):
        return text
    try:
        return parse_json({"none": "null", "true": "true", "false": "false"}.get(word, text), key)
    except ValueError:
        if text.lstrip().startswith(("[", "{")):  # nothing else than JSON
            raise
    try:
        return float(text)  # 1e-3 is JSON, .5 and 1_000. are not
    except ValueError:
        return text


@lru_cache(maxsize=256)
def _hints(cls: Any) -> dict[str, Any]:
    """Return the hints of the fields of a dataclass; cached, because they are strings to be evaluated."""
    hints = get_type_hints(cls, include_extras=True)
    return {one.name: hints[one.name] for one in fields(cls)}


def _describe(hint: Any) -> str:
    """Name a type for people."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return f"{_describe(args[0])} {' and '.join(bound.text for bound in args[1:])}"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
    return names.get(origin, "an object")


def _unknown(key: str, valid: Iterable[str], prefix: str) -> str:
    names = ", ".join(f"{prefix}{name}" for name in valid)
    return f"unknown key {shorten(key)}: valid are {names or 'none'}"
