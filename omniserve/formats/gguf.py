"""GGUF files: a bounded walk over the header, tensors de-quantized one at a time.

Nothing in the file is believed: every count, length and offset is checked against the file's size before anything is
allocated or read, and whatever is wrong is a CheckpointError of one sentence.
Source: the GGUF specification, ggml docs/gguf.md.
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omniserve.base import log
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.base.numbers import align_up

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_LOG = log.get(__name__)

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 1 << 16
"""Tensors, and metadata keys, that a header may announce; large models have some thousand."""
_MAX_STRINGS = 1 << 22
"""Strings in all arrays of a header together; large vocabularies with their merges have 0.8 million."""
_MAX_DEPTH = 4
_MAX_KEY_BYTES = 65535
_MAX_NAME_BYTES = 64
_CHUNK_BYTES = 4 << 20

_NUMBERS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "B", 10: "<Q", 11: "<q", 12: "<d"}
_ARRAYS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_F32 = 0


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
        if count > min(_MAX_ENTRIES, (self.size - self.at) // least):
            raise self.fail(
                f"{what} is {count}, but a file of {self.size} bytes holds at most "
                f"{min(_MAX_ENTRIES, (self.size - self.at) // least)}"
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
def _sizes() -> "dict[int, tuple[GGMLQuantizationType, int, int]]":
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
        if number not in _sizes():
            raise cursor.fail(f"tensor {name!r} has the unknown type {number}")
        kind, block, block_bytes = _sizes()[number]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """One `general.architecture`: what Hugging Face calls it, and whether q and k rows are stored permuted."""

    model_type: str
    model_class: str
    permuted: bool = False


ARCHITECTURES = {
    "llama": _Architecture(model_type="llama", model_class="LlamaForCausalLM", permuted=True),
    "qwen2": _Architecture(model_type="qwen2", model_class="Qwen2ForCausalLM"),
}

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"

_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
}
"""Keys that change what is computed in a way the decoder does not know; only these values leave it unchanged."""


class GGUFSource:
    """A GGUF file as a checkpoint: Hugging Face names and config keys, de-quantized fp32 tensors.

    The file stays mapped; `tensor` copies what it returns, and nothing else is held. Rows of q and k of architecture
    `llama`, which its files store in the order of neighbouring rotated dims, come back in Hugging Face's order.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._metadata, tensors, self._data = read_header(self.path)
        name = self._metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise self._fail(
                f"general.architecture is {shown(name)}, this version reads {' and '.join(sorted(ARCHITECTURES))}"
            )
        self._prefix = name
        self._architecture = ARCHITECTURES[name]
        freqs = tensors.pop(_ROPE_FREQS, None)
        self._tensors: dict[str, TensorInfo] = {}
        for gguf_name, info in tensors.items():
            mapped = _mapped(gguf_name)
            if mapped in self._tensors:
                raise self._fail(f"tensor {mapped!r} is there twice, once as {gguf_name!r}")
            self._tensors[mapped] = info
        self._check_types()
        self._config = self._translate(freqs)

    @property
    def metadata(self) -> Mapping[str, object]:
        """All parsed key values: numbers, bools, strings, lists of strings, numpy arrays of numbers."""
        return self._metadata

    @property
    def config(self) -> Mapping[str, object]:
        """The metadata under the keys of Hugging Face's config.json."""
        return self._config

    def names(self) -> frozenset[str]:
        """Hugging Face names of all tensors; one without such a name keeps its own."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, rows first."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """float32: tensors are de-quantized when they are read."""
        self._info(name)
        return torch.float32

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, de-quantized to fp32 and owned by the caller.

        Raises CheckpointError if there is no such tensor.
        """
        info = self._info(name)
        out = torch.empty(info.shape, dtype=torch.float32)
        self._dequantize(info, out.view(-1, info.shape[-1]).numpy())
        if self._architecture.permuted and (match := re.search(r"self_attn\.([qk])_proj\.", name)):
            heads = self._count("attention.head_count")
            if match[1] == "k":
                heads = self._count("attention.head_count_kv", heads)
            if info.shape[0] % (2 * heads):
                raise self._fail(
                    f"tensor {name!r} has {info.shape[0]} rows, which {heads} heads of even size cannot fill"
                )
            out = out.view(heads, -1, 2, *info.shape[1:]).transpose(1, 2).reshape(info.shape)
        return out

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise self._fail(f"tensor {name!r} is missing")
        return self._tensors[name]

    def _fail(self, sentence: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {sentence}")

    def _dequantize(self, info: TensorInfo, out: np.ndarray) -> None:
        from gguf.quants import dequantize

        kind = _sizes()[info.type][0]
        raw = np.frombuffer(self._data, np.uint8, info.size, info.start).reshape(len(out), -1)
        step = max(1, _CHUNK_BYTES // raw.shape[1])
        with np.errstate(all="ignore"):
            for row in range(0, len(out), step):
                out[row : row + step] = dequantize(raw[row : row + step], kind)

    def _check_types(self) -> None:
        from gguf.quants import dequantize

        for name, info in {info.type: (name, info) for name, info in self._tensors.items()}.values():
            kind, _, block_bytes = _sizes()[info.type]
            try:
                dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            except NotImplementedError:
                raise self._fail(f"tensor {name!r} has type {kind.name}, which cannot be de-quantized") from None

    def _value(self, key: str, default: object = None) -> object:
        return self._metadata.get(f"{self._prefix}.{key}", default)

    def _required(self, key: str) -> object:
        if f"{self._prefix}.{key}" not in self._metadata:
            raise self._fail(f"metadata key {self._prefix}.{key} is missing")
        return self._value(key)

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._required(key) if default is None else self._value(key, default)
        if type(value) is not int or value < 1:
            raise self._fail(f"{self._prefix}.{key} is {shown(value)}, it must be a positive whole number")
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        value = self._required(key) if default is None else self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._fail(f"{self._prefix}.{key} is {shown(value)}, it must be a finite number")
        return float(value)

    def _translate(self, freqs: TensorInfo | None) -> dict[str, object]:
        self._refuse_unknown()
        heads, hidden = self._count("attention.head_count"), self._count("embedding_length")
        head_dim = self._count("attention.key_length", max(hidden // heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._count(key, head_dim) != head_dim:
                raise self._fail(
                    f"{self._prefix}.{key} is {shown(self._value(key))}, it must be the head size {head_dim}"
                )
        embedding = self._tensors.get("model.embed_tokens.weight")
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        rows = embedding.shape[0] if embedding else len(tokens) if isinstance(tokens, list) else None
        names = self.names()
        config: dict[str, object] = {
            "model_type": self._architecture.model_type,
            "architectures": [self._architecture.model_class],
            "hidden_size": hidden,
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._count("feed_forward_length"),
            "vocab_size": self._count("vocab_size", rows),
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._real("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._real("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(freqs, head_dim),
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in names,
            "attention_bias": any(re.search(r"\.self_attn\.q_proj\.bias$", name) for name in names),
            "mlp_bias": any(re.search(r"\.mlp\.gate_proj\.bias$", name) for name in names),
            "torch_dtype": self._stored_dtype(),
        }
        window, context = self._value("attention.sliding_window", 0), self._count("context_length")
        if type(window) is not int or 0 < window < context:
            raise self._fail(
                f"{self._prefix}.attention.sliding_window is {shown(window)}, this version reads models whose window "
                f"is 0 or at least the context of {context}"
            )
        for name in ("bos", "eos"):
            if (token := self._metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
                config[f"{name}_token_id"] = token
        return config

    def _refuse_unknown(self) -> None:
        for key, value in self._metadata.items():
            name = key.removeprefix(f"{self._prefix}.")
            if name == key or name in _READ:
                continue
            if name not in _NEUTRAL:
                _LOG.warning("gguf key without effect %s", log.fields(key=key[:80], value=shown(value)))
            elif isinstance(value, np.ndarray) or value not in _NEUTRAL[name]:
                raise self._fail(
                    f"{key} is {shown(value)}, which the {self._prefix} decoder of this version does not compute"
                )

    def _stored_dtype(self) -> str:
        kinds = {_sizes()[info.type][0].name for info in self._tensors.values()}
        return "bfloat16" if "BF16" in kinds else "float32" if kinds == {"F32"} else "float16"

    def _rope_scaling(self, freqs: TensorInfo | None, head_dim: int) -> dict[str, object] | None:
        kind = self._value("rope.scaling.type", "none")
        if freqs is not None:
            if kind != "none":
                raise self._fail(
                    f"both {_ROPE_FREQS} and rope.scaling.type={shown(kind)} are there, only one can be meant"
                )
            return self._llama3(freqs, head_dim)
        if kind == "none":
            factor = self._real("rope.scale_linear", 1.0)
            return None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._real("rope.scaling.factor")}
        if kind != "yarn":
            raise self._fail(f"{self._prefix}.rope.scaling.type is {shown(kind)}, allowed are none, linear and yarn")
        factor = self._real("rope.scaling.factor")
        scaling: dict[str, object] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self._count("rope.scaling.original_context_length"),
            "beta_fast": self._real("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self._real("rope.scaling.yarn_beta_slow", 1.0),
        }
        attention = self._real("rope.scaling.attn_factor", 1.0) * self._real("rope.scaling.yarn_attn_factor", 1.0)
        if attention != 1.0:  # llama.cpp multiplies YaRN's own factor by it, Hugging Face's key replaces the product
            scaling["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
        return scaling

    def _llama3(self, freqs: TensorInfo, head_dim: int) -> dict[str, object] | None:
        """Return the parameters whose llama3 divisors are the stored ones, which hold the divisors alone.

        All published models share the frequency factors 1 and 4 and the trained length 8192; the factor is the
        largest divisor.
        """
        if freqs.shape != (head_dim // 2,) or freqs.type != _F32:
            raise self._fail(f"tensor {_ROPE_FREQS!r} has shape {list(freqs.shape)}, it must be F32 [{head_dim // 2}]")
        stored = np.empty((1, head_dim // 2), np.float32)
        self._dequantize(freqs, stored)
        factor, length = float(stored.max()), 8192
        if (stored == 1).all():
            return None
        base = self._real("rope.freq_base", 10000.0)
        turns = length / (2 * math.pi * max(base, 1.0) ** (np.arange(0, head_dim, 2) / head_dim))
        smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        with np.errstate(all="ignore"):
            matches = np.allclose(stored[0], 1 / ((1 - smooth) / factor + smooth), rtol=1e-4, atol=0)
        if not matches:
            raise self._fail(f"tensor {_ROPE_FREQS!r} is not Llama 3's frequency scaling, the only one that is read")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }


def _mapped(name: str) -> str:
    if match := _LAYER_NAME.fullmatch(name):
        part = _LAYER.get(match[2])
        return f"model.layers.{match[1]}.{part}.{match[3]}" if part else name
    stem, _, suffix = name.rpartition(".")
    return f"{_OUTER[stem]}.{suffix}" if stem in _OUTER else name
