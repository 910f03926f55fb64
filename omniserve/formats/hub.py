"""Models of huggingface.co: what is fetched of a repository, and one sentence when it cannot be.

The only place that opens outgoing connections, through huggingface_hub, which keeps what it fetched and reads HF_TOKEN
and HF_HUB_OFFLINE by itself. No pickle is ever fetched.
"""

import glob
import io
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from omniserve.base.config import nearest
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.formats.checkpoint import PICKLES

FETCHED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "model.safetensors.index.json", "*.safetensors",
)  # fmt: skip
SKIPPED = ("*/*", "consolidated*", "adapter_*")
"""Folders, Mistral's second copy of the weights, LoRA adapters."""
LOGIN = "log in with `hf auth login` or set HF_TOKEN"

_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::([^:/\\]{1,200}\.gguf))?")
_FILE = re.compile(r".*\.(gguf|safetensors|bin|pt|pth|ckpt|json|ya?ml)")

Progress = Callable[[int, int], None]
"""Called as progress(bytes fetched, bytes), from several threads."""


class HubName(NamedTuple):
    """A model on huggingface.co: `org/name`, or one file of it, `org/name:file.gguf`."""

    repository: str
    file: str | None = None

    def __str__(self) -> str:
        return self.repository if self.file is None else f"{self.repository}:{self.file}"


def hub_name(model: str | Path) -> HubName | None:
    """Return what `model` means on huggingface.co, or None if it cannot be a name there."""
    match = _NAME.fullmatch(str(model))
    if match is None or (match[2] is None and _FILE.fullmatch(match[1])):
        return None
    return HubName(match[1], match[2])


def fetch(
    name: HubName,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of a model's files, or its one GGUF file, fetched if it is not there yet.

    download_dir  where all downloaded models are kept; None is huggingface_hub's own cache
    offline       only what was fetched before; no connection is opened
    Raises CheckpointError, or ConfigError if huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise ConfigError(
            f"fetching {name} needs the Python package huggingface-hub: pip install huggingface-hub"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings come to one of our sentences below
    try:
        folder = Path(
            snapshot_download(
                name.repository,
                revision=revision,
                cache_dir=download_dir,
                local_files_only=offline,
                allow_patterns=list(FETCHED) if name.file is None else [glob.escape(name.file)],
                ignore_patterns=list(SKIPPED),
                tqdm_class=_bar(progress),
            )
        )
        place = folder if name.file is None else folder / name.file
        if place.is_file() or any(place.glob("*.safetensors")):
            return place
        there = [] if offline else HfApi().list_repo_files(name.repository, revision=revision)
    except Exception as error:  # beside its own errors the library lets those of its HTTP client through
        raise CheckpointError(_sentence(name, error, revision, offline)) from error
    raise CheckpointError(_nothing(name, there))


def _nothing(name: HubName, files: list[str]) -> str:
    """Return the sentence about a repository that has no file we can read."""
    ggufs = sorted(file for file in files if file.endswith(".gguf") and "/" not in file)
    if name.file is not None:
        return f"{name.repository} has no file {name.file}{nearest(name.file, ggufs)}"
    if ggufs:
        names = ", ".join(f"{name}:{file}" for file in ggufs[:4]) + (", ..." if len(ggufs) > 4 else "")
        return f"{name} holds GGUF files: give one of them, {names}"
    if pickles := [file for file in files if any(Path(file).match(pattern) for pattern in PICKLES)]:
        folder = name.repository.split("/")[1]
        line = f"hf download {name} --local-dir {folder} && omniserve convert {folder} -o {folder}-st"
        return (
            f"{name} holds weights as a pickle only ({pickles[0]}), which no serving command opens: run `{line}` once"
        )
    return f"{name} holds no *.safetensors and no *.gguf file"


def _sentence(name: HubName, error: Exception, revision: str | None, offline: bool) -> str:
    """Return what a failed download means for the user."""
    from huggingface_hub import errors

    neither = f"{name} is no file or folder here, and"
    chain = [error, *(cause for cause in (error.__cause__, error.__context__) if cause is not None)]
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        return f"{neither} it was not fetched before: HF_HUB_OFFLINE forbids connections"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if offline:
            return f"{neither} it was not fetched before, or not all of it: offline=True forbids connections"
        return f"{neither} huggingface.co cannot be reached: {_line(chain[-1])}"
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{name.repository}"
        return f"{name} is gated: ask for access at {page}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{neither} huggingface.co has no such model, or it is private: check the name, or {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision or 'main'!r}"
    if isinstance(error, errors.HFValidationError):
        return f"{neither} that is no name of a model on huggingface.co"
    return f"{name} cannot be fetched from huggingface.co: {_line(error)}; try again, what is there already is kept"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _bar(progress: Progress | None) -> type[Any]:
    """Return a tqdm class that tells `progress` how many bytes have come and draws nothing."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # it has no stubs

    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[misc]  # likewise
        def __init__(self, *args: Any, **keywords: Any) -> None:
            keywords.pop("name", None)
            super().__init__(*args, **(keywords | {"file": io.StringIO(), "disable": False}))
            if self.unit == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if progress is not None and bars:  # what comes over the network and what is written have a bar each
                furthest = max(bars, key=lambda bar: bar.n)
                progress(int(furthest.n), int(max(furthest.total or 0, furthest.n)))
            return shown

    return Bar
