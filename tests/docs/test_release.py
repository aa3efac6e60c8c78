"""Version, dates and links of the release agree."""

from __future__ import annotations

import re
from pathlib import Path

import flatopt

ROOT = Path(__file__).parents[2]


def test_changelog_and_citation_name_the_version_of_the_package_and_one_date() -> None:
    newest = re.search(
        r"^## \[(\S+)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert newest
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    cited = re.search(r"^version: (\S+)\ndate-released: \"(\S+)\"$", citation, re.MULTILINE)
    assert cited and cited.groups() == newest.groups()
    assert newest[1] == flatopt.__version__


def test_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text("utf-8"))
    assert links
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing
