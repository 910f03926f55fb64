"""What a fuzzer does to a model file: changes that know its structure, and changes of bytes."""

import json
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from omniserve.formats import gguf

Draw = Callable[[st.SearchStrategy[Any]], Any]

WHOLE = (
    st.sampled_from([0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 127, 255, 256, 4096, 65535, 65536, 1 << 20])
    | st.sampled_from([s * (1 << k) + d for k in (31, 32, 40, 60, 61, 62, 63, 64) for s in (1,) for d in (-1, 0, 1)])
    | st.integers(0, 1 << 64)
)
SIGNED = WHOLE | WHOLE.map(lambda value: -value)
SCALAR = (
    st.none() | st.booleans() | SIGNED | st.floats() | st.text(max_size=8)
    | st.sampled_from(["", "F32", "F16", "BF16", "I8", "U8", "I64", "F8_E4M3", "BOOL", "x" * 300, "\0", "\ud800", "🙂"])
)  # fmt: skip
JSON = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
CONFIG_KEYS = (
    "rope_scaling", "rope_parameters", "rope_theta", "rope_type", "type", "factor", "low_freq_factor", "truncate",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "mscale", "mscale_all_dim", "sliding_window",
    "layer_types", "max_window_layers", "use_sliding_window", "mlp_only_layers", "decoder_sparse_step", "num_experts",
    "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
    "norm_topk_prob", "num_key_value_heads", "attention_bias", "qkv_bias", "mlp_bias", "torch_dtype", "dtype",
    "eos_token_id", "hidden_act", "partial_rotary_factor", "quantization_config", "tie_word_embeddings", "head_dim",
)  # fmt: skip
CONFIG_VALUES = st.sampled_from([
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.0},
    {"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}, {"quant_method": "omniserve", "version": 1},
    {"quant_method": "qoq", "wbits": 4, "group_size": 128}, ["sliding_attention", "full_attention"], [0], [[]], "llama",
    1 << 10, 1 << 12, 1 << 20, 1 << 28, 1e308, -0.0,
])  # fmt: skip
KEYS = sorted(gguf._READ | set(gguf._NEUTRAL))
"""What follows `llama.` in metadata; the fuzzer puts keys in that its files lack."""
TEXTS = st.sampled_from([b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u0000", b"-", b"1e999", b"NaN", b"null",
                         b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"0.1e", b"\xff", b"\0", b" " * 64])  # fmt: skip


def near(draw: Draw, value: int, top: int = 1 << 64) -> int:
    """Return a number that a careless reader might trust: the right one and a bit, a border, or anything."""
    changed = draw(st.sampled_from([value + 1, value - 1, value * 2, value // 2, -value, value ^ 1]) | WHOLE)
    return int(changed) % top


def cut(draw: Draw, raw: bytes, head: int) -> bytes:
    """Return the file with bytes changed, inserted, removed or cut off, mostly in its first `head` bytes."""
    content = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, min(head, len(content)) - 1)) | st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "number", "insert", "remove", "truncate", "zero", "text"])):
            case "flip":
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "number":
                size = draw(st.sampled_from([1, 2, 4, 8]))
                content[at : at + size] = near(
                    draw, int.from_bytes(content[at : at + size], "little"), 1 << 8 * size
                ).to_bytes(size, "little")
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=40))
            case "remove":
                del content[at : at + draw(st.integers(1, 64))]
            case "truncate":
                del content[at:]
            case "zero":
                content[at : at + 64] = bytes(len(content[at : at + 64]))
            case "text":
                content[at:at] = draw(TEXTS)
    return bytes(content)


def noise(draw: Draw, data: bytes) -> bytes:
    """Return the data of tensors with other numbers in it, as many as before."""
    raw = draw(st.binary(min_size=1, max_size=64))
    at = draw(st.integers(0, len(data)))
    return (data[:at] + raw + data[at + len(raw) :])[: len(data)]


# safetensors


def change_json(draw: Draw, value: Any) -> Any:
    """Return a JSON value with one place changed: replaced, removed, doubled, renamed, or a number moved."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        made = dict(value)
        key = draw(st.sampled_from(sorted(made)))
        match draw(st.sampled_from(["in", "in", "in", "in", "remove", "rename", "copy", "put"])):
            case "in":
                made[key] = change_json(draw, made[key])
            case "remove":
                del made[key]
            case "rename":
                made[draw(st.text(max_size=5) | st.sampled_from([f"{key}x", key.upper(), "__metadata__"]))] = made.pop(
                    key
                )
            case "copy":
                made[draw(st.sampled_from(sorted(made)))] = deepcopy(made[key])
            case "put":
                key = draw(st.text(max_size=5) | st.sampled_from(sorted(made)) | st.sampled_from(CONFIG_KEYS))
                made[key] = draw(JSON | CONFIG_VALUES)
        return made
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        made_list, place = list(value), draw(st.integers(0, len(value) - 1))
        match draw(st.sampled_from(["in", "in", "remove", "double"])):
            case "in":
                made_list[place] = change_json(draw, made_list[place])
            case "remove":
                del made_list[place]
            case "double":
                made_list *= draw(st.integers(2, 9))
        return made_list
    if type(value) is int and draw(st.booleans()):
        return near(draw, value)
    return draw(JSON)


def as_text(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def fuzz_safetensors(draw: Draw, raw: bytes) -> bytes:
    """Return a safetensors file with its header, its header's length or its data changed."""
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length], raw[8 + length :]
    if draw(st.integers(0, 3)) == 0:
        return cut(draw, raw, 8 + length)
    header = json.loads(text)
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        header = change_json(draw, header)
    text = as_text(header)
    if draw(st.integers(0, 6)) == 0:
        text = cut(draw, text, len(text))
    length = len(text) if draw(st.integers(0, 9)) else near(draw, len(text))
    if draw(st.integers(0, 2)) == 0:
        data = cut(draw, data, 4096) if draw(st.booleans()) else noise(draw, data)
    return struct.pack("<Q", length) + text + data


def fuzz_json(draw: Draw, raw: bytes) -> bytes:
    """Return a JSON file with values or characters changed."""
    value = json.loads(raw)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        value = change_json(draw, value)
    return cut(draw, as_text(value), len(raw)) if draw(st.integers(0, 5)) == 0 else as_text(value)


SWEPT = (None, True, 0, -1, 1, 1 << 12, 1 << 63, 1.5, float("nan"), 1e400, "", "x", [], [1, 2], ["x"], {}, {"x": 1})


def sweep_json(raw: bytes) -> Iterator[bytes]:
    """Yield the file of an object with every key that is there or might be, at every kind of value."""
    whole = json.loads(raw)
    for key in sorted({*whole, *CONFIG_KEYS}):
        for value in SWEPT:
            yield as_text(whole | {key: value})


# GGUF

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


@dataclass
class Pair:
    """A metadata entry; `value` is a number, bytes of a string, or (element type, list)."""

    key: bytes
    kind: int
    value: Any


@dataclass
class Info:
    """A tensor's description, dimensions in the file's order."""

    name: bytes
    dims: list[int]
    kind: int
    offset: int


@dataclass
class Parts:
    """A GGUF file in pieces."""

    version: int
    pairs: list[Pair] = field(default_factory=list)
    infos: list[Info] = field(default_factory=list)
    data: bytes = b""


def take(raw: bytes) -> Parts:
    """Return the pieces of a sound file."""
    at = 4

    def number(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(code, raw, at)
        at += struct.calcsize(code)
        return value

    def string() -> bytes:
        nonlocal at
        count = number("<Q")
        at += count
        return raw[at - count : at]

    def value(kind: int) -> Any:
        if kind == STRING:
            return string()
        if kind == ARRAY:
            inner, count = number("<I"), number("<Q")
            return inner, [value(inner) for _ in range(count)]
        return number(NUMBERS[kind])

    version, tensors, keys = number("<I"), number("<Q"), number("<Q")
    parts = Parts(version)
    for _ in range(keys):
        key, kind = string(), number("<I")
        parts.pairs.append(Pair(key, kind, value(kind)))
    for _ in range(tensors):
        name = string()
        dims = [number("<Q") for _ in range(number("<I"))]
        parts.infos.append(Info(name, dims, number("<I"), number("<Q")))
    parts.data = raw[-(-at // 32) * 32 :]
    return parts


def pack(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return struct.pack("<Q", len(value)) + value
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(pack(inner, item) for item in items)
    code = NUMBERS[kind]
    size = struct.calcsize(code)
    if code in ("<f", "<d"):
        return struct.pack(code, value)
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


def put(parts: Parts, keys: int | None = None, tensors: int | None = None) -> bytes:
    """Return the file of the pieces; counts may lie."""
    head = b"GGUF" + struct.pack("<I", parts.version)
    head += struct.pack(
        "<QQ", len(parts.infos) if tensors is None else tensors, len(parts.pairs) if keys is None else keys
    )
    for pair in parts.pairs:
        head += pack(STRING, pair.key) + struct.pack("<I", pair.kind) + pack(pair.kind, pair.value)
    for info in parts.infos:
        head += pack(STRING, info.name) + struct.pack("<I", len(info.dims))
        head += b"".join(struct.pack("<Q", dim) for dim in info.dims) + struct.pack("<IQ", info.kind, info.offset)
    return head + bytes(-len(head) % 32) + parts.data


def new_value(draw: Draw, depth: int = 0) -> tuple[int, Any]:
    """Return a type and a value of it."""
    kind = draw(st.sampled_from([*NUMBERS, *[STRING] * 3, *([ARRAY] * 3 if depth < 3 else [])]))
    if kind == STRING:
        return kind, draw(st.binary(max_size=9) | st.sampled_from([b"llama", b"qwen2", b"gpt2", b"yarn", b"x" * 999]))
    if kind == ARRAY:
        inner, _ = new_value(draw, depth + 1)
        return kind, (inner, [new_of(draw, inner, depth + 1) for _ in range(draw(st.sampled_from([0, 1, 2, 3, 7])))])
    return kind, new_of(draw, kind, depth)


def new_of(draw: Draw, kind: int, depth: int) -> Any:
    if kind == STRING:
        return draw(st.binary(max_size=5))
    if kind == ARRAY:
        return (4, draw(st.lists(st.integers(0, 9), max_size=3)))
    if kind == 6:
        return draw(st.floats(width=32))
    return draw(st.floats()) if kind == 12 else draw(SIGNED)


def change_pair(draw: Draw, parts: Parts) -> None:
    place = draw(st.integers(0, len(parts.pairs) - 1))
    pair = parts.pairs[place]
    match draw(st.sampled_from(["value", "value", "near", "near", "rename", "remove", "twice", "items", *["put"] * 4])):
        case "put":
            prefix = parts.pairs[0].value if isinstance(parts.pairs[0].value, bytes) else b"llama"
            key = draw(st.sampled_from([f".{key}".encode() for key in KEYS]))
            others = [b"general.alignment", b"split.count", b"tokenizer.ggml.scores", b"tokenizer.ggml.bos_token_id"]
            whole = draw(st.sampled_from([prefix + key] * 4 + others))
            parts.pairs.append(Pair(whole, *new_value(draw)))
        case "value":
            pair.kind, pair.value = new_value(draw)
        case "near" if isinstance(pair.value, int):
            pair.value = near(draw, pair.value)
        case "near" if isinstance(pair.value, float):
            pair.value = draw(st.floats(width=32))
        case "rename":
            pair.key = draw(st.binary(max_size=9)) + pair.key[draw(st.integers(0, len(pair.key))) :]
        case "remove":
            del parts.pairs[place]
        case "twice":
            parts.pairs.append(deepcopy(pair))
        case "items" if pair.kind == ARRAY and pair.value[1]:
            inner, items = pair.value[0], list(pair.value[1])
            for _ in range(draw(st.integers(1, 3))):
                items[draw(st.integers(0, len(items) - 1))] = new_of(draw, inner, 2)
            pair.value = inner, items[draw(st.integers(0, 3)) :]
        case _:
            pair.kind, pair.value = new_value(draw)


def change_info(draw: Draw, parts: Parts) -> None:
    place = draw(st.integers(0, len(parts.infos) - 1))
    info = parts.infos[place]
    match draw(st.sampled_from(["dim", "dim", "rank", "kind", "offset", "name", "swap", "remove", "twice", "flat"])):
        case "dim" if info.dims:
            which = draw(st.integers(0, len(info.dims) - 1))
            info.dims[which] = near(draw, info.dims[which])
        case "rank":
            info.dims = draw(st.lists(WHOLE.map(lambda n: n % (1 << 64)) | st.integers(1, 300), max_size=6))
        case "kind":
            info.kind = draw(st.integers(0, 45) | WHOLE.map(lambda n: n % (1 << 32)))
        case "offset":
            info.offset = near(draw, info.offset)
        case "name":
            names = [other.name for other in parts.infos]
            info.name = draw(
                st.sampled_from([*names, b"rope_freqs.weight", b"output.weight", b"blk.0.attn_q.bias"])
                | st.binary(max_size=70)
            )
        case "swap":
            info.dims.reverse()
        case "remove":
            del parts.infos[place]
        case "twice":
            parts.infos.append(deepcopy(info))
        case _:
            info.dims = [*info.dims, 1]


def sweep_gguf(parts: Parts) -> Iterator[bytes]:
    """Yield the file with every key that is there or might be, at every kind of value."""
    prefix = parts.pairs[0].value
    others = (b"general.alignment", b"split.count", b"tokenizer.ggml.scores", b"tokenizer.ggml.bos_token_id")
    values: list[tuple[int, Any]] = [
        (4, 0), (4, 1), (4, 1 << 12), (5, -1), (10, 1 << 63), (7, 1), (6, 0.0), (6, float("nan")), (12, 1e308),
        (STRING, b""), (STRING, b"x"), (ARRAY, (5, [])), (ARRAY, (5, [1, 2])), (ARRAY, (6, [0.5])), (ARRAY, (7, [1])),
        (ARRAY, (STRING, [b"x", b"y"])), (ARRAY, (ARRAY, [(4, [1]), (4, [2])])),
    ]  # fmt: skip
    keys = {pair.key for pair in parts.pairs} | {prefix + f".{key}".encode() for key in KEYS} | set(others)
    for key in sorted(keys):
        for kind, value in values:
            made = replace(parts, pairs=[pair for pair in parts.pairs if pair.key != key])
            made.pairs.append(Pair(key, kind, value))
            yield put(made)


def fuzz_gguf(draw: Draw, raw: bytes, parts: Parts) -> bytes:
    """Return a GGUF file with metadata, tensor descriptions, counts, data or bytes changed."""
    head = len(raw) - len(parts.data)
    if draw(st.integers(0, 4)) == 0:
        return cut(draw, raw, head)
    made = deepcopy(parts)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3]))):
        if made.pairs and (not made.infos or draw(st.booleans())):
            change_pair(draw, made)
        elif made.infos:
            change_info(draw, made)
    counts = {}
    if draw(st.integers(0, 5)) == 0:
        counts = {draw(st.sampled_from(["keys", "tensors"])): near(draw, len(made.pairs))}
    if draw(st.integers(0, 9)) == 0:
        made.version = near(draw, made.version, 1 << 32)
    if draw(st.integers(0, 2)) == 0:
        made.data = cut(draw, made.data, 4096) if draw(st.booleans()) else noise(draw, made.data)
    fuzzed = put(made, **counts)
    return cut(draw, fuzzed, head) if draw(st.integers(0, 9)) == 0 else fuzzed
