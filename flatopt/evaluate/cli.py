"""``flatopt-eval``: tables and figures of measured results, with the baselines in the same run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import flatness_table, meta_speed, quality, reproduction, robustness, step_time
from ._report import Report, RunCache, write_report
from ._training import Options

COMMANDS: dict[str, tuple[Callable[[Options], Report], str, int]] = {
    "quality": (quality.report, "test accuracy and loss against tuned baselines", 5),
    "flatness": (flatness_table.report, "flatness of the minima that each optimizer reaches", 5),
    "step-time": (step_time.report, "time and memory of one step against AdamW", 5),
    "meta-speed": (meta_speed.report, "throughput of the inner loop of meta-training", 5),
    "reproduction": (reproduction.report, "regularized against plain learned optimizers, and tuned baselines", 5),
    "robustness": (robustness.report, "divergence over widths, depths, batch sizes and architectures", 1),
}
"""What each subcommand runs, its help, and its default number of seeds."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand and write ``table.md``, ``results.json`` and figures into the folder ``--out``.

    Finished runs are kept in ``runs.jsonl`` there: the same command goes on after any stop.

    Args:
        arguments: command line, ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: with code 2 for a request that cannot be carried out, after a line that says why.
    """
    chosen = build_parser().parse_args(arguments)
    report, _, _ = COMMANDS[chosen.command]
    options = Options(
        num_seeds=chosen.seeds,
        fast=chosen.fast,
        pretrained=getattr(chosen, "pretrained", Options.pretrained),
        cache=RunCache((chosen.cache or chosen.out) / "runs.jsonl"),
        split=getattr(chosen, "split", "test"),
        tasks=tuple(getattr(chosen, "tasks", ())),
        optimizers=tuple(getattr(chosen, "optimizers", ())),
        sets=tuple(getattr(chosen, "sets", ())),
        data=getattr(chosen, "data", Options.data),
        learned_only=getattr(chosen, "learned_only", Options.learned_only),
    )
    try:
        result = report(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"flatopt-eval: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(write_report(result, chosen.out))
    figures = ", ".join(f"{name}.png" for name in ("figure", *result.more_figures))
    print(f"Written to {chosen.out}: table.md, results.json, {figures}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="flatopt-eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, summary, num_seeds) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--out", type=Path, default=Path("runs/eval") / name, help="folder of results")
        command.add_argument("--cache", type=Path, help="folder of finished runs, if not --out (to share tuning)")
        command.add_argument("--seeds", type=_positive, default=num_seeds, help="runs per cell (default: %(default)s)")
        if name in ("quality", "reproduction"):
            text = "split of the table; in reproduction, meta has optimizees of its own"
            command.add_argument("--split", choices=("test", "meta"), default="test", help=text)
        if name in ("quality", "flatness", "reproduction"):
            command.add_argument("--tasks", nargs="+", default=(), help="parts of the names of the tasks to run")
        if name in ("quality", "flatness"):
            text = "names of the optimizers to run, for example: FlatOpt 'untrained core' Adam"
            command.add_argument("--optimizers", nargs="+", default=(), metavar="NAME", help=text)
        command.add_argument("--fast", action="store_true", help="toy sizes: shows that it works, in seconds")
        if name == "reproduction":
            command.add_argument(
                "--sets",
                nargs="+",
                default=(),
                metavar="NAME_OR_FOLDER",
                help="learned weights, of each rule the plain ones first (default: the nine sets of the paper)",
            )
            command.add_argument("--data", choices=("fashion-mnist", "mnist"), default="fashion-mnist", help="images")
            command.add_argument("--learned-only", action="store_true", help="leave the baselines out")
        else:
            command.add_argument("--pretrained", default="flat-v2", help="weights of FlatOpt: name, folder or Hub id")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    main()
