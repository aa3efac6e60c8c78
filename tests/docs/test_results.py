"""Numbers in README, pages and cards are those of ``docs/results/*.json``, and say what the prose says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flatopt import load_pretrained

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
REPRODUCTION = json.loads((RESULTS / "reproduction.json").read_text(encoding="utf-8"))
SETS = [one["optimizer"] for one in REPRODUCTION["means"] if (ROOT / "pretrained" / one["optimizer"]).is_dir()]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RESULTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean_differences(regularized: str, measure: str) -> dict[Any, dict[str, float]]:
    own = {"regularized": regularized, "measure": measure, "optimizee": "mean"}
    return {one["seeds"]: one for one in REPRODUCTION["differences"] if own.items() <= one.items()}


def test_tables_in_pages_and_readme_are_those_of_the_json() -> None:
    stale = [path.name for path, text in script("generate").outputs().items() if path.read_text("utf-8") != text]
    assert not stale, f"run `python docs/results/generate.py`: {stale}"


def test_the_table_of_small_data_says_what_its_page_says() -> None:
    (table,) = json.loads((RESULTS / "small-data.json").read_text(encoding="utf-8"))["tables"]
    losses = {  # mean and standard deviation of every task
        name: [tuple(float(number) for number in cell.split(",")[0].split(" ± ")) for cell in cells]
        for name, *cells in table["rows"]
    }
    smallest = [
        index for index, name in enumerate(table["columns"][1:]) if int(re.findall(r"(\d+) rows", name)[0]) <= 250
    ]
    at_the_end, adam = losses["FlatOpt, num_steps"], losses["Adam, lr 1e-3, stopped early"]
    assert len(at_the_end) == 4 and len(smallest) == 2
    for stopped in (losses["FlatOpt, num_steps, stopped early"], losses["FlatOpt, stopped early"]):
        assert all(early < end for (early, _), (end, _) in zip(stopped, at_the_end, strict=True))
        assert all(adam[index][0] - stopped[index][0] <= adam[index][1] + stopped[index][1] for index in smallest)


def test_every_marked_table_of_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- begin docs/results/(\S+) -->\n[|*]", readme)
    assert names == re.findall(r"<!-- begin docs/results/(\S+) -->", readme)
    assert all((RESULTS / name).is_file() for name in names)


@pytest.mark.parametrize("name", REPRODUCTION["verdicts"])
def test_a_claim_is_said_to_hold_only_where_every_interval_says_so(name: str) -> None:
    more_accurate = all(one["low"] > 0 for one in mean_differences(name, "accuracy").values())
    flatter = all(one["high"] < 0 for one in mean_differences(name, "log_top_eigenvalue").values())
    assert ("holds" in REPRODUCTION["verdicts"][name]) == (more_accurate and flatter)


@pytest.mark.parametrize("name", SETS)
def test_cards_report_the_numbers_of_the_json(name: str) -> None:
    card = (ROOT / "pretrained" / name / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| (\S+) ± (\S+) \| (\S+) ± (\S+) \| (\S+) ± (\S+) \|$", card, re.MULTILINE)
    assert row
    (own,) = (one for one in REPRODUCTION["means"] if one["optimizer"] == name)
    expected = [own[key][part] for key in ("accuracy", "train_loss", "log_top_eigenvalue") for part in ("mean", "std")]
    assert [float(value) for value in row.groups()] == pytest.approx(expected, abs=0.0051)
    differences = re.findall(r"(accuracy|test loss|ln top eigenvalue) (\S+) \[(\S+), (\S+)\]", card)
    assert bool(differences) == (name in REPRODUCTION["verdicts"])
    keys = {"accuracy": "accuracy", "test loss": "loss", "ln top eigenvalue": "log_top_eigenvalue"}
    for measure, *values in differences:
        known = mean_differences(name, keys[measure]).values()
        ends = [[one[end] for end in ("mean", "low", "high")] for one in known]
        assert any([float(value) for value in values] == pytest.approx(one, abs=0.0051) for one in ends), (
            measure,
            values,
        )


def test_a_run_of_flatopt_eval_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = script("generate")
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "table.md").write_text(
        "# One\n\n| a | b |\n|---|---|\n| 1 ± 2 | x |\n\nA note.\n\n## Two\n\n| c |\n|---|\n| 3 |\n"
    )
    (run / "figure.png").write_bytes(b"png")
    generate.take("quality", run)
    content = json.loads((tmp_path / "quality.json").read_text("utf-8"))
    assert [one["title"] for one in content["tables"]] == ["One", "Two"]
    assert content["tables"][0]["rows"] == [["1 ± 2", "x"]] and content["tables"][0]["note"] == "A note."
    assert (tmp_path / "quality.png").is_file()
    assert "### Two\n\n| c |\n| --- |\n| 3 |\n" in generate.plain("quality", content)["quality.md"]


@pytest.mark.parametrize(
    "folder", sorted(RESULTS.glob("*-sets/*")), ids=lambda folder: f"{folder.parent.name}/{folder.name}"
)
def test_sets_that_do_not_ship_are_those_that_their_names_say(folder: Path) -> None:
    config = json.loads((folder / "training.json").read_text("utf-8"))
    term, _, seed = folder.name.partition("-")
    assert (config["objective"]["flatness"]["name"] is None) == (term == "without")
    assert config["seed"] == int(seed) and config["recipe"] == "flat-v2"
    assert load_pretrained(folder).rule == load_pretrained("flat-v2").rule
