"""The header of a GGUF file: a bounded walk over metadata and tensor descriptions.

Nothing in the file is believed: every count, length and offset is checked against the file's size before anything is
allocated or read, and whatever is wrong is a CheckpointError of one sentence.
Source: the GGUF specification, ggml docs/gguf.md.
"""

import math
import mmap
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.base.numbers import align_up

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16
"""Tensors, and metadata keys, that a header may announce; large models have some thousand."""
_MAX_STRINGS = 1 << 22
"""Strings in all arrays of a header together; large vocabularies with their merges have 0.8 million."""
_MAX_DEPTH = 4
_MAX_KEY_BYTES = 65535
_MAX_NAME_BYTES = 64

_NUMBERS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "B", 10: "<Q", 11: "<q", 12: "<d"}
_ARRAYS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class TensorInfo(NamedTuple):
    """Where a tensor lies: `shape` as torch has it (rows first), `start` and `size` in bytes of the file."""

    shape: tuple[int, ...]
    type: int
    start: int
    size: int


class _Cursor:
    """A place in a header. Invariant: at <= size; nothing is read that does not lie inside the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0
        self.strings = 0

    def fail(self, sentence: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {sentence}")

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(
                f"truncated: {what} needs {count} bytes at byte {self.at}, the file has {self.size - self.at} left"
            )

    def number(self, code: str, what: str) -> int | float:
        count = struct.calcsize(code)
        self.need(count, what)
        value: int | float = struct.unpack_from(code, self.data, self.at)[0]
        self.at += count
        return value

    def whole(self, code: str, what: str) -> int:
        return int(self.number(code, what))

    def entries(self, what: str, least: int) -> int:
        """Return a count of header entries that take at least `least` bytes each."""
        count = self.whole("<Q", what)
        if count > min(MAX_ENTRIES, (self.size - self.at) // least):
            raise self.fail(
                f"{what} is {count}, but a file of {self.size} bytes holds at most "
                f"{min(MAX_ENTRIES, (self.size - self.at) // least)}"
            )
        return count

    def string(self, what: str, longest: int | None = None) -> str:
        count = self.whole("<Q", f"the length of {what}")
        if longest is not None and count > longest:
            raise self.fail(f"{what} is {count} bytes long, at most {longest} are allowed")
        self.need(count, what)
        raw = self.data[self.at : self.at + count]
        self.at += count
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not valid UTF-8 ({error.reason} at its byte {error.start})") from None

    def value(self, kind: int, what: str, depth: int = 0) -> object:
        """Return a metadata value: a number, a bool, a string, or an array of them (numbers as numpy views)."""
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, depth + 1)
        if kind not in _NUMBERS:
            raise self.fail(f"{what} has value type {kind}, allowed are 0 to 12")
        number = self.number(_NUMBERS[kind], what)
        if kind != _BOOL:
            return number
        if number not in (0, 1):
            raise self.fail(f"{what} is the truth value {number}, allowed are 0 and 1")
        return bool(number)

    def array(self, what: str, depth: int) -> object:
        if depth > _MAX_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {_MAX_DEPTH}")
        kind = self.whole("<I", f"the element type of {what}")
        count = self.whole("<Q", f"the length of {what}")
        if kind in _ARRAYS:
            dtype = np.dtype(_ARRAYS[kind])
            self.need(count * dtype.itemsize, what)
            numbers = np.frombuffer(self.data, dtype, count, self.at)
            self.at += count * dtype.itemsize
            if kind == _BOOL and count and numbers.max() > 1:
                raise self.fail(f"{what} holds the truth value {numbers.max()}, allowed are 0 and 1")
            return numbers
        if kind not in (_STRING, _ARRAY):
            raise self.fail(f"{what} has elements of type {kind}, allowed are 0 to 12")
        self.need(count * (8 if kind == _STRING else 12), what)
        self.strings += count
        if self.strings > _MAX_STRINGS:
            raise self.fail(
                f"{what} brings the strings in arrays to {self.strings}, at most {_MAX_STRINGS} are allowed"
            )
        return [self.value(kind, f"element {i} of {what}", depth) for i in range(count)]


@cache
def tensor_types() -> "dict[int, tuple[GGMLQuantizationType, int, int]]":
    """Return (type, elements of a block, bytes of a block) by type number."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise ConfigError("reading a GGUF file needs the Python package gguf: pip install gguf") from None
    return {int(kind): (kind, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def read_header(path: Path) -> tuple[dict[str, object], dict[str, TensorInfo], mmap.mmap]:
    """Return metadata, tensors by their GGUF names, and the mapped file.

    Raises CheckpointError for anything that is not a whole, well-formed little-endian GGUF file of version 2 or 3.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise CheckpointError(f"{path}: the file is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    cursor = _Cursor(path, data)
    cursor.need(4, "the magic")
    if data[:4] != MAGIC:
        raise cursor.fail(f"not a GGUF file: it begins with {data[:4]!r}, not {MAGIC!r}")
    cursor.at = 4
    version = cursor.whole("<I", "the version")
    if version not in _VERSIONS:
        big = " (written for a big-endian machine)" if version & 0xFFFF == 0 else ""
        raise cursor.fail(f"GGUF version {version}{big}, versions 2 and 3 are read")
    tensors = cursor.entries("tensor_count", 33)
    keys = cursor.entries("kv_count", 14)
    metadata = _read_metadata(cursor, keys)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {shown(alignment)}, allowed is a power of two up to 65536")
    return metadata, _read_tensors(cursor, tensors, alignment), data


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for index in range(count):
        key = cursor.string(f"metadata key {index}", _MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.fail(f"metadata key {shown(key)} is there twice")
        kind = cursor.whole("<I", f"the type of {shown(key)}")
        metadata[key] = cursor.value(kind, shown(key))
    return metadata


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for index in range(count):
        name = cursor.string(f"the name of tensor {index}", _MAX_NAME_BYTES)
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} is there twice")
        rank = cursor.whole("<I", f"the rank of {name!r}")
        if not 1 <= rank <= 4:
            raise cursor.fail(f"tensor {name!r} has {rank} dimensions, allowed are 1 to 4")
        shape = tuple(cursor.whole("<Q", f"the shape of {name!r}") for _ in range(rank))
        number = cursor.whole("<I", f"the type of {name!r}")
        offset = cursor.whole("<Q", f"the offset of {name!r}")
        if number not in tensor_types():
            raise cursor.fail(f"tensor {name!r} has the unknown type {number}")
        kind, block, block_bytes = tensor_types()[number]
        if min(shape) < 1:
            raise cursor.fail(f"tensor {name!r} has shape {list(shape)}, every dimension must be 1 or more")
        if shape[0] % block:
            raise cursor.fail(f"tensor {name!r} has rows of {shape[0]}, {kind.name} needs a multiple of {block}")
        if offset % alignment:
            raise cursor.fail(f"tensor {name!r} lies at offset {offset}, which is no multiple of {alignment}")
        size = math.prod(shape) // block * block_bytes
        tensors[name] = TensorInfo(shape[::-1], number, offset, size)
    base = align_up(cursor.at, alignment)
    tensors = {name: info._replace(start=base + info.start) for name, info in tensors.items()}
    end, before = base, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise cursor.fail(f"tensors {before!r} and {name!r} overlap at byte {info.start}")
        end, before = info.start + info.size, name
        if end > cursor.size:
            raise cursor.fail(f"truncated: tensor {name!r} ends at byte {end}, the file has {cursor.size} bytes")
    return tensors


def shown(value: object) -> str:
    """Return a metadata value for a message: arrays by their length, long strings cut."""
    if isinstance(value, np.ndarray | list):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
