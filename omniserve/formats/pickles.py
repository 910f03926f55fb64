"""Pickled checkpoints: the one place that opens a pickle, for `omniserve convert` alone.

`weights_only` lets a file build tensors and plain containers; anything else in it is refused before it runs.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.formats.checkpoint import PICKLES, read_json

NOT_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*")
"""What trainers leave beside the weights."""


def load(path: Path) -> dict[str, object]:
    """Return what a pickle of names holds, its tensors mapped from the file where the format allows it.

    Raises CheckpointError if the file is missing, damaged, holds code, or is no dictionary of names.
    """
    try:
        try:
            found: object = _torch_load(path, mapped=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            found = _torch_load(path, mapped=False)  # written before torch 1.6: not a zip, cannot be mapped
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged or hostile pickle makes torch raise nearly anything
        raise CheckpointError(f"{path}: {_reason(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not a dictionary of named tensors")
    return found


def _torch_load(path: Path, *, mapped: bool) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the pickle's protocol; what matters is raised
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)  # noqa: TID251  # the one place


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if match := re.search(r"(?:GLOBAL|instantiate unsupported class|unsupported function) ([\w.]+)", text):
        return (
            f"holds more than tensors and plain containers ({match[1][:60]}), which a checkpoint has no need of: it is "
            "refused"
        )
    # torch puts half a page of advice around its own reason, and advises to switch the protection off
    short = "" if "weights_only" in text.replace(" ", "_").lower() else f" ({text[:80] or type(error).__name__})"
    return f"damaged or truncated, or no pickle of tensors: it cannot be opened{short}"


class PickleSource:
    """A checkpoint whose weights are pickles: one file of named tensors, or several."""

    def __init__(self, path: Path, config: Mapping[str, object], files: list[Path] | None = None) -> None:
        self.path = path
        self._config = config
        self._tensors: dict[str, Tensor] = {}
        for file in weight_files(path) if files is None else files:
            for name, value in load(file).items():
                if name in self._tensors:
                    raise CheckpointError(f"tensor {name!r} is in two files, {file} is the second")
                self._tensors[name] = _plain(file, name, value)

    @property
    def config(self) -> Mapping[str, object]:
        """The object in config.json."""
        return self._config

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self.tensor(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, backed by the mapped file: do not write to it."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._tensors[name]


def _plain(file: Path, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{file}: {name!r} is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise CheckpointError(f"{file}: tensor {name!r} is not an ordinary tensor")
    return value.detach()


def weight_files(folder: Path) -> list[Path]:
    """Return the pickles of weights in a folder, those of an index if there is one.

    Raises CheckpointError if one that the index names is missing.
    """
    for index in sorted(folder.glob("*.bin.index.json")):
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(file, str) and "/" not in file for file in places.values()
        ):
            raise CheckpointError(f"{index}: weight_map must map tensors to files of this folder")
        files = [folder / file for file in sorted(set(places.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{folder}: {missing[0]} is missing, {index.name} names it")
        return files
    found = {file for pattern in PICKLES for file in folder.glob(pattern)}
    return sorted(file for file in found if not any(file.match(pattern) for pattern in NOT_WEIGHTS))
