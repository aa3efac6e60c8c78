"""``flatopt-train``: run, resume, plot and export meta-training; measure its speed; import published weights.

Exit codes: 0 when done; 2 for a request that cannot be carried out, with one line that says why; 130 after SIGINT and
143 after SIGTERM, when the run has been saved and can be resumed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._checks import check_device, check_extra, how_to_install
from .._extensions import extend
from .._version import __version__
from ..flatness import MEASURES
from ..pretrained import list_pretrained, push_to_hub
from ..rules import RULES
from . import speed
from ._describe import columns, recipe_table, settings
from ._log import check_tensorboard, read_metrics
from ._ranks import LostProcessError, RefusedByFirstError, is_main_process
from ._stop import TrainingInterrupted
from .checkpoint import RunState, checkpoints
from .config import MetaTrainConfig
from .export import export_rule
from .families import FAMILIES, check_families
from .import_weights import FORMATS, import_weights
from .recipes import RECIPES
from .trainer import ADJUSTABLE, check_unused, describe_run, load_run, train

REGISTRIES: dict[str, dict[str, Any]] = {
    "RULES": RULES,
    "MEASURES": MEASURES,
    "FAMILIES": FAMILIES,
    "RECIPES": RECIPES,
}
"""What a module of ``--import`` may add to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, that of the process if ``None``, and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parse(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    arguments.line = shlex.join(["flatopt-train", *argv])
    try:
        extend(REGISTRIES, arguments.imports)
        command(arguments)
    except RefusedByFirstError:
        return 2
    except BrokenPipeError:  # the reader of `flatopt-train list | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _refuse(error, str(error), arguments)
    except ImportError as error:
        extra = "eval" if (error.name or "").startswith("matplotlib") else "train"
        return _refuse(error, how_to_install(error, extra), arguments)
    except LostProcessError as error:
        print(f"flatopt-train: {error}; torchrun --max-restarts starts all of them anew", file=sys.stderr)
        return 1
    except TrainingInterrupted as interruption:
        if is_main_process():
            print(f"flatopt-train: {interruption}; {_go_on(arguments.out)}", file=sys.stderr)
        return 128 + interruption.signal_number
    except KeyboardInterrupt:
        print("flatopt-train: interrupted by SIGINT; nothing was lost", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _refuse(error: Exception, reason: str, arguments: argparse.Namespace) -> int:
    """Say in one line why a request cannot be carried out, and how to go on with a run that has begun."""
    line = " ".join(reason.split()).rstrip(".")
    begun = arguments.command in (_run, _resume) and bool(checkpoints(arguments.out / "checkpoints"))
    if begun and isinstance(error, OSError | ImportError):
        line += f"; then {_go_on(arguments.out)}"
    print(f"flatopt-train: {line}", file=sys.stderr)
    return 2


def _go_on(out: Path) -> str:
    return f"go on with: flatopt-train resume {out}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    imports = argparse.ArgumentParser(prog="flatopt-train", add_help=False, allow_abbrev=False)
    text = "module whose RULES, MEASURES, FAMILIES and RECIPES are added to those of flatopt; may be repeated"
    imports.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help=text)
    imported, argv = imports.parse_known_args(argv)  # anywhere in the line
    parser = _parser(imports)
    arguments, rest = parser.parse_known_args(argv, imported)
    # argparse takes positional arguments in one piece: overrides that follow an option are left over.
    if rest and ("overrides" not in arguments or any(one.startswith("-") for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser(imports: argparse.ArgumentParser) -> argparse.ArgumentParser:
    text = "Learn the weights of an update rule."
    parser = argparse.ArgumentParser(prog=imports.prog, description=text, parents=[imports])
    parser.add_argument("--version", action="version", version=f"flatopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    add("list", _list, "show the recipes, and how long their shipped runs took on what hardware")

    show = add("show", _show, "show what a recipe is for, and every key that can be set")
    show.add_argument("recipe", metavar="RECIPE", help="a name from `flatopt-train list`")
    show.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings to show it with")

    run = add("run", _run, "start a run")
    run.add_argument("recipe", metavar="RECIPE", help="a name from `flatopt-train list`")
    run.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for example estimator.std=0.02")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run, empty or absent")
    run.add_argument("--device", default="cpu", help="where to compute, for example cuda (default: cpu)")
    run.add_argument("--dry-run", action="store_true", help="check everything and show the settings, but do nothing")

    resume = add("resume", _resume, "go on from the last whole checkpoint")
    resume.add_argument("out", type=Path, metavar="DIR", help="folder of the run")
    resume.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"one of {', '.join(ADJUSTABLE)}")
    resume.add_argument("--device", default="cpu", help="where to compute, for example cuda (default: cpu)")

    plot = add("plot", _plot, "draw meta-loss, gradient norm, signal-to-noise ratio and families of a run")
    plot.add_argument("out", type=Path, metavar="DIR", help="folder of the run")
    plot.add_argument("--to", type=Path, metavar="FILE", help="figure to write (default: DIR/metrics.png)")

    export = add("export", _export, "save the learned rule of the last whole checkpoint")
    export.add_argument("out", type=Path, metavar="DIR", help="folder of the run")
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where to save")

    measured = add("speed", _speed, "measure the throughput of inner training on the CPU, plain, recorded and compiled")
    measured.add_argument("--rounds", type=int, default=9, metavar="N", help="the median is over these (default: 9)")

    imported = add("import", _import, "save published weights as a learned rule")
    imported.add_argument("file", type=Path, metavar="FILE", help="dill pickle of {module: {variable: array}}")
    imported.add_argument("--rule", required=True, choices=FORMATS, help="what the weights belong to")
    imported.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where to save")

    push = add("push", _push, "publish a learned rule on the Hugging Face Hub")
    push.add_argument("learned", metavar="FOLDER", help="an exported folder, or the name of shipped weights")
    push.add_argument("repo_id", metavar="org/name", help="repository, made if it does not exist")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if it does not exist")
    push.add_argument("--tag", metavar="TAG", help="name for the commit, such as v1.0")
    push.add_argument(
        "--private", action="store_true", default=None, help="make it private; nothing is published where it is public"
    )
    push.add_argument("--pr", action="store_true", help="open a pull request instead of committing")
    return parser


def _list(arguments: argparse.Namespace) -> None:
    print("\n".join(recipe_table(RECIPES)))
    print("took, on: the run behind the shipped set of that name. flatopt-train show RECIPE says more.")


def _show(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    purpose = textwrap.dedent(f"    {RECIPES[arguments.recipe].__doc__ or ''}").strip().removeprefix("Return ")
    print(purpose[:1].upper() + purpose[1:])
    print("\n".join(settings(config)))


def _config(arguments: argparse.Namespace) -> MetaTrainConfig:
    if arguments.recipe not in RECIPES:
        raise ValueError(f"unknown recipe {arguments.recipe!r}: valid are {', '.join(RECIPES)}")
    return RECIPES[arguments.recipe]().override(arguments.overrides)


def _run(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    check_extra("train")
    if arguments.dry_run:
        check_unused(arguments.out)
        check_families(config)
        if config.tensorboard:
            check_tensorboard()
        for task in config.tasks:  # data that is not there would stop the run only after it has begun
            FAMILIES[task.name].data.table()
        would = describe_run(RunState.fresh(config), check_device(arguments.device), arguments.out)
        print("\n".join([*settings(config), f"{would} (nothing was done)"]))
    else:
        train(config, arguments.out, device=arguments.device, command=arguments.line)


def _resume(arguments: argparse.Namespace) -> None:
    config = load_run(arguments.out).config.override(arguments.overrides)
    check_extra("train")
    train(config, arguments.out, device=arguments.device, resume=True, command=arguments.line)


def _plot(arguments: argparse.Namespace) -> None:
    # Imported here: matplotlib is not needed to train.
    from ._plot import draw_run

    path = arguments.to or arguments.out / "metrics.png"
    if path.is_dir() or not path.suffix:
        raise ValueError(f"--to must name a figure, such as {path / 'metrics.png'}, not {path}")
    log = arguments.out / "metrics.jsonl"
    metrics = read_metrics(log)
    if not metrics:
        raise ValueError(f"{log} has no line yet: nothing to draw")
    draw_run(metrics).savefig(path, dpi=150)
    print(f"drawn in {path}")


def _export(arguments: argparse.Namespace) -> None:
    state = load_run(arguments.out)
    export_rule(state, arguments.out / "metrics.jsonl").save_pretrained(arguments.to)
    print(f"update {state.update} of {state.config.num_updates} saved in {arguments.to}")
    # A name of shipped weights would be taken for those.
    source = f"./{arguments.to}" if str(arguments.to) in list_pretrained() else arguments.to
    print(f'use it with: flatopt.FlatOpt(model.parameters(), pretrained="{source}")')


def _speed(arguments: argparse.Namespace) -> None:
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    rows = speed.ratios(speed.measure(speed.modes(), arguments.rounds))
    print("\n".join(columns([("step", "problem-steps/s", "ratio"), *rows])))
    print(f"{speed.WHAT}; median over {arguments.rounds} rounds")


def _import(arguments: argparse.Namespace) -> None:
    import_weights(arguments.file, arguments.rule).save_pretrained(arguments.to)
    print(f"{arguments.file} saved in {arguments.to}")


def _push(arguments: argparse.Namespace) -> None:
    result = push_to_hub(
        arguments.learned,
        arguments.repo_id,
        revision=arguments.revision,
        tag=arguments.tag,
        private=arguments.private,
        create_pr=arguments.pr,
    )
    print(f"{result.url}\nuse it with: {result.usage}")
