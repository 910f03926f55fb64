"""Writes constraints/requirements.lock and constraints/sbom.cdx.json from pyproject.toml: `make lock`, online.

The lock holds every dependency of the released extras with the hashes of all its files, for all platforms; the SBOM
(CycloneDX) holds the same packages. torch is in neither: which build of it is right depends on the machine, and its
own dependencies come with it. Versions that constraints/cpu.txt names are taken from there: the tests ran with them.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints" / "requirements.lock"
SBOM = ROOT / "constraints" / "sbom.cdx.json"
NOT_RELEASED = ("dev", "gpu")
NOT_LOCKED = ("torch",)
HEADER = """\
# Every dependency of the released extras, with hashes; written by `make lock`. torch is not here: install the build
# that fits the machine first, then
#   pip install --require-hashes -r constraints/requirements.lock && pip install --no-deps omniserve
"""


def released(project: dict[str, Any]) -> list[str]:
    """The requirements of the package and of its released extras."""
    found = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        if extra not in NOT_RELEASED:
            found += requirements
    names = {requirement: re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in found}
    return [requirement for requirement in found if names[requirement] not in NOT_LOCKED]


def lock(project: dict[str, Any]) -> str:
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--universal", "--generate-hashes"]
    command += ["--python-version", project["requires-python"].removeprefix(">=")]
    command += ["--no-emit-index-url", "--no-header", "--constraint", str(ROOT / "constraints" / "cpu.txt")]
    requirements = "\n".join(released(project))
    ran = subprocess.run(command, input=requirements, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(ran.stderr)
    return HEADER + ran.stdout


def sbom() -> dict[str, Any]:
    """What the lock holds, without the places where it was found: they are nobody's business but the installer's."""
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", str(LOCK), "--pyproject", "pyproject.toml"]
    command += ["--mc-type", "library", "--spec-version", "1.6", "--output-reproducible"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if ran.returncode:
        sys.exit(ran.stderr)
    text = ran.stdout
    for component in json.loads(text)["components"]:  # named by what they are instead of by their line
        text = text.replace(f'"{component["bom-ref"]}"', f'"{component["purl"]}"')
    found: dict[str, Any] = json.loads(text)
    tools = found["metadata"]["tools"]
    for component in [*found["components"], *(tools if isinstance(tools, list) else tools["components"])]:
        component.pop("externalReferences", None)
        component.pop("description", None)
    return found


if __name__ == "__main__":
    LOCK.write_text(lock(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]))
    SBOM.write_text(json.dumps(sbom(), indent=1) + "\n")
    print(f"{LOCK.relative_to(ROOT)}, {SBOM.relative_to(ROOT)}")
