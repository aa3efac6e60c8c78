"""What a checkpoint says of a run beside its state, so that what is read back is the run that began.

A configuration holds names and what differs from defaults.  What the names stand for is in code, which may have changed
since: a checkpoint keeps it as text, and another one is refused.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, fields
from typing import Any, ClassVar, get_origin, get_type_hints

from .._dataclass_json import parse_json, read
from .._folder import check_weights
from ..rules import UpdateRule, Weights
from .config import MetaTrainConfig
from .families import FAMILIES


def definitions(config: MetaTrainConfig) -> dict[str, str]:
    """Return what the names of a configuration stand for here, by its keys: rule, families and measures as text."""
    found: dict[str, Any] = {f"rule={config.rule}": config.build_rule()}
    found |= {f"tasks.{task.name}": FAMILIES[task.name] for task in config.tasks if task.name in FAMILIES}
    for key in ("flatness", "inner_flatness"):
        measure = getattr(config.objective, key).build_measure()
        if measure is not None:
            found[f"objective.{key}"] = measure
    # An address is another one in every process.
    return {key: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for key, value in found.items()}


def check_definitions(config: MetaTrainConfig, saved: dict[str, str]) -> None:
    """Raise ``ValueError`` that names what does not stand for what it did when the run began."""
    here = definitions(config)
    for key in {**saved, **here}:
        was, now = saved.get(key, "unknown"), here.get(key, "unknown")
        if was != now:
            begin = max(os.path.commonprefix((was, now)).rfind(mark) for mark in "(,") + 1
            was, now = (repr(text[begin:].strip()[:60]) for text in (was, now))
            raise ValueError(f"{key} is not what it was when the run began: it was {was}, now it is {now}")


def check_config(config: MetaTrainConfig) -> None:
    """Raise ``ValueError`` unless a configuration can be read back as it is."""
    try:
        text = config.to_json()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the configuration cannot be saved: {error}") from None
    if MetaTrainConfig.from_json(text).to_json() != text:
        raise ValueError("the configuration cannot be saved: it is another one when read back")


def check_rule(rule: UpdateRule, weights: Weights) -> None:
    """Raise ``ValueError`` unless a rule with these weights can be exported."""
    try:
        _check_fields(rule)
        check_weights(rule, weights)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"rule={rule.name} could not be exported: {error}") from None


def _check_fields(rule: UpdateRule) -> None:
    """Raise unless the hyper-parameters come back equal."""
    kind: Any = type(rule)
    hash(rule)  # which a dict or a list has not
    known = {one.name for one in fields(rule)}
    hints = {name for name, hint in get_type_hints(kind).items() if ClassVar not in (hint, get_origin(hint))}
    if hints - known:
        names = ", ".join(sorted(hints - known))
        raise ValueError(f"{names} would be lost: {kind.__name__} needs @dataclass(frozen=True, kw_only=True)")
    text = json.dumps(asdict(rule), allow_nan=False)
    if read(parse_json(text, "hyper-parameters"), kind, complete=True) != rule:
        raise ValueError(f"hyper-parameters are others when read back from {text}")
