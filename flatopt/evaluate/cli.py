"""``flatopt-eval``: tables and figures of measured results, with the baselines in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .._checks import check_folder
from .._version import __version__
from ._cache import RunCache
from ._evaluation import Evaluation, add_options, one_line, read_options
from ._report import write_report
from .ablation import Ablation
from .compare import Compare
from .flatness_table import Flatness
from .quality import Quality
from .reproduction import Reproduction
from .robustness import Robustness
from .step_time import StepTime

DESCRIPTION = "Tables and figures of measured results, with the baselines in the same run."

EVALUATIONS: dict[str, type[Evaluation]] = {
    "quality": Quality,
    "flatness": Flatness,
    "ablation": Ablation,
    "compare": Compare,
    "step-time": StepTime,
    "reproduction": Reproduction,
    "robustness": Robustness,
}
"""The tables by the names of their subcommands."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand and write ``table.md``, ``results.json`` and figures into the folder ``--out``.

    Finished runs are kept in ``runs.sqlite3`` there: the same command goes on after any stop.

    Args:
        arguments: command line, ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: with code 2 for a request that cannot be carried out, after a line that says why; with 130 after
            Ctrl-C.
    """
    chosen = build_parser().parse_args(arguments)
    evaluation = read_options(EVALUATIONS[chosen.command], chosen)
    out = chosen.out or Path("runs/eval") / (chosen.command + ("-fast" if evaluation.fast else ""))
    path = (chosen.cache or out) / "runs.sqlite3"
    with one_line("flatopt-eval", f"the same command goes on from the finished runs in {path}"):
        check_folder(out)  # now, and not when the table is written after hours
        result = evaluation.report(RunCache(path))
        if evaluation.fast:
            result = result._replace(title=f"Toy sizes, not results: {result.title}")
        print(write_report(result, out))
    figures = ", ".join(f"{name}.png" for name in ("figure", *result.more_figures))
    print(f"Written to {out}: table.md, results.json, {figures}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="flatopt-eval", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"flatopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, evaluation in EVALUATIONS.items():
        command = commands.add_parser(name, help=evaluation.summary, description=evaluation.summary)
        command.add_argument(
            "--out", type=Path, help=f"folder of results (default: runs/eval/{name}, {name}-fast with --fast)"
        )
        command.add_argument("--cache", type=Path, help="folder of finished runs, if not --out (to share tuning)")
        add_options(command, evaluation)
    return parser
