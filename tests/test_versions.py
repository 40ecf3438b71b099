"""The versions that are named: in pyproject.toml, constraints.txt and the table of CONTRIBUTING.md."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ALLOWED = {
    **{one.name: one.specifier for one in map(Requirement, PROJECT["dependencies"])},
    "Python": SpecifierSet(PROJECT["requires-python"]),
}


def table() -> list[dict[str, str]]:
    """The rows of the table of tried versions, the minimum first."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Supported versions")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.M)]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


@pytest.mark.parametrize("name", ["torch", "transformers", "Python"])
def test_the_minimum_that_is_required_was_tried(name):
    (minimum,) = [one for one in ALLOWED[name] if one.operator == ">="]
    tried = table()[0][name]
    assert tried == minimum.version or tried == f"{minimum.version}.0"
    assert all(row[name] in ALLOWED[name] for row in table())


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_pinned_version_is_allowed(name):
    (pinned,) = re.findall(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert pinned in ALLOWED[name]
