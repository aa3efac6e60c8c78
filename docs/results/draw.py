"""Draw the figures of the documentation from ``docs/results/*.json``: ``python docs/results/draw.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "flatopt"  # the same file for the same numbers
from matplotlib import pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parent
COLOURS = {"l2o-dm": "C0", "rnnprop": "C1", "l2o-scale": "C2"}


def main() -> None:
    """Write every figure beside the tables."""
    content = json.loads((RESULTS / "reproduction.json").read_text("utf-8"))
    claim(content["differences"], RESULTS / "reproduction.svg")


def claim(differences: list[dict[str, Any]], path: Path) -> None:
    """Draw the differences of the regularized sets from the plain ones: means with intervals, optimizees as dots."""
    best = {one["regularized"]: one["seeds"] for one in differences if one["seeds"] in (10, 60)}  # 60 where there are
    sets = list(dict.fromkeys(one["regularized"] for one in differences))
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axes, measure in zip(panels, ("accuracy", "log_top_eigenvalue"), strict=True):
        for height, name in enumerate(sets):
            own = [one for one in differences if one["regularized"] == name and one["measure"] == measure]
            own = [one for one in own if one["seeds"] == best[name]]
            colour = COLOURS[own[0]["plain"]]
            dots = [one["mean"] for one in own if one["optimizee"] != "mean"]
            axes.scatter(dots, [height] * len(dots), s=14, color=colour, alpha=0.4)
            (mean,) = (one for one in own if one["optimizee"] == "mean")
            errors = [[mean["mean"] - mean["low"]], [mean["high"] - mean["mean"]]]
            axes.errorbar(mean["mean"], height, xerr=errors, color=colour, marker="o", markersize=7, linewidth=2.5)
        axes.axvline(0, color="0.4", linewidth=1)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_xscale("symlog", linthresh=1)
    panels[0].set_xticks([-10, -1, 0, 1, 10], ["-10", "-1", "0", "+1", "+10"])
    panels[0].set_xlabel("test accuracy, points (right is better)")
    panels[1].set_xlabel("ln top eigenvalue (left is flatter)")
    panels[0].set_yticks(range(len(sets)), [f"{name}, {best[name]} seeds" for name in sets])
    panels[0].invert_yaxis()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
