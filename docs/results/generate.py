"""Write every table of results from its JSON: ``python docs/results/generate.py``.

Numbers stand once, in ``docs/results/*.json``.  The pages include the ``*.md`` files that this script writes beside
them, and README.md, which cannot include anything, holds copies between two comments::

    <!-- begin docs/results/NAME.md -->
    <!-- end docs/results/NAME.md -->

After a new measurement, ``--take quality runs/eval/quality --command "flatopt-eval quality"`` reads the ``table.md``
that the command wrote into that folder, puts it into ``quality.json``, and copies the figures.  ``--check`` writes
nothing and fails where a file is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent
ROOT = RESULTS.parents[1]

MARK = "<!-- {} docs/results/{} -->"
WRITTEN = "<!-- Written by docs/results/generate.py from {}: do not edit. -->\n"

WIDE = "---\nhide-toc: true\n---\n\n"
"""On pages of tables alone their width is worth more than the list of headings."""

DIGITS = {
    "train_loss": 3,
    "accuracy": 2,
    "loss": 3,
    "gap": 3,
    "top_eigenvalue": 2,
    "trace": 1,
    "local_entropy": 2,
    "log_top_eigenvalue": 3,
}
TITLES = {
    "train_loss": "train loss",
    "accuracy": "accuracy %",
    "loss": "test loss",
    "gap": "gap",
    "top_eigenvalue": "top eigenvalue",
    "trace": "trace",
    "local_entropy": "local entropy",
    "log_top_eigenvalue": "ln top eigenvalue",
}
MEANS = "Means and counts"
"""Title of the table that ``flatopt-eval quality`` sums up with; of it the columns ``SUMMARY`` are shown in README."""

SUMMARY = {
    "optimizer": "optimizer",
    "accuracy %": "accuracy %",
    "-100 MSE": "-100 MSE",
    "mean rank": "mean rank",
    "at least the best tuned": "no worse than the best tuned one",
}
COMMAND = "OMP_NUM_THREADS=1 flatopt-eval reproduction"
RULES = {"l2o-dm": "L2O-DM", "rnnprop": "RNNProp", "l2o-scale": "L2O-Scale"}
PENALTIES = {"hessian": "Hessian", "entropy": "entropy"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a file is stale")
    parser.add_argument("--take", nargs=2, metavar=("NAME", "RUN"), help="read the folder RUN into NAME.json first")
    parser.add_argument("--command", help="with --take: the command that wrote the folder")
    chosen = parser.parse_args(arguments)
    if chosen.take:
        take(chosen.take[0], Path(chosen.take[1]), chosen.command)
    stale = [path for path, text in outputs().items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{'stale' if chosen.check else 'written'}: {path.relative_to(ROOT)}")
        if not chosen.check:
            path.write_text(outputs()[path], "utf-8")
    return int(chosen.check and bool(stale))


def outputs() -> dict[Path, str]:
    """Return every generated file with the text that it should have."""
    files: dict[str, str] = {}
    for source in sorted(RESULTS.glob("*.json")):
        content = json.loads(source.read_text("utf-8"))
        made = reproduction(content) if source.stem == "reproduction" else plain(source.stem, content)
        written = WRITTEN.format(source.name) + "\n"
        files |= {name: (WIDE if text.startswith("# ") else "") + written + text for name, text in made.items()}
    files["gallery.md"] = WRITTEN.format("the figures beside it") + "\n" + gallery()
    readme = (ROOT / "README.md").read_text("utf-8")
    for name, text in files.items():
        begin, end = MARK.format("begin", name), MARK.format("end", name)
        body = text.partition("-->\n")[2].strip()
        readme = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{body}\n{end}", readme, flags=re.DOTALL)  # noqa: B023
    return {RESULTS / name: text for name, text in files.items()} | {ROOT / "README.md": readme}


def gallery() -> str:
    """Return the page of all figures, each under the command that draws it."""
    figures = sorted(path.name for path in RESULTS.iterdir() if path.suffix in (".png", ".svg"))
    parts = []
    for name in sorted(figures, key=lambda name: list(FIGURES).index(name) if name in FIGURES else len(FIGURES)):
        stem = name.partition(".")[0]
        command, text = FIGURES.get(name, (f"flatopt-eval {stem}", stem.replace("-", " ")))
        parts.append(f"## `{command}`\n\n```{{figure}} {name}\n:alt: {text}\n\n{text}\n```\n")
    return "# Gallery\n\nFigures that the commands draw.\n\n" + "\n".join(parts)


FIGURES = {
    "demo.png": (
        "make demo",
        "A small convolutional network on handwritten digits: training loss, and the minima reached.",
    ),
    "quality.png": ("flatopt-eval quality", "Ranks of the optimizers on every task (dots), and their means (bars)."),
    "quality-differences.png": (
        "flatopt-eval quality",
        "Score less that of the tuned Adam with a cosine, task by task, with 95 % intervals over seeds.",
    ),
    "quality-profile.png": (
        "flatopt-eval quality",
        "On which share of the tasks the error is at most so many times the smallest one: higher is better.",
    ),
    "quality-curves.png": ("flatopt-eval quality", "Training loss and test score along the run, of four tasks."),
    "flatness.png": (
        "flatopt-eval flatness",
        "Curvature of the minima that are reached, and their scores. Large dots are means, small ones seeds.",
    ),
    "step-time.png": ("flatopt-eval step-time", "Time of a step on one CPU core, next to AdamW."),
    "step-time-gpu.png": ("flatopt-eval step-time --device cuda", "Time of a step on an H200, next to AdamW."),
    "robustness.png": (
        "flatopt-eval robustness",
        "How far the training loss comes down over widths, depths and batch sizes, and where it does not.",
    ),
    "ablation.png": (
        "flatopt-eval ablation",
        "What each part adds: score less that of a rule with Adam's direction, task by task and on average.",
    ),
    "spectrum.png": (
        "flatness.plot_spectral_density",
        "Eigenvalues of the Hessian at the end of 400 steps on digits, one seed (`docs/experiments/spectrum.py`).",
    ),
    "reproduction.svg": ("python docs/results/draw.py", "Regularized less plain sets: means with 95 % intervals."),
}
"""Command and caption of the figures, in the order of the gallery; others follow under their names."""


def plain(stem: str, content: dict[str, Any]) -> dict[str, str]:
    """Return one file of all tables of a run, and one of its summary where it has one.

    What has not been measured yet is said in one line, in the place of both.
    """
    if "pending" in content:
        text = f"*{content['pending']}*\n"
        return {f"{stem}.md": text} | ({"quality-summary.md": text} if stem == "quality" else {})
    tables = content["tables"]
    if "title" in content:
        text = f"# {content['title']}\n\n{content['note']}\n\n" + "\n".join(map(section, tables))
    elif len(tables) == 1:
        text = about(tables[0]) + table(tables[0]["columns"], tables[0]["rows"])
    else:
        first, *others = tables
        means_first = sorted([first | {"note": "", "command": ""}, *others], key=lambda one: one["title"] != MEANS)
        text = about(first) + "\n".join("#" + section(one) for one in means_first)
    made = {f"{stem}.md": text}
    return made | {f"{stem}-summary.md": summary(one) for one in tables if one["title"] == MEANS}


def summary(one: dict[str, Any]) -> str:
    """Return the few columns of the table of means that README and landing page show."""
    chosen = [index for index, name in enumerate(one["columns"]) if name in SUMMARY]
    rows = [[row[index] for index in chosen] for row in one["rows"] if "untrained" not in row[0]]
    header = [SUMMARY[one["columns"][index]] for index in chosen]
    rows.sort(key=lambda row: float(row[header.index("mean rank")]))
    for column, name in enumerate(header):  # the number of tasks behind a mean stands in the header if it is one number
        counts = {row[column].partition(" (")[2] for row in rows}
        if len(counts) == 1 and (count := counts.pop()):
            header[column] = f"{name}, {count.rstrip(')')} tasks"
            rows = [[*row[:column], row[column].partition(" (")[0], *row[column + 1 :]] for row in rows]
    return table(header, rows)


def reproduction(content: dict[str, Any]) -> dict[str, str]:
    """Return the summary of the claim, all tables of the evaluation, and those of the search."""
    differences = content["differences"]
    pairs = list(dict.fromkeys((one["regularized"], one["plain"]) for one in differences))
    about = content["about"]
    keys = ("train_loss", "accuracy", "loss", "gap", "top_eigenvalue", "trace", "local_entropy")
    means = ("train_loss", "accuracy", "loss", "gap", "log_top_eigenvalue", "local_entropy")
    everything = [
        {
            "title": "Means over the optimizees",
            "note": f"Mean ± standard deviation over {about['seeds']} seeds, `test` split; {about['hardware']}.",
            "command": about["command"],
            "columns": ["optimizer", *(TITLES[key] for key in means)],
            "rows": [[one["optimizer"], *(spread(one, key) for key in means)] for one in content["means"]],
        },
        *(paired(differences, pairs, key, about["seeds"]) for key in ("accuracy", "loss", "log_top_eigenvalue")),
        paired(differences, pairs, "top_eigenvalue", about["seeds"]),
        sixty(differences),
        *(one for one in content["search"] if one["name"] in REPORTED),
        {
            "title": "Every optimizee",
            "columns": ["optimizee", "optimizer", "lr", *(TITLES[key] for key in keys)],
            "rows": [
                [one["optimizee"], one["optimizer"], f"{one['lr']:g}", *(spread(one, key) for key in keys)]
                for one in content["optimizees"]
            ],
        },
    ]
    return {
        "claim.md": claim(content, pairs),
        "reproduction.md": "# Tables of the reproduction\n\n" + "\n".join(map(section, everything)),
        "search.md": "# Tables of the search\n\n"
        + "\n".join(section(one) for one in content["search"] if one["name"] not in REPORTED),
    }


REPORTED = ("meta-seeds", "heavy-entropy", "control")
"""Tables on the reported optimizees: they belong to the results and not to the search."""


def claim(content: dict[str, Any], pairs: Iterable[tuple[str, str]]) -> str:
    """Return one row per regularized set: mean differences with their intervals, and the verdict."""
    keys = ("accuracy", "loss", "log_top_eigenvalue")
    names = {"accuracy": "accuracy, points", "loss": "test loss", "log_top_eigenvalue": "ln top eigenvalue"}
    rows = []
    for regularized, base in pairs:
        own = [one["seeds"] for one in content["differences"] if one["regularized"] == regularized]
        for seeds in dict.fromkeys(own):
            cells = [find(content["differences"], regularized, seeds, key) for key in keys]
            penalty = PENALTIES[regularized.removeprefix(f"{base}-")]
            verdict = content["verdicts"][regularized]
            values = [interval(one, digits_of(one)) if one else "" for one in cells]
            rows.append([RULES[base], penalty, str(seeds), *values, verdict])
    return table(["rule", "penalty", "seeds", *(names[key] for key in keys), "claim"], rows)


def find(differences: list[dict[str, Any]], regularized: str, seeds: object, measure: str) -> dict[str, Any] | None:
    """Return the mean difference of one pair, one number of seeds and one measure."""
    wanted = {"regularized": regularized, "seeds": seeds, "measure": measure, "optimizee": "mean"}
    return next((one for one in differences if wanted.items() <= one.items()), None)


def paired(differences: list[dict[str, Any]], pairs: Sequence[tuple[str, str]], key: str, seeds: int) -> dict[str, Any]:
    """Return the differences of one measure as pairs x optimizees."""
    own = [one for one in differences if one["measure"] == key and one["seeds"] == seeds]
    optimizees = sorted(dict.fromkeys(one["optimizee"] for one in own), key=lambda name: name != "mean")
    cells = {(one["regularized"], one["optimizee"]): interval(one, DIGITS[key]) for one in own}
    return {
        "title": f"Paired differences: {TITLES[key]}",
        "note": f"Regularized less plain, mean and 95 % interval over {seeds} seeds. Images: Fashion-MNIST or digits.",
        "columns": ["set", *(name.removesuffix(", Fashion-MNIST") for name in optimizees)],
        "rows": [[regularized, *(cells[regularized, name] for name in optimizees)] for regularized, _ in pairs],
    }


def sixty(differences: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the longer evaluation of ``rnnprop-entropy``."""
    keys = ("accuracy", "loss", "log_top_eigenvalue")
    own = [one for one in differences if one["seeds"] == 60]
    cells = {(one["optimizee"], one["measure"]): interval(one, digits_of(one)) for one in own}
    fresh = find(differences, "rnnprop-entropy", "10 to 59", "accuracy")
    assert fresh
    return {
        "title": "`rnnprop-entropy` less `rnnprop`, 60 seeds",
        "note": "The number of seeds was fixed before any result of this set on these networks was seen. "
        f"Seeds 10 to 59 alone: accuracy {interval(fresh, 2)} points.",
        "command": f"{COMMAND} --learned-only --seeds 60 --sets rnnprop rnnprop-entropy",
        "columns": ["optimizee", "accuracy, points", "test loss", "ln top eigenvalue"],
        "rows": [
            [name, *(cells[name, key] for key in keys)] for name in dict.fromkeys(one["optimizee"] for one in own)
        ],
    }


def digits_of(one: dict[str, Any]) -> int:
    """Return the digits of a difference: logarithms of the longer evaluation were kept with two."""
    return 2 if one["measure"] == "log_top_eigenvalue" and one["seeds"] == 60 else DIGITS[one["measure"]]


def spread(record: dict[str, Any], key: str) -> str:
    """Return ``mean ± std``."""
    return " ± ".join(f"{record[key][part]:.{DIGITS[key]}f}" for part in ("mean", "std"))


def interval(one: dict[str, Any], digits: int) -> str:
    """Return ``mean [low, high]``."""
    mean, low, high = (f"{one[end]:+.{digits}f}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def section(one: dict[str, Any]) -> str:
    """Return a heading, what the table is, the command behind it, and the table."""
    return f"## {one['title']}\n\n{about(one)}{table(one['columns'], one['rows'])}"


def about(one: dict[str, Any]) -> str:
    """Return what a table is, and the command behind it."""
    note = f"{one['note']}\n\n" if one.get("note") else ""
    return note + (f"```console\n$ {one['command']}\n```\n\n" if one.get("command") else "")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(unbroken, cells))} |\n" for cells in lines)


def unbroken(cell: str) -> str:
    """Keep a number with its spread, and the ends of an interval, on one line."""
    return re.sub(r"(\[\S+,) (\S+\])", "\\1\u00a0\\2", cell.replace(" ± ", "\u00a0±\u00a0"))


def take(name: str, run: Path, command: str | None = None) -> None:
    """Read the tables that ``flatopt-eval`` wrote into ``run``, and copy its figures beside them."""
    content = (run / "table.md").read_text("utf-8")
    if content.startswith("# Toy sizes"):
        raise SystemExit(f"{run} holds a run with --fast: its numbers mean nothing")
    tables = []
    for part in re.split(r"^#+ ", content, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        lines = [line for line in text.splitlines() if line.startswith("|")]
        if not lines:
            continue
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        note = " ".join(line for line in text.splitlines() if line and not line.startswith("|"))
        key = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        found = {"name": key, "title": title, "note": note, "command": None if tables else command}
        tables.append(found | {"columns": cells[0], "rows": cells[2:]})
    lines = (json.dumps(one, ensure_ascii=False, indent=1) for one in tables)
    (RESULTS / f"{name}.json").write_text('{"tables": [\n' + ",\n".join(lines) + "\n]}\n", "utf-8")
    for figure in run.glob("*.png"):
        shutil.copy(figure, RESULTS / (f"{name}.png" if figure.stem == "figure" else f"{name}-{figure.name}"))


if __name__ == "__main__":
    sys.exit(main())
