"""The figure of a run: meta-loss, gradient norm, signal-to-noise ratio and families, from its ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Metrics = list[dict[str, Any]]

NUM_AVERAGED = 20
"""Lines of the log that a moving mean is over: a single update of an evolution strategy is mostly noise."""


def draw_run(metrics: Metrics) -> Figure:
    """Return the figure of a run, a panel for each quantity that was logged."""
    families = sorted({key[: -len("/meta")] for line in metrics for key in line if key.endswith("/meta")})
    validated = sorted({key for line in metrics for key in line if key.startswith("validation/")})
    panels: list[tuple[str, Sequence[str], bool]] = [
        ("meta-loss (objective; lower is better)", ["loss"], False),
        ("norm of the meta-gradient, before the bound", ["gradient_norm"], True),
        ("signal-to-noise ratio of the meta-gradient", ["snr"], False),
        ("validation loss", ["validation_loss", *(validated if len(validated) > 1 else [])], False),
        ("held-out loss of the inner runs, by family", [f"{name}/meta" for name in families], False),
    ]
    shown = [panel for panel in panels if any(_series(metrics, key)[0] for key in panel[1])]
    figure = Figure(figsize=(8, 2.6 * len(shown)), layout="constrained")
    for axes, (title, keys, is_log) in zip(
        figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0], shown, strict=True
    ):
        _draw_panel(axes, metrics, keys)
        axes.set_title(title, fontsize=10)
        axes.set_yscale("log" if is_log else "linear")
    axes.set_xlabel("meta-update")
    return figure


def _draw_panel(axes: Axes, metrics: Metrics, keys: Sequence[str]) -> None:
    """Draw quantities as points, with their moving means where there are many."""
    for index, key in enumerate(keys):
        updates, values = _series(metrics, key)
        color = f"C{index}" if len(keys) <= 10 else colormaps["tab20"](index % 20)
        label = key.removesuffix("/meta").removeprefix("validation/")
        if len(values) > NUM_AVERAGED:
            axes.plot(updates, values, ".", color=color, markersize=2, alpha=0.3)
            axes.plot(updates, moving_mean(values), color=color, label=label)
        else:
            axes.plot(updates, values, ".-", color=color, label=label)
    if len(keys) > 1:
        axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _series(metrics: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Return the updates in which a quantity was logged, and its values."""
    points = [(line["update"], line[key]) for line in metrics if line.get(key) is not None]
    return [update for update, _ in points], [value for _, value in points]


def moving_mean(values: Sequence[float]) -> list[float]:
    """Return for each value the mean of it and up to ``NUM_AVERAGED - 1`` values before it.

    Example:
        >>> moving_mean([1.0, 3.0, 5.0])
        [1.0, 2.0, 3.0]
    """
    windows = [values[max(0, end - NUM_AVERAGED) : end] for end in range(1, len(values) + 1)]
    return [fmean(window) for window in windows]
