"""Names on huggingface.co: what is asked of huggingface_hub, and one sentence for each of its errors."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from omniserve.base.config import Options
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.engine.build import build, open_source
from omniserve.formats.checkpoint import FolderSource
from omniserve.formats.hub import FETCHED, SKIPPED, HubName, fetch, hub_name
from tests.tiny import tiny_model

NAME = HubName("org/name")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("meta-llama/Llama-3.1-8B", HubName("meta-llama/Llama-3.1-8B")),
        ("Qwen/Qwen2.5_x:q4.gguf", HubName("Qwen/Qwen2.5_x", "q4.gguf")),
        ("gpt2", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("/a/b", None),
        ("../b", None),
        ("models/x.gguf", None),
        ("models/x.safetensors", None),
        ("org/name:../x.gguf", None),
        ("org/name:x.bin", None),
        ("org/" + "n" * 5000, None),
        ("a\0b/c", None),
        ("", None),
    ],
)
def test_what_can_be_a_name(word: str, name: HubName | None) -> None:
    assert hub_name(word) == name
    assert name is None or str(name) == word


class Hub:
    """Stands in for huggingface.co: `snapshot_download` gives a folder or raises; remembers what it was asked."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, answer: Path | Exception, files: list[str] | None = None
    ) -> None:
        self.asked: list[dict[str, Any]] = []
        self.listed = 0

        def snapshot_download(repository: str, **keywords: Any) -> str:
            self.asked.append({"repository": repository, **keywords})
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        def list_repo_files(_: Any, repository: str, *, revision: str | None) -> list[str]:
            self.listed += 1
            return files or []

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)


def test_a_folder_is_fetched_and_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch, tiny_model(tmp_path / "snapshots" / "0a1b"))
    built = build("org/name", Options(revision="v2", download_dir="/models"))
    assert isinstance(built.source, FolderSource)
    assert built.plan.model == "name"
    (asked,) = hub.asked
    assert (asked["repository"], asked["revision"], asked["cache_dir"]) == ("org/name", "v2", "/models")
    assert asked["local_files_only"] is False
    assert asked["allow_patterns"] == list(FETCHED)
    assert asked["ignore_patterns"] == list(SKIPPED)
    assert hub.listed == 0


def test_no_pickle_and_nothing_twice_is_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "tokenizer.json", "chat_template.jinja", "model-00001-of-00002.safetensors"]
    others = [
        "pytorch_model.bin", "model.pt", "consolidated.00.pth", "original/consolidated.safetensors", "README.md",
        "onnx/model.onnx", "modeling_x.py", "consolidated.safetensors", "adapter_model.safetensors", "x.gguf",
        "training_args.bin", "fp16/model.safetensors",
    ]  # fmt: skip
    found = filter_repo_objects(wanted + others, allow_patterns=list(FETCHED), ignore_patterns=list(SKIPPED))
    assert list(found) == wanted


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch, AssertionError("nothing is to be fetched"))
    tiny_model(tmp_path / "org" / "name")
    assert open_source("org/name", Options()).path == Path("org/name")
    assert hub.asked == []
    with pytest.raises(ConfigError, match=r"^revision=v2: only a name on huggingface.co has revisions, not org/name$"):
        open_source("org/name", Options(revision="v2"))


def test_offline_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match=r"^org/name holds no \*\.safetensors and no \*\.gguf file$"):
        fetch(NAME, offline=True)
    assert hub.asked[0]["local_files_only"] is True
    assert hub.listed == 0


def test_one_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a[1].gguf").write_bytes(b"GGUF")
    hub = Hub(monkeypatch, tmp_path, ["a[1].gguf"])
    assert fetch(HubName("org/name", "a[1].gguf")) == tmp_path / "a[1].gguf"
    assert hub.asked[0]["allow_patterns"] == ["a[[]1].gguf"]
    with pytest.raises(CheckpointError, match=r"^org/name has no file a.gguf \(did you mean a\[1\].gguf\?\)$"):
        fetch(HubName("org/name", "a.gguf"))


def test_progress_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub uses the class: a bar of files, one of bytes, and no word on standard error."""
    seen: list[tuple[int, int]] = []
    hub = Hub(monkeypatch, tmp_path / "none")
    with pytest.raises(CheckpointError):
        fetch(NAME, progress=lambda done, total: seen.append((done, total)))
    bar = hub.asked[0]["tqdm_class"]
    count, both = bar(total=3, desc="Fetching 3 files"), bar(total=0, unit="B", unit_scale=True, name="x", initial=0)
    count.update(1)
    both.total = 100
    both.update(60)
    count.update(1)
    both.update(40)
    assert seen[-3:] == [(60, 100), (60, 100), (100, 100)]


def http(kind: type[errors.HfHubHTTPError], status: int = 404) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status} Client Error.\n\nSorry for https://huggingface.co/x", response=response)  # type: ignore[arg-type]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


LOGIN = "log in with `hf auth login` or set HF_TOKEN"
SENTENCES: dict[str, tuple[Callable[[], Exception], dict[str, Any], str]] = {
    "gated": (
        lambda: http(errors.GatedRepoError, 403),
        {},
        f"org/name is gated: ask for access at https://huggingface.co/org/name, then {LOGIN}",
    ),
    "not found": (
        lambda: http(errors.RepositoryNotFoundError, 401),
        {},
        "org/name is no file or folder here, and huggingface.co has no such model, or it is private: check the name, "
        f"or {LOGIN}",
    ),
    "revision": (lambda: http(errors.RevisionNotFoundError), {"revision": "v9"}, "org/name has no revision 'v9'"),
    "no network": (
        lambda: caused(errors.LocalEntryNotFoundError("Got: ConnectError\nlong"), OSError(-2, "Name not known")),
        {},
        "org/name is no file or folder here, and huggingface.co cannot be reached: [Errno -2] Name not known",
    ),
    "offline": (
        lambda: errors.LocalEntryNotFoundError("Cannot find"),
        {"offline": True},
        "org/name is no file or folder here, and it was not fetched before, or not all of it: offline=True forbids "
        "connections",
    ),
    "offline by variable": (
        lambda: caused(errors.LocalEntryNotFoundError("Cannot find"), errors.OfflineModeIsEnabled("off")),
        {},
        "org/name is no file or folder here, and it was not fetched before: HF_HUB_OFFLINE forbids connections",
    ),
    "name": (
        lambda: errors.HFValidationError("Repo id must not"),
        {},
        "org/name is no file or folder here, and that is no name of a model on huggingface.co",
    ),
    "disabled": (
        lambda: http(errors.DisabledRepoError, 403),
        {},
        "org/name cannot be fetched from huggingface.co: 403 Client Error. Sorry for https://huggingface.co/x; try "
        "again, what is there already is kept",
    ),
    "disk": (
        lambda: OSError(28, "No space left on device"),
        {},
        "org/name cannot be fetched from huggingface.co: [Errno 28] No space left on device; try again, what is there "
        "already is kept",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_errors_are_one_sentence(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, keywords, sentence = SENTENCES[case]
    Hub(monkeypatch, make())
    with pytest.raises(CheckpointError, match=f"^{re.escape(sentence)}$"):
        fetch(NAME, **keywords)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            "org/name holds weights as a pickle only (pytorch_model.bin), which no serving command opens: run `hf "
            "download org/name --local-dir name && omniserve convert name -o name-st` once",
        ),
        (
            ["b.gguf", "a.gguf", "mm/c.gguf"],
            "org/name holds GGUF files: give one of them, org/name:a.gguf, org/name:b.gguf",
        ),
        (["README.md"], "org/name holds no *.safetensors and no *.gguf file"),
    ],
)
def test_repositories_without_safetensors(
    files: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch, tmp_path, files)
    with pytest.raises(CheckpointError, match=f"^{re.escape(sentence)}$"):
        fetch(NAME)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="fetching org/name needs the Python package huggingface-hub: pip install"):
        fetch(NAME)


def test_the_real_library_offline(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it was not fetched before, or not all of it: offline=True forbids"):
        fetch(NAME, offline=True, download_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
