"""Any source of tensors written as a checkpoint folder: shards, index, config, tokenizer files."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.base.numbers import align_up
from omniserve.formats.checkpoint import INDEX, Source

SHARD_BYTES = 4 << 30
"""Bytes of tensors in one file of a written checkpoint."""

SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "chat_template*", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What a converted checkpoint takes along: tokenizer, chat template, licence."""

Progress = Callable[[int, int], None]
"""Called as progress(tensors done, tensors)."""

_WORDS = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


def write_folder(
    source: Source,
    folder: Path,
    *,
    config: Callable[[], Mapping[str, object]],
    extra: Sequence[Path] = (),
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write all tensors of a source, its tokenizer and config() as a checkpoint folder.

    config  is asked when all tensors are written
    extra   folders whose side files are taken where the source's own folder lacks them
    Tensor by tensor: no more than the linear in hand is held in memory. The folder appears under its name only when it
    is complete. Raises ConfigError if something is there already, CheckpointError if the disk fails or a tensor holds
    NaN or infinity.
    """
    refuse_existing(folder)
    partial = Path()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        try:
            _write_shards(source, partial, progress, shard_bytes)
            _copy_side_files([source.path, *extra], partial)
            (partial / "config.json").write_text(json.dumps(config(), indent=2, ensure_ascii=False) + "\n")
            partial.chmod(0o755)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from None


def refuse_existing(folder: Path) -> None:
    """Raise ConfigError unless `folder` is free: it does not exist, or is an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already: give a folder that does not, nothing is overwritten")


def _in_order(name: str) -> list[str | int]:
    """Sort key: layer 2 comes before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _write_shards(source: Source, folder: Path, progress: Progress | None, shard_bytes: int) -> None:
    names = sorted(source.names(), key=_in_order)
    sizes = {name: source.dtype(name).itemsize * math.prod(source.shape(name)) for name in names}
    shards: list[list[str]] = []
    room = 0
    for name in names:
        if not shards or sizes[name] > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= sizes[name]
    single = len(shards) == 1
    places: dict[str, str] = {}
    done = 0
    for number, mine in enumerate(shards):
        file = "model.safetensors" if single else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(mine, file)
        for _ in _write_shard(source, folder / file, mine, sizes):
            done += 1
            if progress is not None:
                progress(done, len(names))
    if not single:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(source: Source, file: Path, names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[str]:
    """Write a safetensors file, yielding each name once its tensor is written.

    Wide types come first, so that every tensor lies at a multiple of its item size; the tensors are written in the
    order of `names`, each at its place.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = {}
    end = 0
    for name in sorted(names, key=lambda name: (-source.dtype(name).itemsize, _in_order(name))):
        starts[name], end = end, end + sizes[name]
        header[name] = {
            "dtype": _word(source, name),
            "shape": list(source.shape(name)),
            "data_offsets": [starts[name], end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (align_up(len(raw), 8) - len(raw))
    with file.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        out.truncate(8 + len(raw) + end)
        for name in names:
            tensor = source.tensor(name)
            assert tuple(tensor.shape) == source.shape(name) and tensor.dtype == source.dtype(name), name
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{source.path}: tensor {name!r} holds NaN or infinity")
            out.seek(8 + len(raw) + starts[name])
            out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield name
        out.flush()
        os.fsync(out.fileno())


def _word(source: Source, name: str) -> str:
    dtype = source.dtype(name)
    if dtype not in _WORDS:
        raise CheckpointError(f"{source.path}: tensor {name!r} is {dtype}, allowed are {', '.join(_WORDS.values())}")
    return _WORDS[dtype]


def _copy_side_files(folders: Sequence[Path], target: Path) -> None:
    for folder in folders:
        if not folder.is_dir():
            continue
        for pattern in SIDE_FILES:
            for file in sorted(folder.glob(pattern)):
                if file.is_file() and not (target / file.name).exists():
                    shutil.copyfile(file, target / file.name)
