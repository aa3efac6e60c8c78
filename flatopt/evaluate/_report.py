"""Tables, figures and statistics; nothing here knows about optimizers.

matplotlib and scipy are loaded when something is drawn and when an interval is computed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from ._cache import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any


class Table(NamedTuple):
    """A table under its title."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Cells, already formatted."""


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
    more_tables: Sequence[Table] = ()
    """Further tables, below the note."""
    more_figures: Mapping[str, Callable[[Figure], None]] = {}
    """What draws further figures, by the names of their files without ``.png``."""


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """Format for a table cell; the ends are left out where there are none.

        Example:
            >>> Interval(0.1, -0.05, 0.25).text(), Interval(0.1, math.nan, math.nan).text(1, scale=100)
            ('+0.10 [-0.05, +0.25]', '+10.0')
        """
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in self)
        return mean if math.isnan(self.low) else f"{mean} [{low}, {high}]"


def confidence_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent normal values and its 95 % Student t interval; NaN where there is none.

        mean +- t std / sqrt(n)

    with ``t`` the quantile 0.975 of Student's distribution with ``n - 1`` degrees of freedom.
    Of differences between two treatments of the same subjects it is the paired interval.

    Example:
        >>> confidence_interval([1.0, 3.0])  # t = 12.706, std / sqrt(2) = 1
        Interval(mean=2.0, low=-10.706..., high=14.706...)
    """
    mean, std = mean_and_std(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, 0.975)) * std / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


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
    """Write ``table.md``, ``results.json`` and the figures into a folder, and return the text of the tables."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    table = markdown_table(report.header, report.rows)
    text = f"# {report.title}\n\n{table}\n" + (f"\n{report.note}\n" if report.note else "")
    for more in report.more_tables:
        text += f"\n## {more.title}\n\n{markdown_table(more.header, more.rows)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    # JSON has neither NaN nor infinities: they become null.
    records = json.loads(json.dumps(list(report.records)), parse_constant=lambda _: None)
    (out / "results.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    for name, draw in {"figure": report.draw, **report.more_figures}.items():
        figure = Figure(figsize=(9, 5), layout="constrained")
        draw(figure)
        figure.savefig(out / f"{name}.png", dpi=120)
    return text
