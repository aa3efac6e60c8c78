"""Tables, figures, statistics, and a cache of finished runs; nothing here knows about optimizers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure

Record = dict[str, Any]
"""One row of results: JSON values by name."""


class Report(NamedTuple):
    """What one subcommand of ``flatopt-eval`` produces."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Cells of the table, already formatted."""
    records: Sequence[Record]
    """The same results in full, for ``results.json``."""
    draw: Callable[[Figure], None]
    """Draws the figure of the results."""
    note: str = ""
    """How to read the table."""


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, 0 for a single value.

    Example:
        >>> mean_and_std([1.0, 3.0])
        (2.0, 1.4142135623730951)
        >>> mean_and_std([5.0])
        (5.0, 0.0)
    """
    if not all(map(math.isfinite, values)):
        return (math.nan, math.nan)
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def mean_pm_std(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """Format mean and spread for a table cell.

    Example:
        >>> mean_pm_std([0.8, 0.9], digits=1, scale=100)
        '85.0 ± 7.1'
    """
    mean, std = mean_and_std([scale * value for value in values])
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with aligned columns.

    Raises:
        ValueError: if a row has not as many cells as the header.

    Example:
        >>> print(markdown_table(["a", "bb"], [["1", "2"]]))
        | a | bb |
        |---|----|
        | 1 | 2  |
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells under a header of {len(header)}: {row}")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in (header, *rows)]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write_report(report: Report, out: Path) -> str:
    """Write ``table.md``, ``results.json`` and ``figure.png`` into a folder, and return the table's text."""
    out.mkdir(parents=True, exist_ok=True)
    table = markdown_table(report.header, report.rows)
    text = f"# {report.title}\n\n{table}\n" + (f"\n{report.note}\n" if report.note else "")
    (out / "table.md").write_text(text, encoding="utf-8")
    results = json.dumps(_without_nonfinite(list(report.records)), indent=1, allow_nan=False)
    (out / "results.json").write_text(results + "\n", encoding="utf-8")
    figure = Figure(figsize=(9, 5), layout="constrained")
    report.draw(figure)
    figure.savefig(out / "figure.png", dpi=120)
    return text


class RunCache:
    """Finished runs in a JSONL file, so that a long evaluation stopped at any moment goes on where it was.

    Args:
        path: file to read and extend; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        for line in lines[:-1]:
            entry = json.loads(line)
            self._results[_canonical(entry["key"])] = entry["result"]
        if lines[-1]:  # a process killed while it wrote leaves half a line: that run is done again
            path.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")

    def get(self, key: Record, compute: Callable[[], Record]) -> Record:
        """Return the stored result of ``key``; compute and store it the first time."""
        name = _canonical(key)
        if name not in self._results:
            result = compute()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")
            self._results[name] = result
        return self._results[name]


def _canonical(key: Record) -> str:
    return json.dumps(key, sort_keys=True)


def _without_nonfinite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
