"""Folders of safetensors: whole, sharded, and broken in every way; what opening a path says when it cannot."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniserve.base.config import PRECISIONS, Options
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.engine.build import build
from omniserve.formats.checkpoint import FolderSource, kv_scales, open_checkpoint
from omniserve.formats.gguf import GGUFSource
from tests.model.test_transformers import exact, greedy, score
from tests.tiny import tiny_model


def shard(folder: Path, count: int = 3) -> Path:
    """Spread model.safetensors over `count` files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part in range(count):
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        mine = {name: tensors[name] for name in names[part::count]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_come_back_as_stored(tmp_path: Path, shards: int) -> None:
    folder = tiny_model(tmp_path / "m", extra={"x.codes": torch.arange(6, dtype=torch.int8), "y": torch.ones(2).half()})
    wanted = load_file(folder / "model.safetensors")
    source = open_checkpoint(shard(folder, shards) if shards > 1 else folder)
    assert isinstance(source, FolderSource)
    assert source.names() == set(wanted)
    assert source.config["hidden_size"] == 64
    for name, tensor in wanted.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert torch.equal(source.tensor(name), tensor), name


TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("word", [*TYPES, "mixed"])
def test_float_types_are_served(tmp_path: Path, word: str) -> None:
    """A checkpoint in a type, or in all of them by turns within a layer, has the logits of its values in fp32."""
    folder = tiny_model(tmp_path / "m", "qwen2")
    tensors = load_file(folder / "model.safetensors")
    turns = dict.fromkeys(("q_proj", "gate_proj", "norm"), "F32") | dict.fromkeys(("k_proj", "o_proj", "up_"), "F16")
    chosen = {
        name: TYPES[next((turns[key] for key in turns if key in name), "BF16") if word == "mixed" else word]
        for name in tensors
    }
    assert len({chosen[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"}) == (3 if word == "mixed" else 1)
    stored = {name: tensor.to(chosen[name]) for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_checkpoint(shard(folder) if word == "mixed" else folder)
    assert {name: source.dtype(name) for name in tensors} == chosen
    ids = list(range(60))
    found = score(exact(folder), ids)
    wide = tiny_model(tmp_path / "wide", "qwen2")
    save_file({name: t.float() for name, t in stored.items()}, wide / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(found, score(exact(wide), ids))
    if word == "mixed":
        assert all(len(greedy(build(folder, Options(precision=name)), [ids], 3)[0]) == 3 for name in PRECISIONS)


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = shard(tiny_model(tmp_path / "m"), 2)
    (folder / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(folder).names()) == 20
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are there"):
        open_checkpoint(folder)


def test_a_consolidated_file_beside_the_model_is_not_read(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    save_file({"model.norm.weight": torch.ones(1)}, folder / "consolidated.safetensors")
    assert open_checkpoint(folder).shape("model.norm.weight") == (64,)


def test_a_folder_with_one_gguf_file(tmp_path: Path, smollm2: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(smollm2)
    assert isinstance(open_checkpoint(tmp_path), GGUFSource)
    (tmp_path / "other.gguf").symlink_to(smollm2)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files: give one of them \(model.gguf, other.gguf\)"):
        open_checkpoint(tmp_path)


def test_load_format(tmp_path: Path, smollm2: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    assert open_checkpoint(folder, "safetensors").path == folder
    assert open_checkpoint(smollm2, "gguf").path == smollm2
    with pytest.raises(CheckpointError, match="is a folder of safetensors, which load_format=gguf excludes"):
        open_checkpoint(folder, "gguf")
    with pytest.raises(CheckpointError, match="is a GGUF file, which load_format=safetensors excludes"):
        open_checkpoint(smollm2, "safetensors")
    with pytest.raises(ConfigError, match=r"must be one of auto, safetensors, gguf \(did you mean gguf\?\)"):
        open_checkpoint(folder, "ggfu")


# Paths that hold no checkpoint


def test_a_missing_path() -> None:
    with pytest.raises(CheckpointError, match=r"^models/tiny is not a file or folder$"):
        open_checkpoint("models/tiny")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_impossible_paths(path: str) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "quant_model.pt", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_prints_the_convert_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("Llama 3-QServe")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(b"\x80\x04")
    line = "omniserve convert 'Llama 3-QServe' -o 'Llama 3-QServe-st'"
    for given_path in (folder, folder / name):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(given_path)
        assert str(caught.value) == (
            f"Llama 3-QServe holds weights as a pickle only ({name}), which no serving command opens: run `{line}` once"
        )


def test_other_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors and no \*.gguf file"):
        open_checkpoint(tmp_path)
    folder = tiny_model(tmp_path / "m")
    with pytest.raises(CheckpointError, match="is one file of a checkpoint: give the folder"):
        open_checkpoint(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is not a GGUF file: it begins with b'\{\"ar'"):
        open_checkpoint(folder / "config.json")


# Broken folders


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (no_config, "config.json is missing"),
    "config is no JSON": (config_text("{'a': 1}"), "config.json: the file is not valid JSON (Expecting property name"),
    "config is a list": (config_text("[]"), "config.json: the file is not a JSON object"),
    "config is binary": (config_text("\0"), "config.json: the file is not valid JSON"),
    "config is nested": (config_text("[" * 100000), "config.json: the file is not valid JSON"),
    "config twice": (config_text('{"a": 1, "a": 2}'), "config.json: 'a' is there twice in the file"),
}
INDEXES: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "missing shard": (lambda m: m.update(a="model-9.safetensors"), "model-9.safetensors is missing, model.safetensors"),
    "missing tensor": (
        lambda m: m.update(a="model-00001-of-00003.safetensors"),
        "model-00001-of-00003.safetensors: tensor 'a' is named in model.safetensors.index.json but not there",
    ),
    "unlisted tensor": (
        lambda m: m.pop("model.norm.weight"),
        "holds tensor 'model.norm.weight', which model.safetensors.index.json puts nowhere",
    ),
    "wrong shard": (
        lambda m: m.update({"model.norm.weight": "model-00001-of-00003.safetensors"}),
        "holds tensor 'model.norm.weight', which model.safetensors.index.json puts in model-00001",
    ),
    "outside": (lambda m: m.update(a="../x.safetensors"), "tensor 'a' lies in '../x.safetensors', which is no"),
    "no file": (lambda m: m.update(a=3), "tensor 'a' lies in 3, which is no *.safetensors file name"),
    "empty": (lambda m: m.clear(), "weight_map is missing or empty"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_broken_folders(tmp_path: Path, what: str) -> None:
    change, message = FOLDERS[what]
    folder = tiny_model(tmp_path / "m")
    change(folder)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_checkpoint(folder)


@pytest.mark.parametrize("what", INDEXES)
def test_broken_indexes(tmp_path: Path, what: str) -> None:
    change, message = INDEXES[what]
    folder = shard(tiny_model(tmp_path / "m"))
    change_index(folder, change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_checkpoint(folder)


def test_the_same_tensor_in_two_files(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(64)}, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' is in both .*a.safetensors and .*b.safet"):
        open_checkpoint(folder)


# Broken files


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw(header: object, data: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * data


TWICE = b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'
FILES = {
    "empty": (b"", "truncated, 0 bytes are no safetensors header"),
    "short": (b"abc", "truncated, 3 bytes are no safetensors header"),
    "header length": (raw({}, 8, 1 << 60), "its header has 1152921504606846976 bytes, at most 10 fit"),
    "cut header": (raw({"a": entry([2], 0, 8)}, 8, 20), "its header is not valid JSON"),
    "list": (raw([]), "its header is not a JSON object"),
    "nested": (raw(b"[" * 100000), "its header is not valid JSON"),
    "twice": (raw(TWICE), "'a' is there twice in its header"),
    "no entry": (raw({"a": 3}), "tensor 'a' has no dtype, shape and data_offsets"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [0]}}), "tensor 'a' has no dtype, shape and data_offsets"),
    "dtype": (raw({"a": entry([8], 0, 8, "F8_E4M3")}, 8), "tensor 'a' has dtype F8_E4M3, allowed are F32, F16, BF16"),
    "dtype list": (raw({"a": entry([8], 0, 8, [])}, 8), "tensor 'a' has dtype [], allowed are"),
    "float64": (raw({"a": entry([1], 0, 8, "F64")}, 8), "tensor 'a' has dtype F64, allowed are"),
    "negative": (raw({"a": entry([-2], 0, 8)}, 8), "tensor 'a' has an invalid shape or data_offsets"),
    "fraction": (raw({"a": entry([2.0], 0, 8)}, 8), "tensor 'a' has an invalid shape or data_offsets"),
    "truth": (raw({"a": entry([True], 0, 4)}, 4), "tensor 'a' has an invalid shape or data_offsets"),
    "rank": (raw({"a": entry([1] * 9, 0, 4)}, 4), "tensor 'a' has an invalid shape or data_offsets"),
    "size": (raw({"a": entry([3], 0, 8)}, 8), "tensor 'a' of shape [3] and type F32 needs 12 bytes, its data_offsets"),
    "overflow": (raw({"a": entry([1 << 40, 1 << 40], 0, 8)}, 8), "needs 4835703278458516698824704 bytes"),
    "backwards": (raw({"a": entry([2], 8, 0)}, 8), "tensor 'a' of shape [2] and type F32 needs 8 bytes"),
    "overlap": (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12), "tensors 'a' and 'b' overlap at byte 4"),
    "gap": (raw({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20), "4 bytes before tensor 'b' belong to no tensor"),
    "truncated": (raw({"a": entry([2], 0, 8)}, 5), "truncated, tensor 'a' ends at byte 8 of 5 bytes of data"),
    "surplus": (raw({"a": entry([2], 0, 8)}, 9), "1 bytes behind the last tensor belong to no tensor"),
}


@pytest.mark.parametrize("what", FILES)
def test_broken_files(tmp_path: Path, what: str) -> None:
    content, message = FILES[what]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_behind_our_back(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    source = open_checkpoint(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' cannot be read"):
        source.tensor("model.norm.weight")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' cannot be read"):
        source.tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match="tensor 'nothing' is missing"):
        source.shape("nothing")


# Static KV scales


def with_scales(folder: Path, scales: dict[str, torch.Tensor]) -> FolderSource:
    return FolderSource(tiny_model(folder, extra={f"model.layers.{k}": v for k, v in scales.items()}))


def test_kv_scales(tmp_path: Path) -> None:
    assert kv_scales(with_scales(tmp_path / "none", {}), 2) is None
    ours = torch.rand(2, 2) + 0.1
    found = kv_scales(with_scales(tmp_path / "ours", {f"{i}.self_attn.kv_scale": ours + i for i in range(2)}), 2)
    assert found is not None
    assert [scale.tolist() for scale in found] == [ours.tolist(), (ours + 1).tolist()]
    original = {f"{i}.self_attn.kv_scale_quant_orig": torch.tensor([0.5, 0.25 + i]).half() for i in range(2)}
    found = kv_scales(with_scales(tmp_path / "original", original), 2)
    assert found is not None
    assert [scale.tolist() for scale in found] == [[[0.5] * 2, [0.25] * 2], [[0.5] * 2, [1.25] * 2]]
    assert all(scale.dtype == torch.float32 for scale in found)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(2), "is torch.float32 [2], it must be floating [2, 2]"),
        (torch.ones(3, 2), "is torch.float32 [3, 2], it must be"),
        (torch.ones(2, 4), "is torch.float32 [2, 4], it must be"),
        (torch.ones(2, 0), "is torch.float32 [2, 0], it must be"),
        (torch.ones(2, 2, dtype=torch.int8), "is torch.int8 [2, 2], it must be"),
        (torch.zeros(2, 2), "holds scales that are not positive numbers"),
        (torch.full((2, 2), torch.nan), "holds scales that are not positive numbers"),
    ],
)
def test_kv_scales_that_cannot_be(tmp_path: Path, scale: torch.Tensor, message: str) -> None:
    source = with_scales(tmp_path / "m", {f"{i}.self_attn.kv_scale": scale.clone() for i in range(2)})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        kv_scales(source, 2)


def test_kv_scales_in_some_layers_only(tmp_path: Path) -> None:
    source = with_scales(tmp_path / "m", {"1.self_attn.kv_scale": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.0.self_attn.kv_scale' is missing, other layers"):
        kv_scales(source, 2)
