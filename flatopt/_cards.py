"""Cards: the ``README.md`` of a learned rule, in the form that the Hugging Face Hub reads.

Every card begins with the line that uses it, says what it is good for and where it comes from, and folds the rest away.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence

from ._folder import TRAINING_FILE, weights_sha256
from ._version import __version__
from .rules import UpdateRule, Weights

HERE = "path/to/this/folder"
"""How the card of a folder names the folder: nobody's disk is anybody else's business."""

_FRONT_MATTER = """---
library_name: flatopt
tags:
- flatopt
- learned-optimizer
- optimizer
- pytorch
---

"""


def write_card(
    title: str,
    *,
    purpose: str,
    facts: Mapping[str, object],
    folded: Mapping[str, Sequence[str]] | None = None,
    has_training: bool = False,
    averages: bool = False,
) -> str:
    """Return a card, without a licence, which only a person can choose.

    Args:
        title: heading.
        purpose: what the learned rule is good for.
        facts: rows of a table that says where it comes from.
        folded: lines of Markdown by their heading, not shown until asked for.
        has_training: link ``training.json``, which must then be written too.
        averages: whether the optimizer keeps averages of the parameters.

    Example:
        >>> print(write_card("mine", purpose="Small networks.", facts={"Rule": "`adam`"}).splitlines()[0])
        ---
    """
    lines = [f"# {title}", "", "A learned optimizer for PyTorch, used through `flatopt` as any other optimizer:", ""]
    lines += ["```python", "import flatopt", ""]
    lines += [f'optimizer = flatopt.FlatOpt(model.parameters(), pretrained="{HERE}")', "```", ""]
    lines += ["There is no learning rate to tune. Where the length of the training is known, say `num_steps=...`."]
    if averages:
        lines += ["Where it is not, or before the end, call `optimizer.eval()` to evaluate or save,"]
        lines += ["and `optimizer.train()` to go on."]
    lines += ["", "## What it is good for", "", purpose, "", "## Where it comes from", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    if has_training:
        lines += ["", f"The whole configuration is in [{TRAINING_FILE}]({TRAINING_FILE})."]
    for heading, inner in (folded or {}).items():
        lines += ["", f"<details><summary>{heading}</summary>", "", *inner, "", "</details>"]
    return _FRONT_MATTER + "\n".join(lines) + "\n"


def model_card(rule: UpdateRule, weights: Weights, *, name: str | None = None) -> str:
    """Return a card, headed ``name`` or the rule's own, that says what can be read off the rule and its weights."""
    facts = {**rule_facts(rule, weights), "flatopt": __version__}
    facts |= {f"`{item.name}`": f"`{getattr(rule, item.name)}`" for item in dataclasses.fields(rule)}
    purpose = "Nothing was recorded about how it was trained."
    return write_card(name or rule.name, purpose=purpose, facts=facts, averages=rule.average is not None)


def rule_facts(rule: UpdateRule, weights: Weights) -> dict[str, str]:
    """Return rows on a rule and its weights."""
    summary = (type(rule).__doc__ or "").strip().partition("\n")[0]
    return {
        "Rule": f"`{rule.name}`: {summary}",
        "Weights": f"{sum(value.numel() for value in weights.values()):,}, SHA-256 `{weights_sha256(weights)}`",
    }


def address(card: str, repo_id: str) -> str:
    r"""Return a card for a repository: with front matter, and with the repository's name where it says how to load.

    Example:
        >>> address('---\n---\nFlatOpt(model.parameters(), pretrained="l2o-dm")', "org/name").splitlines()[-1]
        'FlatOpt(model.parameters(), pretrained="org/name")'
    """
    card = card.replace("\r\n", "\n")
    card = card if card.startswith("---\n") else _FRONT_MATTER + card
    return re.sub(r'(FlatOpt\(model\.parameters\(\), pretrained=)"[^"\n]*"', rf'\1"{repo_id}"', card, count=1)


def curve(values: Sequence[float], width: int = 40) -> str:
    """Return a line of bars, the first and the last value among them: a figure that needs no file.

    Example:
        >>> curve([4.0, 3.0, 2.0, 1.0])
        '█▆▃▁'
    """
    last = len(values) - 1
    picked = [values[round(i * last / (width - 1))] for i in range(width)] if len(values) > width else list(values)
    low, high = min(picked, default=0.0), max(picked, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low or 1.0))] for value in picked)


def without_paths(command: str) -> str:
    """Return a command line with the name in place of every path, which is nobody else's business.

    Example:
        >>> without_paths("flatopt-train run smoke --out /home/me/runs/a seed=1")
        'flatopt-train run smoke --out a seed=1'
    """

    def strip(word: str) -> str:
        key, equals, value = word.rpartition("=")
        return key + equals + (value.rstrip("/").rpartition("/")[2] or value)

    return shlex.join([strip(word) for word in shlex.split(command)])
