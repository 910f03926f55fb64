"""DeepCompressor dumps and other pickles: codes are recovered, damaged and hostile files are refused."""

import copy
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.formats import dumps
from omniserve.formats.artifact import read_linear
from omniserve.formats.checkpoint import FolderSource, open_checkpoint
from omniserve.formats.pickles import PickleSource, load, weight_files
from omniserve.formats.translated import Translated
from omniserve.formats.w4a8 import unpack_columns
from omniserve.models.families import check_tensors, family, linears
from tests.tiny import tiny_model

SHAPE: dict[str, object] = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 256, "tied": False}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def save(value: object, path: Path, **keywords: Any) -> None:
    torch.save(value, path, **keywords)


def kept(path: Path) -> dict[str, Any]:
    """A pickle's content in memory: one that is mapped must not be written to."""
    return copy.deepcopy(load(path))


def read_all(folder: Path) -> None:
    source = opened(folder)
    for tensor in sorted(source.names()):
        source.tensor(tensor)


def quantized(
    w: Tensor, kind: str, generation: str, signed: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Quantize as the tools do (formats.md section 7): (fp16 weights of the dump, scales by key, truth).

    The truth is codes and offsets: w = codes * step - offset, in steps of the row scale for g128.
    """
    n = w.shape[0]
    low = -8 if signed else 0
    if kind == "w8":
        row = (w.abs().amax(1, keepdim=True) / 127).half().float()
        q = (w / row).round().clamp(-127, 127)
        return (q * row).half(), {"scale.0": row.view(n, 1, 1, 1).half()}, {"codes": q}
    if kind == "row":
        high, least = w.amax(1, keepdim=True).clamp(min=0), w.amin(1, keepdim=True).clamp(max=0)
        row = ((high - least) / 15).half().float()
        if generation == "v0.0":
            z = (-least / row).round() + low
            q = (w / row + z).round().clamp(low, low + 15)
            dense, offset = (q - z) * row, (z - low) * row
        else:
            z = (-least + low * row).half().float()
            q = ((w + z) / row).round().clamp(low, low + 15)
            dense, offset = q * row - z, z - low * row
        truth = {"codes": q - low, "zero": offset}
        return dense.half(), {"scale.0": row.view(n, 1, 1, 1).half(), **zeros(z.view(n, 1, 1, 1), generation)}, truth
    row = (w.abs().amax(1, keepdim=True) / 119).half().float()
    u = (w / row).clamp(-119, 119).view(n, -1, 128)
    high, least = u.amax(-1, keepdim=True).clamp(min=0), u.amin(-1, keepdim=True).clamp(max=0)
    step = ((high - least) / 15).round().clamp(1, 127)
    if generation == "v0.0":
        z = (-least / step).round().clamp(0, 15) + low
        q = (u / step + z).round().clamp(low, low + 15)
        level1, offset = (q - z) * step, (z - low) * step
    else:
        z = (-least).round() + low * step
        q = ((u + z) / step).round().clamp(low, low + 15)
        level1, offset = q * step - z, z - low * step
    keys = {
        "scale.0": row.view(n, 1, 1, 1).half(),
        "scale.1": step.view(n, 1, -1, 1).half(),
        **zeros(z.view(n, 1, -1, 1), generation),
    }
    truth = {"codes": (q - low).view(n, -1), "group_scale": step[..., 0], "group_zero": offset[..., 0]}
    return (level1.view(n, -1) * row).half(), keys, truth


def zeros(z: Tensor, generation: str) -> dict[str, Tensor]:
    return {"zero" if generation == "v0.0" else "scaled_zero": z.half()}


def dump(
    folder: Path, kind: str, generation: str, *, signed: bool = False, static: bool = False, config: bool = True
) -> dict[str, dict[str, Tensor]]:
    """Write the dump of a tiny model and return the truth of each linear."""
    model = tiny_model(folder.with_name(folder.name + "-original"), **SHAPE)  # type: ignore[arg-type]
    source = FolderSource(model)
    tensors = {name: source.tensor(name).half() for name in source.names()}
    scales, truth = {}, {}
    for module in linears(family(source.config).spec(source.config)):
        dense, keys, truth[module] = quantized(tensors[f"{module}.weight"].float(), kind, generation, signed)
        tensors[f"{module}.weight"] = dense
        scales |= {f"{module}.weight.{key}": tensor for key, tensor in keys.items()}
    folder.mkdir()
    save(tensors, folder / "model.pt")
    save(scales, folder / "scale.pt")
    if static:
        acts: dict[str, object] = {"model.layers.0.mlp.down_proj.input": {"x": 1}}
        for layer in (0, 1):
            for place, most in (("k_rotary_emb", 12.7 + layer), ("v_proj", 2.54)):
                found = torch.tensor([[most]])
                acts[f"model.layers.{layer}.self_attn.{place}.output"] = (
                    {"dynamic_range.0.max": found} if generation == "v0.0" else {"dynamic_range": [{"max": found}]}
                )
        save(acts, folder / "acts.pt")
    if config:
        (folder / "config.json").write_text((model / "config.json").read_text())
    return truth


def opened(folder: Path) -> Translated:
    config = json.loads((folder / "config.json").read_text())
    spec = family(config).spec(config)
    found = dumps.translate(folder, config, spec)
    check_tensors(found, spec)
    return found


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("generation", ["v0.0", "v0.1"])
@pytest.mark.parametrize("kind", ["row", "g128"])
def test_codes_are_recovered(kind: str, generation: str, signed: bool, tmp_path: Path) -> None:
    truth = dump(tmp_path / "d", kind, generation, signed=signed)
    assert dumps.is_dump(tmp_path / "d")
    source = opened(tmp_path / "d")
    assert source.scheme.weights == f"w4a8-{kind}"
    assert source.scheme.precision.kv == "kv4"
    assert generation in source.origin
    for module, known in truth.items():
        stored = read_linear(source, source.scheme, module)
        assert torch.equal(unpack_columns(stored["codes"]).float(), known["codes"]), module
        assert stored["scale"].dtype == torch.float16
        if kind == "g128":
            assert torch.equal(stored["group_scale"].float(), known["group_scale"])
            assert torch.equal(stored["group_zero"].float(), known["group_zero"])
        else:
            assert torch.equal(stored["zero"], known["zero"][:, 0])
        dense = source.scheme.form(module).dense(stored, torch.float64)
        file = load(tmp_path / "d" / "model.pt")[f"{module}.weight"]
        assert isinstance(file, Tensor)
        assert float((dense - file.double()).abs().max()) < 2e-3 * float(file.abs().max())


def test_int8_dumps_and_static_scales(tmp_path: Path) -> None:
    for generation in ("v0.0", "v0.1"):
        truth = dump(tmp_path / generation, "w8", generation, static=True)
        source = opened(tmp_path / generation)
        assert (source.scheme.weights, source.scheme.kv.static) == ("w8a8", True)
        assert torch.equal(source.tensor(f"{Q}.codes").float(), truth[Q]["codes"])
        scale = source.tensor("model.layers.1.self_attn.kv_scale")
        assert torch.allclose(scale, torch.tensor([[13.7, 13.7], [2.54, 2.54]]) / 127)


Files = Callable[[dict[str, Any], dict[str, Any]], object]


def put(name: str, at: tuple[int, ...], value: float, file: int = 0) -> Files:
    def change(*files: dict[str, Any]) -> None:
        files[file][name][at] = value

    return change


BAD: dict[str, tuple[str, str, Files, str]] = {
    "other generation": (
        "g128",
        "v0.1",
        lambda model, scale: [
            scale.update({key.replace("scaled_zero", "zero"): scale.pop(key)}) for key in list(scale) if "_zero" in key
        ],
        "a dump of generation v0.1 whose zeros are named as those of v0.0?",
    ),
    "both generations": (
        "row",
        "v0.0",
        lambda model, scale: scale.update({f"{Q}.weight.scaled_zero": scale[f"{Q}.weight.zero"]}),
        f"'{Q}.weight' has zeros of both generations",
    ),
    "mixed generations": (
        "row",
        "v0.0",
        lambda model, scale: scale.update({f"{Q}.weight.scaled_zero": scale.pop(f"{Q}.weight.zero")}),
        "holds zeros of both generations, `zero` and `scaled_zero`",
    ),
    "off the grid": (
        "row",
        "v0.1",
        put(f"{Q}.weight", (3, 3), 0.1234),
        f"tensor '{Q}.weight' is not on the grid of its scales, one weight is off by",
    ),
    "off the inner grid": ("g128", "v0.0", put(f"{Q}.weight", (3, 3), 0.05), f"tensor '{Q}.weight' is not on the grid"),
    "NaN weight": ("w8", "v0.0", put(f"{Q}.weight", (3, 3), float("nan")), "is not on the grid"),
    "NaN scale": ("row", "v0.0", put(f"{Q}.weight.scale.0", (3, 0, 0, 0), float("nan"), 1), "is no tensor of finite"),
    "scale 0": ("row", "v0.0", put(f"{Q}.weight.scale.0", (3, 0, 0, 0), 0.0, 1), "must be one positive number for"),
    "group scale": (
        "g128",
        "v0.0",
        put(f"{Q}.weight.scale.1", (3, 0, 0, 0), 1.5, 1),
        "q_proj.weight.scale.1 holds other values than the whole numbers 1 to 17",
    ),
    "no row scale": ("row", "v0.0", lambda m, s: s.pop(f"{Q}.weight.scale.0"), "q_proj.weight.scale.0 is missing"),
    "no zero": ("g128", "v0.1", lambda m, s: s.pop(f"{Q}.weight.scaled_zero"), "scale.1 is there, but no zero"),
    "no weight": ("row", "v0.1", lambda m, s: m.pop(f"{Q}.weight"), f"tensor '{Q}.weight' is missing"),
    "no scales": ("row", "v0.1", lambda m, s: s.clear(), "holds no scales"),
    "group size 64": (
        "g128",
        "v0.0",
        lambda m, s: s.update({f"{DOWN}.weight.scale.1": s[f"{DOWN}.weight.scale.1"].repeat(1, 1, 2, 1)}),
        "down_proj.weight.scale.1 has 4 groups for 256 columns; expected groups of 128",
    ),
    "rows": ("row", "v0.0", lambda m, s: s.update({f"{Q}.weight.scale.0": torch.ones(5)}), "has shape [5]"),
    "bfloat16": (
        "g128",
        "v0.0",
        lambda m, s: m.update({f"{Q}.weight": m[f"{Q}.weight"].bfloat16()}),
        "is bfloat16, whose 8 bits cannot tell the codes of two levels apart",
    ),
    "int8 weights": (
        "w8",
        "v0.0",
        lambda m, s: m.update({f"{Q}.weight": torch.ones(128, 128, dtype=torch.int8)}),
        "is torch.int8 [128, 128], not a matrix of floats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_dumps_that_are_refused(name: str, tmp_path: Path) -> None:
    kind, generation, change, message = BAD[name]
    folder = tmp_path / "d"
    dump(folder, kind, generation)
    files = [kept(folder / file) for file in ("model.pt", "scale.pt")]
    change(*files)
    for file, content in zip(("model.pt", "scale.pt"), files, strict=True):
        save(content, folder / file)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_all(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda acts: acts.pop("model.layers.1.self_attn.v_proj.output"), "v_proj.output' is missing, other layers"),
        (lambda acts: acts.update({"model.layers.1.self_attn.v_proj.output": {"min": 1}}), "holds no maximum"),
        (
            lambda acts: acts["model.layers.1.self_attn.v_proj.output"].update({"dynamic_range.0.max": torch.zeros(1)}),
            "has the maximum 0.0, which must be positive",
        ),
    ],
)  # fmt: skip
def test_ranges_that_are_refused(change: Callable[[dict[str, object]], object], message: str, tmp_path: Path) -> None:
    dump(tmp_path / "d", "w8", "v0.0", static=True)
    acts = kept(tmp_path / "d" / "acts.pt")
    change(acts)
    save(acts, tmp_path / "d" / "acts.pt")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        opened(tmp_path / "d")


def test_ranges_of_other_places_are_no_static_scales(tmp_path: Path) -> None:
    dump(tmp_path / "d", "w8", "v0.0")
    save({"model.layers.0.mlp.down_proj.input": {"a": torch.ones(1)}}, tmp_path / "d" / "acts.pt")
    assert not opened(tmp_path / "d").scheme.kv.static


class Evil:
    """Runs a command when it is unpickled without care."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.touched}",)


def test_pickles_that_hold_code_are_refused_and_do_not_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for keywords in ({}, {"_use_new_zipfile_serialization": False}):
        save({"w": torch.ones(2), "x": Evil(touched)}, tmp_path / "m.bin", **keywords)
        with pytest.raises(CheckpointError, match=r"holds more than tensors and plain containers \(posix.system\)"):
            load(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(pickle.dumps(Evil(touched)))
    with pytest.raises(CheckpointError, match=r"m\.bin: "):
        load(tmp_path / "m.bin")
    assert not touched.exists()


def test_pickles_that_are_damaged(tmp_path: Path) -> None:
    file = tmp_path / "m.bin"
    save({"w": torch.randn(100, 100)}, file)
    whole = file.read_bytes()
    for keep in (0, 1, 10, 100, len(whole) // 2, len(whole) - 5):
        file.write_bytes(whole[:keep])
        with pytest.raises(
            CheckpointError, match=r"damaged or truncated, or no pickle of tensors|cannot be read"
        ) as caught:
            load(file)
        assert "\n" not in str(caught.value)
    save([torch.ones(1)], file)
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary of named tensors"):
        load(file)
    with pytest.raises(CheckpointError, match="is missing"):
        load(tmp_path / "none.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


def test_pickles_of_weights(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    save(parts[0], folder / "pytorch_model-00001-of-00002.bin")
    save(parts[1], folder / "pytorch_model-00002-of-00002.bin", _use_new_zipfile_serialization=False)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
        save({"x": 1}, folder / name)
    source = PickleSource(folder, {})
    assert source.names() == tensors.keys()
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(CheckpointError, match="tensor 'x' is missing"):
        source.shape("x")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(parts[0], "pytorch_model-00001-of-00002.bin")}))
    assert len(weight_files(folder)) == 1
    index.write_text(json.dumps({"weight_map": {"a": "gone.bin"}}))
    with pytest.raises(CheckpointError, match=r"gone.bin is missing, pytorch_model.bin.index.json names it"):
        weight_files(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../m.bin"}}))
    with pytest.raises(CheckpointError, match="weight_map must map tensors to files of this folder"):
        weight_files(folder)
    index.unlink()
    save(parts[0], folder / "again.pt")
    with pytest.raises(CheckpointError, match="is in two files"):
        PickleSource(folder, {})
    save({"x": torch.eye(2).to_sparse()}, folder / "again.pt")
    with pytest.raises(CheckpointError, match="tensor 'x' is not an ordinary tensor"):
        PickleSource(folder, {})
    save({"state_dict": parts[0]}, folder / "again.pt")
    with pytest.raises(CheckpointError, match="'state_dict' is a dict, not a tensor"):
        PickleSource(folder, {})


def test_serving_opens_no_pickle(tmp_path: Path) -> None:
    dump(tmp_path / "d", "row", "v0.1")
    with pytest.raises(CheckpointError, match=r"holds weights as a pickle only .* run `omniserve convert "):
        open_checkpoint(tmp_path / "d")
