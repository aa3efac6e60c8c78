"""What the command line says of recipes: a table of all, and every key of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from ..pretrained import list_pretrained, load_pretrained
from ..tasks import Images, Tabular, Text
from .config import MetaTrainConfig
from .families import FAMILIES


def recipe_table(recipes: Mapping[str, Callable[[], MetaTrainConfig]]) -> list[str]:
    """Return a line per recipe, under a header: what it learns, on what data, and how long its shipped run took."""
    rows = [("recipe", "rule", "updates", "took", "on", "data")]
    for name, recipe in recipes.items():
        config = recipe()
        rows.append((name, config.rule, str(config.num_updates), *_measured(name), ", ".join(_data(config))))
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line per row, its cells below each other.

    Example:
        >>> columns([("rule", "took"), ("l2o-dm", "1:00")])
        ['rule    took', 'l2o-dm  1:00']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def settings(config: MetaTrainConfig) -> list[str]:
    """Return every key that can be set, with its value, as the command line takes them."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in _leaves(asdict(config))]


def _measured(recipe: str) -> tuple[str, str]:
    """Return time and hardware of the run behind the shipped set of that name, dashes where none is recorded."""
    metadata = load_pretrained(recipe).metadata if recipe in list_pretrained() else {}
    if "seconds" not in metadata:
        return "-", "-"
    return str(timedelta(seconds=round(metadata["seconds"]))), metadata["sessions"][0]["hardware"]


def _data(config: MetaTrainConfig) -> list[str]:
    """Return what the problems of a configuration are about, each once."""
    found: dict[str, None] = {}
    for task in config.tasks:
        data = FAMILIES[task.name].data if task.name in FAMILIES else None
        if isinstance(data, Images):
            found.update(dict.fromkeys(name for name, _ in data.sources))
        elif data is None:
            found[f"unknown family {task.name!r}"] = None
        else:
            names = {Text: "Python source", Tabular: "generated tables"}
            found[names.get(type(data), type(data).__name__)] = None
    return list(found)


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key == "tasks":
            for task in value:
                yield from _leaves(
                    {name: one for name, one in task.items() if name != "name"}, f"tasks.{task['name']}."
                )
        else:
            yield prefix + key, value
