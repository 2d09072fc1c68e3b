"""What pyproject.toml and the two files of constraints say of versions agrees."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]


def pins(file: str) -> dict[str, Requirement]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in requirements}


def test_the_lowest_versions_are_the_bounds_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    parts = [
        re.search(pattern, text, re.S | re.M)
        for pattern in (r"^dependencies = .*?^\]", r"^ray = .*?$", r"^test = .*?$")
    ]
    bounds = {
        (requirement := Requirement(entry)).name: next(s.version for s in requirement.specifier if s.operator == ">=")
        for part in parts
        for entry in re.findall(r'"([\w-]+>=[^"]+)"', part[0])
    }
    lowest = {
        name: str(requirement.specifier).removeprefix("==")
        for name, requirement in pins("constraints-lowest.txt").items()
    }
    assert bounds.keys() == lowest.keys() and len(bounds) > 30
    del bounds["torch"]  # no older release of it was run
    assert all(f"{lowest[name]}.".startswith(f"{bound}.") for name, bound in bounds.items())


def oldest_python() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'requires-python = ">=([\d.]+)"', text)[1]


def test_the_oldest_python_is_asked_for_no_version_that_needs_a_newer_one():
    oldest, compared = oldest_python(), 0
    for name, requirement in pins("constraints.txt").items():
        first = {"python_version": oldest, "python_full_version": f"{oldest}.0"}
        if requirement.marker and not requirement.marker.evaluate(first):
            continue
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of the documentation
        if requirement.specifier.contains(installed.version, prereleases=True):
            compared += 1
            assert SpecifierSet(installed.metadata["Requires-Python"] or "").contains(f"{oldest}.0"), name
    if not compared:
        pytest.skip("the versions of constraints.txt are not installed")


def test_the_oldest_python_is_the_one_that_linters_workflow_and_pages_name():
    oldest = oldest_python()
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'target-version = "py{oldest.replace(".", "")}"' in text and f'\npython_version = "{oldest}"' in text
    named = re.findall(r'python-version: "([\d.]+)"', (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert named and set(named) == {oldest}
    for page in ("README.md", "CONTRIBUTING.md", "docs/getting_started.md"):
        assert f"Python {oldest} or newer" in (ROOT / page).read_text(encoding="utf-8"), page
    assert f"for version in {oldest} " in (ROOT / "scripts/release_check.sh").read_text(encoding="utf-8")
