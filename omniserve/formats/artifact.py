"""Our own checkpoint: how it describes itself, what may stand in it, and how a folder of it is written.

Codes are stored in the logical layout (formats.md section 12); every other layout is translated to this one by an
importer, which makes a `Translated` source of it. So the loader knows one quantized layout only.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from omniserve.base import log
from omniserve.base.config import KVName, Precision, WeightName, nearest
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.base.numbers import align_up
from omniserve.base.spec import ModelSpec
from omniserve.formats.checkpoint import INDEX, Source
from omniserve.formats.table import FORMATS
from omniserve.formats.w4a8 import expand, unpack_columns
from omniserve.formats.weight import WeightFormat

_LOG = log.get(__name__)

METHOD = "omniserve"
"""`quant_method` of our own checkpoints."""
VERSION = 1

LARGEST_GROUP_SCALE = 17
"""Beyond it 15 * group_scale leaves 255, and no offset brings all codes into int8."""

STATIC = ("head", "tensor")
"""What a static KV scale is shared by; one for a tensor is stored once for each head."""

SHARD_BYTES = 4 << 30
"""Bytes of tensors in one file of a written checkpoint."""

SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "chat_template*", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What a converted checkpoint takes along: tokenizer, chat template, licence."""

Progress = Callable[[int, int], None]
"""Called as progress(tensors done, tensors)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVScheme:
    """How a checkpoint means its keys and values to be stored.

    bits      of keys and of values
    static    8 bits only: the checkpoint holds one scale per key head; else ranges are found per token and head
    key_mean  the checkpoint holds the mean of each head's rotated keys, which is subtracted before they are stored
    """

    bits: Literal[4, 8, 16] = 8
    static: bool = False
    key_mean: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What `quantization_config` says: the formats of all linears, and the KV cache.

    weights    name of the format of all linears but those in `overrides` (module -> name) and `keep` (16 bit)
    made_by    how it was made, for people; "calibration" is empty or absent if the weights were merely rounded
    """

    weights: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    kv: KVScheme = KVScheme()
    made_by: Mapping[str, object] = field(default_factory=dict)

    def form(self, module: str) -> WeightFormat:
        """Return the format of a linear."""
        return FORMATS["w16a16" if module in self.keep else self.overrides.get(module, self.weights)]

    @property
    def precision(self) -> Precision:
        """The precision this checkpoint means to be served in."""
        group: Literal[-1, 128] = -1 if self.weights == "w4a8-row" else 128
        weight = cast(WeightName, self.weights.split("-")[0])
        return Precision(weight=weight, kv=cast(KVName, f"kv{self.kv.bits}"), group=group)

    @property
    def calibrated(self) -> bool:
        """True if the weights were fitted to calibration data."""
        return bool(self.made_by.get("calibration"))

    def block(self) -> dict[str, object]:
        """Return the `quantization_config` of config.json. Source: qoq.md section 4."""
        quantized = self.weights != "w16a16"
        plain = self.kv.bits == 16
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "weights": {
                "format": self.weights,
                "group": {"w4a8-g128": 128, "w4a8-row": -1}.get(self.weights),
                "overrides": dict(self.overrides),
                "keep": list(self.keep),
            },
            "activations": {"bits": 8, "per": "token"} if quantized else {"bits": 16, "per": None},
            "kv": {
                "key_bits": self.kv.bits,
                "value_bits": self.kv.bits,
                "per": None if plain else "head" if self.kv.static else "token-head",
                "zero": None if plain else "none" if self.kv.static else "real",
                "key_mean": self.kv.key_mean,
                "key_rotation": None,
            },
            "made_by": dict(self.made_by),
        }


def scheme_of(source: Source) -> Scheme | None:
    """Return what a checkpoint in our layout says about itself; None if it is not quantized.

    Raises CheckpointError for another method, another version, an unknown key or a value that is not allowed.
    """
    block = source.config.get("quantization_config")
    if block is None:
        return None
    method = block.get("quant_method") if isinstance(block, Mapping) else block
    if not isinstance(block, Mapping) or method != METHOD:
        raise CheckpointError(f"{source.path}: quantized by {method!r}, this version reads {', '.join(METHODS)}")
    version = block.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{source.path}: quantization_config: version={version!r}: this omniserve reads version {VERSION}"
        )
    keys = _Keys(source.path, "quantization_config", block)
    keys.known("quant_method", "version", "weights", "activations", "kv", "made_by")
    made_by = keys.mapping("made_by", default={})
    scheme = _weights(keys.inner("weights"), _kv(keys.inner("kv")), made_by)
    activations = keys.inner("activations")
    activations.known("bits", "per")
    wanted = cast(Mapping[str, object], scheme.block()["activations"])
    activations.one_of("bits", wanted["bits"])
    activations.one_of("per", wanted["per"])
    return scheme


METHODS = (METHOD, "qoq", "awq", "gptq", "compressed-tensors")
"""The methods that are read; all but the first by an importer."""


def _weights(keys: "_Keys", kv: KVScheme, made_by: Mapping[str, object]) -> Scheme:
    keys.known("format", "group", "overrides", "keep")
    names = tuple(FORMATS)
    name = cast(str, keys.one_of("format", *names))
    keys.one_of("group", *({"w4a8-g128": (128,), "w4a8-row": (-1,)}.get(name, (None, -1))))
    overrides = keys.mapping("overrides", default={})
    for module, word in overrides.items():
        if word not in names:
            raise keys.refuse(f"overrides[{module!r}]", word, ", ".join(names))
    keep = keys.values.get("keep", [])
    if not isinstance(keep, list) or not all(isinstance(module, str) for module in keep):
        raise keys.refuse("keep", keep, "a list of names")
    if both := sorted(set(keep) & overrides.keys()):
        raise keys.refuse("keep", both[0], "another module than those in overrides")
    return Scheme(weights=name, overrides=cast(Mapping[str, str], overrides), keep=tuple(keep), kv=kv, made_by=made_by)


def _kv(keys: "_Keys") -> KVScheme:
    keys.known("key_bits", "value_bits", "per", "zero", "key_mean", "key_rotation")
    bits = cast(Literal[4, 8, 16], keys.one_of("key_bits", 4, 8, 16))
    if keys.values.get("value_bits") != bits:
        raise keys.refuse("value_bits", keys.values.get("value_bits"), f"key_bits={bits}, one number for both so far")
    static = bits == 8 and keys.values.get("per") in STATIC
    if bits == 16:
        keys.one_of("per", None, "token-head")
        keys.one_of("zero", None, "real")
    elif not static:
        keys.one_of("per", "token-head", *(STATIC if bits == 8 else ()))
        keys.one_of("zero", "real")
    else:
        keys.one_of("zero", "none")
    key_mean = keys.values.get("key_mean", False)
    if not isinstance(key_mean, bool):
        raise keys.refuse("key_mean", key_mean, "true or false")
    keys.one_of("key_rotation", None)
    return KVScheme(bits=bits, static=static, key_mean=key_mean)


class _Keys:
    """One object of a description: known keys alone, values of a list; whatever else is a CheckpointError."""

    def __init__(self, path: Path, place: str, values: Mapping[str, object]) -> None:
        self.path = path
        self.place = place
        self.values = values

    def refuse(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.place}: {key}={repr(value)[:60]}: must be {allowed}")

    def known(self, *names: str) -> None:
        for key in self.values:
            if key not in names:
                raise CheckpointError(f"{self.path}: {self.place}: unknown key {key!r}{nearest(key, names)}")

    def mapping(self, key: str, default: Mapping[str, object] | None = None) -> Mapping[str, object]:
        value = self.values.get(key, default)
        if not isinstance(value, Mapping):
            raise self.refuse(key, value, "an object")
        return value

    def inner(self, key: str) -> "_Keys":
        return _Keys(self.path, f"{self.place}.{key}", self.mapping(key))

    def one_of(self, key: str, *allowed: object) -> object:
        value = self.values.get(key)
        if not any(value == word and type(value) is type(word) for word in allowed):
            words = ", ".join("null" if word is None else str(word) for word in allowed)
            raise self.refuse(key, value, words if len(allowed) == 1 else f"one of {words}")
        return value


def read_linear(source: Source, scheme: Scheme, module: str) -> dict[str, Tensor]:
    """Return the stored tensors of a linear by field, with their values checked. Raises CheckpointError."""
    form = scheme.form(module)
    tensors = {name: source.tensor(f"{module}.{name}") for name in form.fields(2, 2)}
    check_values(form, tensors, path=source.path, module=module)
    return tensors


def check_values(form: WeightFormat, tensors: Mapping[str, Tensor], *, path: Path, module: str) -> None:
    """Raise CheckpointError naming a tensor whose values no writer of this format makes.

    Scales are positive, all parameters finite, 1 <= group_scale <= 17, group_zero <= 128, and 15 * group_scale -
    group_zero <= 127, so that all codes decode into int8. Where a file of foreign origin leaves that range, every code
    that is in use must decode into int8.
    """

    def refuse(name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {f'{module}.{name}'!r} {what}")

    for name in ("weight", "scale", "zero"):
        if name in tensors and not bool(torch.isfinite(tensors[name]).all()):
            raise refuse(name, "holds NaN or infinity")
    if "scale" in tensors and not bool((tensors["scale"] > 0).all()):
        raise refuse("scale", "holds a scale that is not positive")
    if "group_scale" not in tensors:
        return
    scale, zero = tensors["group_scale"].to(torch.int16), tensors["group_zero"].to(torch.int16)
    if scale.numel() and not 1 <= int(scale.amin()) <= int(scale.amax()) <= LARGEST_GROUP_SCALE:
        raise refuse(
            "group_scale", f"holds values from {int(scale.amin())} to {int(scale.amax())}, allowed are 1 to 17"
        )
    if bool(((15 * scale - zero > 127) | (zero > 128)).any()):
        try:
            expand(unpack_columns(tensors["codes"]), tensors["group_scale"], tensors["group_zero"])
        except CheckpointError:
            raise refuse("group_zero", "with its codes and group_scale leaves the range of int8") from None


def key_means(source: Source, spec: ModelSpec) -> list[Tensor] | None:
    """Return the means of the rotated keys of each layer, [H, D], or None if the checkpoint has none.

    Raises CheckpointError if one is not finite.
    """
    scheme = scheme_of(source)
    if scheme is None or not scheme.kv.key_mean:
        return None
    means = []
    for layer in range(spec.layers):
        name = f"model.layers.{layer}.self_attn.key_mean"
        mean = source.tensor(name)
        if not bool(torch.isfinite(mean).all()):
            raise CheckpointError(f"{source.path}: tensor {name!r} holds NaN or infinity")
        means.append(mean)
    return means


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor that an importer makes when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear of a foreign checkpoint, as it will be in our layout.

    form, shape  its format and [N, K]
    make         returns the stored tensors, and the relative squared error of the weights (0: exact)
    dtypes       of fields that have another type than the format's first choice
    rounded      the grids cannot meet: the weights are rounded again
    """

    form: WeightFormat
    shape: tuple[int, int]
    make: Callable[[], tuple[dict[str, Tensor], float]]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    rounded: bool = False


class Translated:
    """A foreign checkpoint, seen as one of ours; tensors are made when they are asked for.

    origin  what it was, for people
    notes   sentences a user should read
    losses  module -> relative squared error of its weights, of the linears made so far that are not exact
    The fields of a linear are asked for one after the other, so the last one made is held.
    """

    def __init__(
        self,
        source: Source,
        *,
        origin: str,
        scheme: Scheme,
        linears: Mapping[str, Linear],
        parts: Mapping[str, Part],
        notes: Sequence[str] = (),
    ) -> None:
        self.path = source.path
        self.origin = origin
        self.scheme = scheme
        self.notes = tuple(notes)
        self.losses: dict[str, float] = {}
        self._linears = linears
        self._fields = {
            f"{module}.{name}": (part.shape, linear.dtypes.get(name, part.dtype))
            for module, linear in linears.items()
            for name, part in linear.form.fields(*linear.shape).items()
        }
        self._parts = parts
        self._config = {**source.config, "quantization_config": scheme.block()}
        if "lm_head.weight" in parts:
            self._config["tie_word_embeddings"] = False
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def config(self) -> Mapping[str, object]:
        """The foreign config.json with our description."""
        return self._config

    @property
    def rounded(self) -> tuple[str, ...]:
        """Linears that are rounded again."""
        return tuple(module for module, linear in self._linears.items() if linear.rounded)

    def names(self) -> frozenset[str]:
        """Names of all tensors, in our layout."""
        return frozenset(self._fields.keys() | self._parts.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._fields[name][0] if name in self._fields else self._part(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._fields[name][1] if name in self._fields else self._part(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Return one tensor; do not write to it."""
        if name not in self._fields:
            return self._part(name).make()
        module, _, wanted = name.rpartition(".")
        if self._held[0] != module:
            tensors, loss = self._linears[module].make()
            check_values(self._linears[module].form, tensors, path=self.path, module=module)
            if loss > 0:
                self.losses[module] = loss
                _LOG.info("imported %s", log.fields(linear=module, relative_squared_error=f"{loss:.3g}"))
            self._held = module, tensors
        return self._held[1][wanted].to(self._fields[name][1])

    def described(self) -> Scheme:
        """Return the scheme with what is known once all tensors were made: the loss of each linear."""
        made_by: dict[str, object] = {**self.scheme.made_by, "imported": self.origin}
        if self.notes:
            made_by["notes"] = list(self.notes)
        if self.losses:
            made_by["relative_squared_error"] = {module: float(f"{x:.3g}") for module, x in self.losses.items()}
        if self.rounded:
            made_by["rounded_again"] = list(self.rounded)
        return Scheme(
            weights=self.scheme.weights,
            overrides=self.scheme.overrides,
            keep=self.scheme.keep,
            kv=self.scheme.kv,
            made_by=made_by,
        )

    def _part(self, name: str) -> Part:
        if name not in self._parts:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._parts[name]


def scheme_from(
    linears: Mapping[str, Linear], *, keep: Sequence[str], kv: KVScheme, made_by: Mapping[str, object]
) -> Scheme:
    """Return the scheme of linears: the commonest format is the main one, the others are overrides."""
    names = [linear.form.name for linear in linears.values()]
    main = max(dict.fromkeys(names), key=names.count, default="w16a16")
    overrides = {module: linear.form.name for module, linear in linears.items() if linear.form.name != main}
    return Scheme(weights=main, overrides=overrides, keep=tuple(keep), kv=kv, made_by=made_by)


def kept(parts: Mapping[str, Part]) -> list[str]:
    """Return the modules of the layers whose weights are matrices in 16 bit."""
    return sorted(
        name.removesuffix(".weight")
        for name, part in parts.items()
        if name.startswith("model.layers.") and name.endswith(".weight") and len(part.shape) == 2
    )


def passed(source: Source, name: str) -> Part:
    """Return a tensor of the source as it is."""
    return Part(shape=source.shape(name), dtype=source.dtype(name), make=lambda: source.tensor(name))


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


def described_config(source: Source) -> Mapping[str, object]:
    """Return the config.json of a source: for a translated one with the losses known by now."""
    if isinstance(source, Translated):
        return {**source.config, "quantization_config": source.described().block()}
    return source.config
