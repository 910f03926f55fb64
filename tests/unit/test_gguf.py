"""GGUF: every architecture and tensor type, small files byte by byte, hostile ones, the real file."""

import re
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.formats import gguf as product
from omniserve.formats import gguf_header
from omniserve.formats.checkpoint import open_checkpoint
from omniserve.formats.gguf import GGUFSource
from omniserve.models.families import check_tensors, family
from tests.fuzz.files import as_gguf, permuted
from tests.model.test_transformers import EXPERTS, SHAPES, exact, score
from tests.tiny import tiny_model

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB = 4, 2, 16, 64, 96, 40


# Small files, written byte by byte


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, value: object) -> bytes:
    """One metadata entry: bool, int (u32), float (f32), str, list of str, or (type, raw bytes)."""
    kinds: list[tuple[type, int, Any]] = [
        (bool, 7, lambda v: struct.pack("<B", v)),
        (int, 4, lambda v: struct.pack("<I", v)),
        (float, 6, lambda v: struct.pack("<f", v)),
        (str, 8, text),
        (list, 9, lambda v: struct.pack("<IQ", 8, len(v)) + b"".join(map(text, v))),
        (np.ndarray, 9, lambda v: struct.pack("<IQ", {"i": 5, "f": 6}[v.dtype.kind], len(v)) + v.tobytes()),
    ]
    if isinstance(value, tuple):
        return text(key) + struct.pack("<I", value[0]) + value[1]
    kind, pack = next((number, pack) for of, number, pack in kinds if isinstance(value, of))
    return text(key) + struct.pack("<I", kind) + pack(value)


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    pairs: list[bytes], infos: list[bytes], *, version: int = 3, keys: int | None = None, tensors: int | None = None
) -> bytes:
    counts = struct.pack("<QQ", len(infos) if tensors is None else tensors, len(pairs) if keys is None else keys)
    return b"GGUF" + struct.pack("<I", version) + counts + b"".join(pairs) + b"".join(infos)


def whole(head: bytes, data: bytes = b"", alignment: int = 32) -> bytes:
    return head + b"\0" * (-len(head) % alignment) + data


def numbers(architecture: str = "llama", **changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return {"general.architecture": architecture} | {
        f"{architecture}.{key}": value for key, value in values.items() if value is not None
    }


TOKENIZER: dict[str, object] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "abcd", *"0123456789"],
    "tokenizer.ggml.token_type": np.array([3] + [1] * 39, np.int32),
    "tokenizer.ggml.merges": ["a b", "c d", "ab cd"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
}


def dense(bias: bool = False) -> dict[str, torch.Tensor]:
    """Random tensors of one layer, under Hugging Face's names."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layer, q, kv = "model.layers.0.", HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {
        "model.embed_tokens.weight": rows(VOCAB, HIDDEN),
        "model.norm.weight": rows(HIDDEN),
        layer + "input_layernorm.weight": rows(HIDDEN),
        layer + "self_attn.q_proj.weight": rows(q, HIDDEN),
        layer + "self_attn.k_proj.weight": rows(kv, HIDDEN),
        layer + "self_attn.v_proj.weight": rows(kv, HIDDEN),
        layer + "self_attn.o_proj.weight": rows(HIDDEN, q),
        layer + "post_attention_layernorm.weight": rows(HIDDEN),
        layer + "mlp.gate_proj.weight": rows(FFN, HIDDEN),
        layer + "mlp.up_proj.weight": rows(FFN, HIDDEN),
        layer + "mlp.down_proj.weight": rows(HIDDEN, FFN),
    }
    if bias:
        tensors |= {f"{layer}self_attn.{x}_proj.bias": rows(q if x == "q" else kv) for x in "qkv"}
    return tensors


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def stored(tensors: dict[str, torch.Tensor], architecture: str = "llama") -> dict[str, np.ndarray]:
    """The tensors under GGUF's names, q and k permuted where the architecture does that."""
    found = {}
    for name, tensor in tensors.items():
        if architecture == "llama" and (match := re.search(r"self_attn\.([qk])_proj", name)):
            tensor = permuted(tensor, HEADS if match[1] == "q" else KV_HEADS)
        stem, suffix = name.removeprefix("model.layers.0.").rsplit(".", 1)
        found[f"{'blk.0.' if 'layers' in name else ''}{GGUF_NAMES[stem]}.{suffix}"] = tensor.numpy()
    return found


def write(path: Path, metadata: dict[str, object], tensors: dict[str, np.ndarray], kind: int = 0) -> Path:
    """Write a file whose matrices have type `kind` and whose vectors are F32."""
    infos, data = [], b""
    for name, array in tensors.items():
        of = kind if array.ndim > 1 else 0
        raw = gguf.quants.quantize(array.astype(np.float32), gguf.GGMLQuantizationType(of)).tobytes()
        infos.append(info(name, array.shape[::-1], of, len(data)))
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(whole(header([pair(k, v) for k, v in metadata.items()], infos), data))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small.gguf", numbers() | TOKENIZER, stored(dense()))


def test_a_small_file_gives_its_tensors_back(small: Path) -> None:
    source = GGUFSource(small)
    wanted = dense()
    assert source.names() == set(wanted)
    for name, tensor in wanted.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == torch.float32
        assert torch.equal(source.tensor(name), tensor), name
    spec = family(source.config).spec(source.config)
    check_tensors(source, spec)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.ffn, spec.vocab, spec.tied) == (4, 2, 16, 96, 40, True)


def test_a_tensor_is_the_callers_own(small: Path) -> None:
    source = GGUFSource(small)
    before = small.read_bytes()
    source.tensor("model.norm.weight").fill_(7)
    assert torch.equal(source.tensor("model.norm.weight"), dense()["model.norm.weight"])
    assert small.read_bytes() == before


def test_qwen2_rows_are_not_permuted(tmp_path: Path) -> None:
    wanted = dense(bias=True)
    source = GGUFSource(write(tmp_path / "q.gguf", numbers("qwen2"), stored(wanted, "qwen2")))
    check_tensors(source, family(source.config).spec(source.config))
    for name, tensor in wanted.items():
        assert torch.equal(source.tensor(name), tensor), name


def test_biases_of_llama_are_unpermuted_too(tmp_path: Path) -> None:
    wanted = dense(bias=True)
    source = GGUFSource(write(tmp_path / "b.gguf", numbers(), stored(wanted)))
    assert source.config["attention_bias"] is True
    for name, tensor in wanted.items():
        assert torch.equal(source.tensor(name), tensor), name


# Architectures

QWEN3_MOE = {"model_type": "qwen3_moe", "config": EXPERTS | {"norm_topk_prob": True}}
FILES: dict[str, dict[str, object]] = {
    name: SHAPES[name]
    for name in (
        "gqa", "mha-untied", "d80", "mistral", "mistral-window", "mixtral", "qwen2", "qwen2-moe", "qwen3",
    )
} | {"qwen3-moe": QWEN3_MOE}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_architecture_gives_the_model_it_was_written_from(name: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", **FILES[name])  # type: ignore[arg-type]
    path = as_gguf(folder, tmp_path / "m.gguf")
    wanted, source = open_checkpoint(folder), open_checkpoint(path)
    check_tensors(source, family(source.config).spec(source.config))
    assert source.names() == wanted.names()
    for tensor in wanted.names():
        assert source.shape(tensor) == wanted.shape(tensor)
        assert torch.equal(source.tensor(tensor), wanted.tensor(tensor)), tensor
    ids = torch.randint(0, 97, (120,), generator=torch.Generator().manual_seed(5)).tolist()
    assert torch.equal(score(exact(path), ids), score(exact(folder), ids))


@pytest.mark.parametrize(("name", "kind"), [("mixtral", "Q5_1"), ("qwen2-moe", "Q8_0"), ("d80", "Q4_0")])
def test_quantized_experts_and_permuted_rows(name: str, kind: str, tmp_path: Path) -> None:
    """Slices of merged experts and un-permuted rows hold what quantizing each tensor alone gives."""
    shape = {**FILES[name], "ffn": 96, "config": {**FILES[name].get("config", {}), "moe_intermediate_size": 64}}  # type: ignore[dict-item]
    if name == "qwen2-moe":
        shape["config"]["shared_expert_intermediate_size"] = 32
    folder = tiny_model(tmp_path / "m", **shape)  # type: ignore[arg-type]
    wanted, source = open_checkpoint(folder), open_checkpoint(as_gguf(folder, tmp_path / "m.gguf", kind))
    number = gguf.GGMLQuantizationType[kind]
    for tensor in wanted.names():
        alone = wanted.tensor(tensor).numpy()
        if alone.ndim > 1 and not tensor.endswith(("gate.weight", "shared_expert_gate.weight")):
            alone = gguf.quants.dequantize(gguf.quants.quantize(alone, number), number)
        assert np.array_equal(source.tensor(tensor).numpy(), alone), tensor


def test_experts_of_the_oldest_files(tmp_path: Path) -> None:
    """Mixtral files of early 2024 hold each expert alone."""
    folder = tiny_model(tmp_path / "m", **FILES["mixtral"])  # type: ignore[arg-type]
    merged = gguf.GGUFReader(as_gguf(folder, tmp_path / "merged.gguf"))
    tensors = {}
    for one in merged.tensors:
        array = np.array(one.data)
        if match := re.fullmatch(r"blk\.(\d)\.ffn_(\w+)_exps\.weight", one.name):
            tensors |= {f"blk.{match[1]}.ffn_{match[2]}.{e}.weight": array[e] for e in range(len(array))}
        else:
            tensors[one.name] = array
    metadata = {key: field.contents() for key, field in merged.fields.items() if not key.startswith("GGUF.")}
    source = GGUFSource(write(tmp_path / "single.gguf", metadata, tensors))
    check_tensors(source, family(source.config).spec(source.config))
    wanted = open_checkpoint(folder)
    assert all(torch.equal(source.tensor(name), wanted.tensor(name)) for name in wanted.names())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"expert_count": 3}, "has shape [4, 160, 64], it must be [llama.expert_count, N, K]"),
        ("mixtral", {"expert_used_count": None}, "metadata key llama.expert_used_count is missing"),
        ("mixtral", {"expert_weights_norm": False}, "expert_weights_norm is False, Mixtral's weights are always"),
        ("qwen2-moe", {"expert_weights_norm": 1}, "expert_weights_norm is 1, it must be true or false"),
        ("qwen2-moe", {"expert_count": None}, "qwen2moe.expert_count is 0, which the qwen2moe decoder"),
        ("qwen2-moe", {"expert_gating_func": 2}, "qwen2moe.expert_gating_func is 2, which the qwen2moe decoder"),
        ("qwen2-moe", {"attention.sliding_window": 64}, "attention.sliding_window is 64: of this architecture"),
        ("qwen3", {"expert_count": 2}, "qwen3.expert_count is 2, which the qwen3 decoder of this version does not"),
        ("qwen3", {"expert_count": -2}, "qwen3.expert_count is -2, it must be a positive whole number"),
    ],
)
def test_experts_that_cannot_be_served(name: str, changes: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", **FILES[name])  # type: ignore[arg-type]
    made = gguf.GGUFReader(as_gguf(folder, tmp_path / "m.gguf"))
    metadata = {key: field.contents() for key, field in made.fields.items() if not key.startswith("GGUF.")}
    prefix = metadata["general.architecture"]
    for key, value in changes.items():
        metadata[f"{prefix}.{key}"] = (5, struct.pack("<i", value)) if value == -2 else value
        if value is None:
            del metadata[f"{prefix}.{key}"]
    path = write(tmp_path / "changed.gguf", metadata, {one.name: np.array(one.data) for one in made.tensors})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        GGUFSource(path)


def test_sizes_that_old_files_do_not_tell(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", **FILES["qwen2-moe"])  # type: ignore[arg-type]
    made = gguf.GGUFReader(as_gguf(folder, tmp_path / "m.gguf"))
    metadata = {
        key: field.contents()
        for key, field in made.fields.items()
        if not key.startswith("GGUF.") and "feed_forward" not in key
    }
    path = write(tmp_path / "old.gguf", metadata, {one.name: np.array(one.data) for one in made.tensors})
    config = GGUFSource(path).config
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (48, 80)


def test_more_experts_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path / "m", **FILES["mixtral"])  # type: ignore[arg-type]
    path = as_gguf(folder, tmp_path / "m.gguf")
    monkeypatch.setattr(product, "MAX_ENTRIES", 30)
    with pytest.raises(CheckpointError, match="more than 30 tensors, each expert's counted"):
        GGUFSource(path)


def test_one_of_several_files(tmp_path: Path) -> None:
    path = write(tmp_path / "s.gguf", numbers() | {"split.count": (2, struct.pack("<H", 3))}, stored(dense()))
    with pytest.raises(CheckpointError, match="one of 3 files of a model: join them with `llama-gguf-split --merge`"):
        GGUFSource(path)


# Tensor types


def readable() -> list[str]:
    """Every type that the gguf package de-quantizes."""
    names = []
    for kind, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            names.append(kind.name)
        except NotImplementedError:
            continue
    return names


def test_the_readable_types_are_those_of_the_package() -> None:
    assert {"Q4_K", "Q6_K", "IQ1_S", "IQ4_XS", "TQ1_0", "MXFP4"} < set(readable())
    assert len(readable()) >= 24


def blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random rows of a type as bytes, all of whose values are finite: quantized, or random blocks."""
    random = np.random.default_rng(int(kind))
    try:
        return gguf.quants.quantize(random.standard_normal((rows, columns), np.float32), kind).view(np.uint8)
    except NotImplementedError:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        wanted = rows * columns // block
        drawn = random.integers(0, 256, (8 * wanted, block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            finite = np.isfinite(gguf.quants.dequantize(drawn, kind)).all(1)
        assert finite.sum() >= wanted, kind
        return drawn[finite][:wanted].reshape(rows, -1)


@pytest.mark.parametrize("name", readable())
def test_types_come_out_as_the_gguf_package_has_them(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole tensor at once, whatever chunks it is read in."""
    kind = gguf.GGMLQuantizationType[name]
    raw = blocks(kind, 48, 768)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "qwen2")
    for key, value in numbers("qwen2", vocab_size=48).items():
        if key != "general.architecture":
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    stored_as = {"F32": np.float32, "F16": np.float16}.get(name, np.uint8)
    writer.add_tensor("token_embd.weight", raw.view(stored_as), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    exact_values = gguf.quants.dequantize(raw, kind).reshape(48, 768)
    assert np.isfinite(exact_values).all()
    assert exact_values.std() > 0
    for elements in (product._CHUNK_ELEMENTS, 5000, 1):
        monkeypatch.setattr(product, "_CHUNK_ELEMENTS", elements)
        source = GGUFSource(tmp_path / "t.gguf")
        assert source.shape("model.embed_tokens.weight") == (48, 768)
        assert np.array_equal(source.tensor("model.embed_tokens.weight").numpy(), exact_values)
    wanted = {"F32": "float32", "BF16": "bfloat16"}.get(name, "float16")
    assert source.config["torch_dtype"] == wanted


def test_version_2_and_alignment(tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    pairs = [pair(k, v) for k, v in (numbers(vocab_size=VOCAB) | {"general.alignment": 64}).items()]
    path.write_bytes(whole(header(pairs, [info("output_norm.weight", (HIDDEN,))], version=2), b"\1" * 4 * HIDDEN, 64))
    assert GGUFSource(path).tensor("model.norm.weight").tolist() == [struct.unpack("<f", b"\1" * 4)[0]] * HIDDEN


# Configuration


def config_of(tmp_path: Path, tensors: dict[str, np.ndarray] | None = None, **changes: object) -> dict[str, object]:
    return dict(GGUFSource(write(tmp_path / "c.gguf", numbers(**changes), tensors or stored(dense()))).config)


def test_rope_scaling_is_translated(tmp_path: Path) -> None:
    assert config_of(tmp_path)["rope_scaling"] is None
    linear = config_of(tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config_of(tmp_path, rope__scale_linear=2.0)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32}
    config = config_of(tmp_path, **yarn)
    spec = family(config).spec(config)
    assert (spec.rope.kind, spec.rope.factor, spec.rope.original_context) == ("yarn", 4.0, 32)
    assert spec.rope.attention_factor is None
    scaled = config_of(tmp_path, **yarn, rope__scaling__attn_factor=0.5)["rope_scaling"]
    assert isinstance(scaled, dict)
    assert scaled["attention_factor"] == pytest.approx(0.5 * (0.1 * np.log(4) + 1))


def test_llama3_frequencies_are_recognised(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    reference = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters={**scaling, "rope_theta": 500000.0}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](reference, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    divisors = {"rope_freqs.weight": (plain / scaled).numpy()}
    config = config_of(tmp_path, stored(dense()) | divisors, rope__freq_base=500000.0)
    assert config["rope_scaling"] == scaling
    check = GGUFSource(tmp_path / "c.gguf")
    check_tensors(check, family(config).spec(config))  # the divisors are not a tensor of the model
    with pytest.raises(CheckpointError, match="is not Llama 3's frequency scaling"):
        config_of(tmp_path, stored(dense()) | {"rope_freqs.weight": np.linspace(1, 3, HEAD_DIM // 2)})
    with pytest.raises(CheckpointError, match=r"has shape \[3\], it must be F32 \[8\]"):
        config_of(tmp_path, stored(dense()) | {"rope_freqs.weight": np.ones(3)})
    assert config_of(tmp_path, attention__sliding_window=128)["model_type"] == "llama"
    assert config_of(tmp_path, attention__sliding_window=64)["sliding_window"] == 64
    ones = config_of(tmp_path, stored(dense()) | {"rope_freqs.weight": np.ones(HEAD_DIM // 2)})
    assert ones["rope_scaling"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, "metadata key llama.block_count is missing"),
        ({"block_count": 0}, "llama.block_count is 0, it must be a positive whole number"),
        ({"block_count": "many"}, "llama.block_count is 'many', it must be a positive whole number"),
        ({"attention__head_count": np.array([4, 4], np.int32)}, "head_count is an array of 2, it must be"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "epsilon is nan, it must be a finite number"),
        ({"rope__dimension_count": 8}, "llama.rope.dimension_count is 8, it must be the head size 16"),
        ({"expert_count": 8}, "metadata key llama.expert_used_count is missing"),
        ({"expert_count": np.array([8, 8], np.int32)}, "llama.expert_count is an array of 2, it must be"),
        ({"rope__scaling__type": "longrope"}, "rope.scaling.type is 'longrope', allowed are none, linear and yarn"),
        ({"rope__scaling__type": np.array([1, 2], np.int32)}, "rope.scaling.type is an array of 2, allowed are none"),
        ({"attention__sliding_window": "no"}, "llama.attention.sliding_window is 'no'"),
        ({"rope__scaling__type": "linear"}, "metadata key llama.rope.scaling.factor is missing"),
    ],
)
def test_metadata_that_cannot_be_served(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        config_of(tmp_path, **changes)


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"general.architecture": "mamba"}, {})
    with pytest.raises(
        CheckpointError,
        match=r"general.architecture is 'mamba', this version reads llama, qwen2, qwen2moe, qwen3, qwen3moe",
    ):
        GGUFSource(path)
    path.write_bytes(whole(header([], [])))
    with pytest.raises(CheckpointError, match=r"general.architecture is None"):
        GGUFSource(path)


def test_a_file_without_effect_keys_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config_of(tmp_path, new_idea=3)
    assert "key=llama.new_idea value=3" in caplog.text


def test_without_the_gguf_package(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_header.tensor_types.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="needs the Python package gguf"):
        GGUFSource(small)
    monkeypatch.undo()
    assert GGUFSource(small)


# Hostile files

ARCH = pair("general.architecture", "llama")
TENSOR = info("output_norm.weight", (HIDDEN,))
HOSTILE = {
    "empty": (b"", "the file is empty"),
    "short": (b"GG", "truncated: the magic needs 4 bytes at byte 0, the file has 2 left"),
    "magic": (b"GGML" + b"\0" * 60, "not a GGUF file: it begins with b'GGML', not b'GGUF'"),
    "version 1": (header([], [], version=1), "GGUF version 1, versions 2 and 3 are read"),
    "big endian": (header([], [], version=3 << 24), "(written for a big-endian machine)"),
    "2^60 tensors": (
        header([ARCH], [], tensors=1 << 60),
        "tensor_count is 1152921504606846976, but a file of 69 bytes holds at most 1",
    ),
    "2^60 keys": (header([ARCH], [], keys=1 << 60), "kv_count is 1152921504606846976, but"),
    "70000 tensors": (header([ARCH], [TENSOR] * 70000), "tensor_count is 70000, but"),
    "key length": (header([struct.pack("<Q", 1 << 50)], []), "kv_count is 1, but"),
    "long key": (header([text("x" * 70000) + b"\0" * 8], []), "metadata key 0 is 70000 bytes long, at most 65535"),
    "string length": (header([text("k") + struct.pack("<IQ", 8, 1 << 62)], []), "truncated: 'k' needs 46116860184273"),
    "not UTF-8": (header([pair("k", (8, text(b"\xff\xfe")))], []), "'k' is not valid UTF-8"),
    "value type": (header([pair("k", (13, b"\0" * 8))], []), "'k' has value type 13, allowed are 0 to 12"),
    "truth value": (header([pair("k", (7, b"\2" * 8))], []), "'k' is the truth value 2, allowed are 0 and 1"),
    "array of truth values": (header([pair("k", (9, struct.pack("<IQ", 7, 2) + b"\1\7"))], []), "the truth value 7"),
    "array length": (
        header([pair("k", (9, struct.pack("<IQ", 10, 1 << 61)))], []),
        "truncated: 'k' needs 18446744073709551616 bytes",
    ),
    "string array length": (header([pair("k", (9, struct.pack("<IQ", 8, 1 << 61)))], []), "truncated: 'k' needs"),
    "array type": (header([pair("k", (9, struct.pack("<IQ", 99, 1)))], []), "'k' has elements of type 99"),
    "nested arrays": (
        header([pair("k", (9, struct.pack("<IQ", 9, 1) * 9 + b"\0" * 20))], []),
        "nests arrays deeper than 4",
    ),
    "same key": (header([ARCH, ARCH], []), "metadata key 'general.architecture' is there twice"),
    "alignment 0": (header([pair("general.alignment", 0)], []), "general.alignment is 0, allowed is a power of two"),
    "alignment 48": (header([pair("general.alignment", 48)], []), "general.alignment is 48"),
    "alignment text": (header([pair("general.alignment", "32")], []), "general.alignment is '32'"),
    "name length": (header([ARCH], [info("x" * 65, (1,))]), "the name of tensor 0 is 65 bytes long, at most 64"),
    "same tensor": (header([ARCH], [TENSOR] * 2), "tensor 'output_norm.weight' is there twice"),
    "rank 0": (header([ARCH], [info("t", ()) + b"\0" * 16]), "tensor 't' has 0 dimensions, allowed are 1 to 4"),
    "rank 5": (header([ARCH], [info("t", (1,) * 5)]), "tensor 't' has 5 dimensions"),
    "rank 2^31": (header([ARCH], [text("t") + struct.pack("<I", 1 << 31) + b"\0" * 30]), "has 2147483648 dimensions"),
    "dimension 0": (header([ARCH], [info("t", (0, 4))]), "shape [0, 4], every dimension must be 1 or more"),
    "type": (header([ARCH], [info("t", (4,), 77)]), "tensor 't' has the unknown type 77"),
    "removed type": (header([ARCH], [info("t", (32,), 4)]), "tensor 't' has the unknown type 4"),
    "block": (header([ARCH], [info("t", (31,), 8)]), "tensor 't' has rows of 31, Q8_0 needs a multiple of 32"),
    "offset": (header([ARCH], [info("t", (4,), 0, 8)]), "lies at offset 8, which is no multiple of 32"),
    "overflowing shape": (
        header([ARCH], [info("t", (1 << 40, 1 << 40, 1 << 40, 1 << 40))]),
        "truncated: tensor 't' ends at byte",
    ),
    "beyond the end": (whole(header([ARCH], [info("t", (4,), 0, 1 << 40)])), "truncated: tensor 't' ends at byte"),
    "overlap": (
        whole(header([ARCH], [info("t", (16,)), info("u", (4,), 0, 32)]), b"\0" * 64),
        "tensors 't' and 'u' overlap at byte",
    ),
    "same place": (whole(header([ARCH], [info("t", (4,)), info("u", (4,))]), b"\0" * 64), "overlap at byte"),
    "same name twice": (
        whole(
            header([ARCH], [TENSOR, info("model.norm.weight", (4,), 0, 4 * HIDDEN)]),
            b"\0" * (4 * HIDDEN + 16),
        ),
        "tensor 'model.norm.weight' is there twice",
    ),
    "not readable type": (
        whole(header([ARCH], [info("t", (256,), 15)]), b"\0" * 400),
        "tensor 't' has type Q8_K, which cannot be de-quantized",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_end_in_one_sentence(tmp_path: Path, what: str) -> None:
    raw, message = HOSTILE[what]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            GGUFSource(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "_MAX_STRINGS", 10)
    path = tmp_path / "strings.gguf"
    path.write_bytes(header([pair("a", ["x"] * 6), pair("b", ["y"] * 6)], []))
    with pytest.raises(CheckpointError, match="'b' brings the strings in arrays to 12, at most 10 are allowed"):
        GGUFSource(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFSource(tmp_path / "none.gguf")


def test_q_rows_that_no_heads_fill(tmp_path: Path) -> None:
    tensors = stored(dense()) | {"blk.0.attn_q.weight": np.zeros((60, HIDDEN), np.float32)}
    source = GGUFSource(write(tmp_path / "rows.gguf", numbers(), tensors))
    with pytest.raises(CheckpointError, match="has 60 rows, which 4 heads of even size cannot fill"):
        source.tensor("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(CheckpointError, match="tensor 'x' is missing"):
        source.tensor("x")


# The real file


@pytest.fixture(scope="session")
def reference(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)


def test_real_metadata_equals_the_gguf_package(smollm2: Path) -> None:
    reader = gguf.GGUFReader(smollm2)
    mine = GGUFSource(smollm2).metadata
    assert set(mine) == {key for key in reader.fields if not key.startswith("GGUF.")}
    for key, value in mine.items():
        theirs = reader.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs, key


def test_real_tensors_equal_transformers(smollm2: Path, reference: Any) -> None:
    source = GGUFSource(smollm2)
    theirs = reference.state_dict()
    theirs.pop("lm_head.weight")
    assert source.names() == set(theirs)
    for name in theirs:
        if "layers" not in name or re.search(r"layers\.(0|13|29)\.", name):
            assert torch.equal(source.tensor(name), theirs[name]), name
    check_tensors(source, family(source.config).spec(source.config))


def test_real_config_equals_transformers(smollm2: Path, reference: Any) -> None:
    mine, theirs = GGUFSource(smollm2).config, reference.config
    for key in (
        "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "attention_bias", "mlp_bias", "hidden_act",
    ):  # fmt: skip
        assert mine[key] == getattr(theirs, key), key
    assert mine["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert (mine["bos_token_id"], mine["eos_token_id"]) == (1, 2)
