"""Checkpoints, read tensor by tensor: a GGUF file, or a Hugging Face folder of safetensors.

No pickle is opened here; every defect of a file is a CheckpointError of one sentence that names file and tensor. torch
is imported for tensors only, so that a tokenizer can be read without it.
"""

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError, safe_open

from omniserve.base.config import nearest
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.formats.gguf import GGUFSource
from omniserve.formats.gguf_header import MAGIC

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOAD_FORMATS = ("auto", "safetensors", "gguf")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
}
"""torch's name of each type of a safetensors file, and its bytes."""
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
_MAX_JSON_BYTES = 64 << 20
_MAX_NAME = 256


class Source(Protocol):
    """A checkpoint read tensor by tensor; names are Hugging Face's (model.layers.0.self_attn.q_proj.weight).

    Its methods raise CheckpointError for a name it does not hold.
    """

    path: Path

    @property
    def config(self) -> Mapping[str, object]:
        """Keys and values of Hugging Face's config.json; GGUF metadata is translated to the same keys."""

    def names(self) -> frozenset[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header alone."""

    def dtype(self, name: str) -> "torch.dtype":
        """Type that `tensor` returns, read from the header alone."""

    def tensor(self, name: str) -> "Tensor":
        """One tensor: as stored in safetensors; of a GGUF file de-quantized fp32, q and k rows un-permuted."""


def open_checkpoint(path: str | Path, load_format: str = "auto") -> Source:
    """Return the checkpoint at a `.gguf` file or a folder with config.json and *.safetensors.

    load_format  auto, safetensors or gguf; the last two refuse the other
    Raises CheckpointError if there is none, ConfigError for an unknown format.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"load_format={load_format!r}: must be one of {', '.join(LOAD_FORMATS)}{nearest(load_format, LOAD_FORMATS)}"
        )
    found = _find(Path(path))
    if load_format != "auto" and (load_format == "gguf") != found.is_file():
        kind = "a GGUF file" if found.is_file() else "a folder of safetensors"
        raise CheckpointError(f"{path} is {kind}, which load_format={load_format} excludes")
    return GGUFSource(found) if found.is_file() else FolderSource(found)


def _find(path: Path) -> Path:
    """Return the GGUF file or the folder of safetensors that `path` means."""
    try:
        if path.is_file():
            return _check_file(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a file or folder")
        if any(path.glob("*.safetensors")) or (path / INDEX).exists():
            return path
        files = sorted(path.glob("*.gguf"))
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise CheckpointError(f"{str(path)!r} cannot be read ({error})") from None
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path} holds {len(files)} GGUF files: give one of them ({names})")
    if pickles:
        raise CheckpointError(_pickle_sentence(path, pickles[0]))
    raise CheckpointError(f"{path} holds no *.safetensors and no *.gguf file")


def _check_file(path: Path) -> Path:
    with path.open("rb") as file:
        begins = file.read(len(MAGIC))
    if begins == MAGIC or path.suffix == ".gguf":
        return path
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a checkpoint: give the folder that holds it and its config.json")
    if any(path.match(pattern) for pattern in PICKLES):
        raise CheckpointError(_pickle_sentence(path.parent, path.name))
    raise CheckpointError(f"{path} is not a GGUF file: it begins with {begins!r}, not {MAGIC!r}")


def _pickle_sentence(folder: Path, name: str) -> str:
    target = folder.with_name(f"{folder.name}-st") if folder.name else Path("converted-st")
    line = f"omniserve convert {shlex.quote(str(folder))} -o {shlex.quote(str(target))}"
    return f"{folder} holds weights as a pickle only ({name}), which no serving command opens: run `{line}` once"


def read_json(path: Path) -> dict[str, object]:
    """Return the object of a JSON file. Raises CheckpointError if it is missing, too large or no JSON object."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes of JSON, at most {_MAX_JSON_BYTES} are read")
        return _parse(path, path.read_bytes(), "the file")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(path: Path, raw: bytes, what: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"{path}: {name[:60]!r} is there twice in {what}")
            found[name] = value
        return found

    try:
        parsed: object = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON ({_line(error)})") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object")
    return parsed


def _line(error: BaseException) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())


class FolderSource:
    """A Hugging Face folder: config.json and safetensors, one file or shards with an index.

    Headers are checked when the folder is opened; tensors are mapped from the files when they are asked for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._config = read_json(self.path / "config.json")
        self._files: dict[str, Path] = {}
        self._entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        index = self.path / INDEX
        places = _read_index(index) if index.exists() else None
        for file in _shards(self.path) if places is None else sorted({self.path / name for name in places.values()}):
            self._add(file, places)
        if places is not None and (absent := sorted(places.keys() - self._files.keys())):
            raise CheckpointError(f"{self.path / places[absent[0]]}: {listed(absent)} named in {INDEX} but not there")
        self._open: dict[Path, safe_open] = {}

    def _add(self, file: Path, places: Mapping[str, str] | None) -> None:
        for name, entry in _read_header(file).items():
            if name in self._files:
                raise CheckpointError(f"tensor {name!r} is in both {self._files[name]} and {file}")
            if places is not None and places.get(name) != file.name:
                place = f"in {places[name]}" if name in places else "nowhere"
                raise CheckpointError(f"{file}: holds tensor {name!r}, which {INDEX} puts {place}")
            self._files[name], self._entries[name] = file, entry

    @property
    def config(self) -> Mapping[str, object]:
        """The object in config.json."""
        return self._config

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(name)[1]

    def dtype(self, name: str) -> "torch.dtype":
        """Type of a tensor as stored."""
        import torch

        dtype: torch.dtype = getattr(torch, _DTYPES[self._entry(name)[0]][0])
        return dtype

    def tensor(self, name: str) -> "Tensor":
        """Return one tensor as stored, backed by the mapped file: do not write to it."""
        self._entry(name)
        file = self._files[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(file), framework="pt")
            tensor: Tensor = self._open[file].get_tensor(name)  # type: ignore[no-untyped-call]  # the library is untyped
            return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({_line(error)})") from None

    def _entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._entries[name]


def listed(names: Iterable[str], *, most: int = 3) -> str:
    """Return `tensor 'a' is` or `12 tensors ('a', 'b', 'c', ...) are` for a message."""
    found = sorted(names)
    if len(found) == 1:
        return f"tensor {found[0]!r} is"
    dots = ", ..." if len(found) > most else ""
    return f"{len(found)} tensors ({', '.join(map(repr, found[:most]))}{dots}) are"


def _read_index(index: Path) -> dict[str, str]:
    """Return tensor -> file name; every file lies in the folder of the index and exists."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: weight_map is missing or empty, it must map tensors to files")
    for name, file in places.items():
        if len(name) > _MAX_NAME:
            raise CheckpointError(f"{index}: a tensor's name has {len(name)} characters, at most {_MAX_NAME} are read")
        if not isinstance(file, str) or not re.fullmatch(r"[^/\0]{1,200}\.safetensors", file):
            raise CheckpointError(
                f"{index}: tensor {name!r} lies in {repr(file)[:60]}, which is no *.safetensors file name"
            )
    missing = sorted(file for file in set(places.values()) if not (index.parent / file).is_file())
    if missing:
        raise CheckpointError(f"{index.parent / missing[0]} is missing, {INDEX} names it ({len(missing)} such files)")
    return places


def _shards(folder: Path) -> list[Path]:
    """Return the files of a folder without an index: model.safetensors alone, else all of them."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)\.safetensors", file.name):
            wanted = int(match[3])
            there = sum(
                other.name.startswith(match[1]) and other.name.endswith(f"-of-{match[3]}.safetensors")
                for other in files
            )
            if there != wanted:
                raise CheckpointError(f"{folder}: {there} of {wanted} shards are there ({match[1]}*)")
    return files


def _read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of every tensor of a safetensors file whose header is sound.

    The library checks the same when it opens the file; this check comes first because it names tensor and numbers.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8:
                raise CheckpointError(f"{file}: truncated, {size} bytes are no safetensors header")
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file}: truncated or no safetensors file, its header has {length} bytes, "
                    f"at most {min(_MAX_HEADER_BYTES, size - 8)} fit"
                )
            header = _parse(file, opened.read(length), "its header")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    header.pop("__metadata__", None)
    places: list[tuple[int, int, str]] = []
    entries = {}
    for name, entry in header.items():
        if len(name) > _MAX_NAME:
            raise CheckpointError(f"{file}: a tensor's name has {len(name)} characters, at most {_MAX_NAME} are read")
        dtype, shape, begin, end = _check_entry(file, name, entry)
        entries[name] = dtype, shape
        places.append((begin, end, name))
    _check_places(file, places, size - 8 - length)
    return entries


def _check_entry(file: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    def whole(numbers: object) -> bool:
        return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{file}: tensor {name!r} has no dtype, shape and data_offsets")
    word, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(word, str) or word not in _DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {str(word)[:60]}, allowed are {', '.join(_DTYPES)}")
    if not whole(shape) or not whole(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise CheckpointError(f"{file}: tensor {name!r} has an invalid shape or data_offsets")
    wanted, (begin, end) = math.prod(shape) * _DTYPES[word][1], offsets
    if end - begin != wanted:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {shape} and type {word} needs {wanted} bytes, its data_offsets "
            f"are {begin} to {end}"
        )
    return word, tuple(shape), begin, end


def _check_places(file: Path, places: list[tuple[int, int, str]], size: int) -> None:
    """Raise unless the tensors cover the `size` bytes behind the header without overlap or gap."""
    at, before = 0, ""
    for begin, end, name in sorted(places):
        if begin < at:
            raise CheckpointError(f"{file}: tensors {before!r} and {name!r} overlap at byte {begin} of the data")
        if begin > at:
            raise CheckpointError(f"{file}: {begin - at} bytes before tensor {name!r} belong to no tensor")
        at, before = end, name
        if at > size:
            raise CheckpointError(f"{file}: truncated, tensor {name!r} ends at byte {at} of {size} bytes of data")
    if at != size:
        raise CheckpointError(f"{file}: {size - at} bytes behind the last tensor belong to no tensor")


def kv_scales(source: Source, layers: int) -> "list[Tensor] | None":
    """Return the static KV8 scales of each layer, fp32 [2, H] (K after RoPE, V), or None if the checkpoint has none.

    They are our `self_attn.kv_scale` [2, H], or QServe's `self_attn.kv_scale_quant_orig` [2], one for all heads.
    Raises CheckpointError if only some layers have them, or if a scale is not a positive number.
    """
    for suffix, shared in (("kv_scale", False), ("kv_scale_quant_orig", True)):
        names = [f"model.layers.{layer}.self_attn.{suffix}" for layer in range(layers)]
        absent = [name for name in names if name not in source.names()]
        if len(absent) == layers:
            continue
        if absent:
            raise CheckpointError(f"{source.path}: {listed(absent)} missing, other layers have static KV scales")
        return [_kv_scale(source, name, shared) for name in names]
    return None


def _kv_scale(source: Source, name: str, shared: bool) -> "Tensor":
    import torch

    heads = source.config.get("num_key_value_heads") or source.config.get("num_attention_heads")
    if type(heads) is not int or heads < 1:
        raise CheckpointError(f"{source.path}: num_key_value_heads={heads!r}: must be a positive whole number")
    wanted = (2,) if shared else (2, heads)
    if source.shape(name) != wanted or not source.dtype(name).is_floating_point:
        raise CheckpointError(
            f"{source.path}: tensor {name!r} is {source.dtype(name)} {list(source.shape(name))}, it must be "
            f"floating {list(wanted)}"
        )
    scale = source.tensor(name).float()
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise CheckpointError(f"{source.path}: tensor {name!r} holds scales that are not positive numbers")
    return scale[:, None].repeat(1, heads) if shared else scale
