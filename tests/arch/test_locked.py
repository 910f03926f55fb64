"""pyproject.toml, constraints/requirements.lock and constraints/sbom.cdx.json say the same; offline."""

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "constraints"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (FOLDER / "requirements.lock").read_text()
PINNED = re.compile(
    r"^([A-Za-z0-9._-]+)==(\S+?)(?: ; .*?)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)
LOCKED: dict[str, set[str]] = {}
"""Versions by name; most packages have one for all versions of Python."""
for _name, _version, _ in PINNED.findall(LOCK):
    LOCKED.setdefault(canonicalize_name(_name), set()).add(_version)
RELEASED = [
    requirement
    for extra in ("", *PROJECT["optional-dependencies"])
    if extra not in ("dev", "gpu")
    for requirement in (PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"])
    if Requirement(requirement).name != "torch"
]
"""What the package and its released extras ask for; torch is the machine's choice."""


def test_everything_is_pinned_with_hashes() -> None:
    lines = [line for line in LOCK.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(lines) == sum(map(len, LOCKED.values())) > 50


@pytest.mark.parametrize("requirement", RELEASED)
def test_what_is_asked_for_is_locked(requirement: str) -> None:
    asked = Requirement(requirement)
    name = canonicalize_name(asked.name)
    assert name in LOCKED, "run `make lock`"
    assert all(version in asked.specifier for version in LOCKED[name]), "run `make lock`"


def test_what_those_need_is_locked() -> None:
    """Of each locked package that is installed here, by its own metadata."""
    looked_at = 0
    for name in LOCKED:
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        looked_at += 1
        for text in needed:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in LOCKED, (name, text)
    assert looked_at > 40


def test_what_the_tests_run_with_is_what_is_locked() -> None:
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", (FOLDER / "cpu.txt").read_text(), re.MULTILINE)
    both = {canonicalize_name(name): version for name, version in pins if canonicalize_name(name) in LOCKED}
    assert len(both) > 8
    for name, version in both.items():
        assert {Version(locked) for locked in LOCKED[name]} == {Version(version)}, (name, "run `make lock`")


def test_the_sbom_holds_what_is_locked() -> None:
    sbom = json.loads((FOLDER / "sbom.cdx.json").read_text())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    found = {(canonicalize_name(component["name"]), component["version"]) for component in sbom["components"]}
    assert found == {(name, version) for name, versions in LOCKED.items() for version in versions}, "run `make lock`"
    described = sbom["metadata"]["component"]
    assert (described["name"], described["version"]) == (PROJECT["name"], PROJECT["version"])
    for component in sbom["components"]:
        assert component["purl"].startswith(f"pkg:pypi/{canonicalize_name(component['name'])}@")


def test_no_place_is_named_from_which_packages_come() -> None:
    assert "://" not in LOCK
    assert "index-url" not in LOCK
    assert "externalReferences" not in (FOLDER / "sbom.cdx.json").read_text().split('"components"')[1]
