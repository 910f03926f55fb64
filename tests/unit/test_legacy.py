"""The published QServe layout, against a packer of its own: loops over the formulas of formats.md sections 3 to 5."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.artifact import KVScheme, Scheme, scheme_of
from omniserve.formats.checkpoint import FolderSource, Source, open_checkpoint
from omniserve.formats.imports import translated
from omniserve.formats.legacy import Export, natural_channels, pack_tiles, permute_channels, unpack_tiles
from omniserve.formats.table import FORMATS
from omniserve.formats.translated import Translated, described_config
from omniserve.formats.w4a8 import W4A8, unpack_columns
from omniserve.formats.w8a8 import Int8Weight
from omniserve.formats.writer import write_folder
from omniserve.models.families import check_tensors, family, linears
from tests.tiny import tiny_model
from tests.unit.test_artifact import artefact


def place(n: int, k: int, columns: int) -> tuple[int, int]:
    """Byte and shift of a code in a published qweight."""
    i, row = divmod(n, 32)
    j, column = divmod(k, 32)
    a, b, c = row // 16, row // 8 % 2, row % 8
    d, e, f = column // 16, column // 4 % 4, column % 4
    return (i * (columns // 32) + j) * 512 + 64 * c + 16 * e + 8 * d + 4 * b + f, 4 * a


def pack(codes: Tensor) -> Tensor:
    n, k = codes.shape
    raw = bytearray(n * k // 2)
    for row, values in enumerate(codes.tolist()):
        for column, code in enumerate(values):
            byte, shift = place(row, column, k)
            raw[byte] |= code << shift
    return torch.frombuffer(raw, dtype=torch.uint8).view(torch.int8).reshape(n, k // 2).clone()


def position(n: int) -> int:
    return 32 * (n // 32) + 4 * (n % 8) + n % 32 // 8


def by_group(values: Tensor) -> Tensor:
    """Parameters [N, G] of whole numbers, modulo 256, as published [G, N]."""
    made = torch.zeros(values.shape[1], values.shape[0], dtype=torch.uint8)
    for n, row in enumerate(values.tolist()):
        for group, value in enumerate(row):
            made[group, position(n)] = value % 256
    return made.view(torch.int8)


def publish(form: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors of a linear, by suffix."""
    if form == "w8a8":
        return {"weight": stored["codes"], "dequant_scale": stored["scale"]}
    made = {"qweight": pack(unpack_columns(stored["codes"])), "s1_scales": stored["scale"]}
    if form == "w4a8-row":
        return made | {"s1_szeros": stored["zero"]}
    scale, zero = by_group(stored["group_scale"].long()), by_group(-stored["group_zero"].long())
    return made | {"s2_scales": scale, "s2_zeros": zero}


SHAPE: dict[str, object] = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 256, "tied": False}
FORMS = ("w4a8-row", "w4a8-g128", "w8a8")


def published(
    folder: Path, form: str, *, static: bool = False, block: dict[str, object] | None = None, **shape: object
) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A tiny model in the published layout, and the stored tensors of its linears."""
    tiny_model(folder, **SHAPE | shape)  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    if block is not None:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    stored = {}
    for module in linears(family(config).spec(config)):
        stored[module] = FORMATS[form].from_dense(tensors.pop(f"{module}.weight"))
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in publish(form, stored[module]).items()}
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name] = torch.ones_like(tensors[name])
    if static:
        for layer in (0, 1):
            tensors[f"model.layers.{layer}.self_attn.kv_scale_quant_orig"] = torch.tensor([0.05 + layer, 0.02])
    save_file(tensors, folder / "model.safetensors")
    return folder, stored


def opened(folder: Path) -> tuple[Translated, ModelSpec]:
    source = open_checkpoint(folder)
    spec = family(source.config).spec(source.config)
    found = translated(source, spec)
    assert isinstance(found, Translated)
    check_tensors(found, spec)
    return found, spec


def numbers(*shape: int, top: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize(("n", "k"), [(32, 32), (64, 128), (96, 256), (32, 384)])
def test_tiles(n: int, k: int) -> None:
    codes = numbers(n, k)
    assert torch.equal(pack_tiles(codes), pack(codes))
    assert torch.equal(unpack_tiles(pack(codes)), codes)


def test_golden_tile() -> None:
    """One 32 x 32 tile, code (n, k) = (3 n + 5 k) mod 16, its first and last bytes worked out by hand.

    Byte 0 is n = 0 and 16, k = 0: codes 0 and 48 % 16 = 0. Byte 1 (f = 1): k = 1, codes 5 and 5. Byte 4 (b = 1):
    n = 8 and 24, codes 24 % 16 = 8 and 72 % 16 = 8. Byte 8 (d = 1): k = 16, codes 80 % 16 = 0. Byte 16 (e = 1): k = 4,
    20 % 16 = 4. Byte 64 (c = 1): n = 1 and 17, codes 3 and 51 % 16 = 3. Byte 511: n = 15 and 31, k = 31: 200 % 16 = 8.
    """
    n, k = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    packed = pack_tiles(((3 * n + 5 * k) % 16).to(torch.uint8)).view(torch.uint8).flatten().tolist()
    assert packed[:20] == [
        0x00, 0x55, 0xAA, 0xFF, 0x88, 0xDD, 0x22, 0x77, 0x00, 0x55, 0xAA, 0xFF, 0x88, 0xDD, 0x22, 0x77, 0x44, 0x99,
        0xEE, 0x33,
    ]  # fmt: skip
    assert (packed[64], packed[511]) == (0x33, 0x88)
    high = pack_tiles(((n // 16) * 15).to(torch.uint8)).view(torch.uint8)
    assert bool((high == 0xF0).all())


@pytest.mark.parametrize(("n", "groups"), [(32, 1), (96, 3)])
def test_channels_of_the_second_level(n: int, groups: int) -> None:
    values = numbers(n, groups, top=256)
    assert torch.equal(permute_channels(values).view(torch.int8), by_group(values.long()))
    assert torch.equal(natural_channels(permute_channels(values)), values)


def test_wrap_around_law() -> None:
    """For every legal code, scale and zero, int8((q * s2 + s2_zeros) mod 256) is the wide integer q * s2 - z2."""
    q, s, z = torch.meshgrid(torch.arange(16), torch.arange(1, 18), torch.arange(256), indexing="ij")
    legal = (q * s - z >= -128) & (q * s - z <= 127)
    wrapped = ((q * s + (-z) % 256) % 256).to(torch.uint8).view(torch.int8).long()
    assert torch.equal(wrapped[legal], (q * s - z)[legal])
    assert int(legal.sum()) > 40_000


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("static", [False, True])
def test_a_published_folder_is_what_it_was_made_from(form: str, static: bool, tmp_path: Path) -> None:
    folder, stored = published(tmp_path / "m", form, static=static)
    source, spec = opened(folder)
    scheme = scheme_of(source)
    assert scheme is not None
    assert (scheme.weights, scheme.calibrated) == (form, True)
    assert scheme.kv == KVScheme(bits=8 if static or form == "w8a8" else 4, static=static)
    for module, tensors in stored.items():
        for name, tensor in tensors.items():
            assert torch.equal(source.tensor(f"{module}.{name}"), tensor), (module, name)
    assert source.losses == {}
    if static:
        scale = source.tensor("model.layers.1.self_attn.kv_scale")
        assert torch.equal(scale, torch.tensor([[1.05, 1.05], [0.02, 0.02]]))
    assert not any("quant_orig" in name for name in source.names())
    assert spec.kv_heads == 2


def test_the_kernel_sees_the_exporters_int8() -> None:
    """g128, element for element: what `bind` hands to the integer product is int8((q * s2 + s2_zeros) mod 256)."""
    form = W4A8(128)
    stored = form.from_dense(torch.randn(64, 256, generator=torch.Generator().manual_seed(3)))
    file = publish("w4a8-g128", stored)
    scale, zero = file["s2_scales"].view(torch.uint8), file["s2_zeros"].view(torch.uint8)
    raw = file["qweight"].view(torch.uint8).flatten()
    wanted = torch.zeros(64, 256, dtype=torch.int8)
    for n in range(64):
        for k in range(256):
            byte, shift = place(n, k, 256)
            q = int(raw[byte]) >> shift & 15
            value = (q * int(scale[k // 128, position(n)]) + int(zero[k // 128, position(n)])) % 256
            wanted[n, k] = value - 256 if value > 127 else value
    bound = form.bind(stored, bias=None, dtype=torch.float32)
    assert isinstance(bound, Int8Weight)
    assert torch.equal(bound.codes, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_export_and_back_is_the_identity(form: str, tmp_path: Path) -> None:
    folder, _ = published(tmp_path / "m", form, static=form == "w8a8")
    source, spec = opened(folder)
    write_folder(source, tmp_path / "ours", config=lambda: described_config(source))
    ours = open_checkpoint(tmp_path / "ours")
    scheme = scheme_of(ours)
    assert scheme is not None
    check_tensors(ours, spec)
    view = export(ours, scheme, spec, tmp_path / "theirs")
    before, after = FolderSource(folder), FolderSource(tmp_path / "theirs")
    assert before.names() == after.names()
    for name in before.names():
        assert after.dtype(name) == before.dtype(name), name
        assert torch.equal(after.tensor(name), before.tensor(name)), name
    assert after.config["quantization_config"] == {
        "quant_method": "qoq",
        "wbits": 8 if form == "w8a8" else 4,
        "group_size": 128 if form == "w4a8-g128" else -1,
    }
    again, _ = opened(tmp_path / "theirs")
    assert all(torch.equal(again.tensor(name), source.tensor(name)) for name in source.names())
    assert (view.rounded, view.notes) == (set(), ())


def export(source: Source, scheme: Scheme, spec: ModelSpec, folder: Path) -> Export:
    view = Export(source, scheme, spec, sorted(linears(spec)))
    write_folder(view, folder, config=lambda: view.config)
    return view


EXPORTS: dict[str, tuple[Scheme, dict[str, object], dict[str, Tensor], str]] = {
    "mixed": (
        Scheme(weights="w4a8-g128", overrides={"model.layers.0.mlp.down_proj": "w8a8"}),
        {},
        {},
        "'model.layers.0.mlp.down_proj' is w8a8; QServe's layout holds w4a8-row, w4a8-g128 or w8a8, one of them",
    ),
    "16 bit": (Scheme(weights="w16a16", kv=KVScheme(bits=16)), {}, {}, "is w16a16; QServe's layout holds"),
    "columns": (
        Scheme(weights="w4a8-g128"),
        {"ffn": 160},
        {},
        "'model.layers.0.mlp.down_proj' holds 128 x 160 weights; QServe's w4a8-g128 has multiples of 32 rows and of",
    ),
    "rows": (Scheme(weights="w4a8-row"), {"head_dim": 8}, {}, "holds 16 x 128 weights"),
    "scales per head": (
        Scheme(weights="w8a8", kv=KVScheme(bits=8, static=True)),
        {},
        {f"model.layers.{i}.self_attn.kv_scale": torch.tensor([[1.0, 2.0], [1.0, 1.0]]) for i in (0, 1)},
        "tensor 'model.layers.0.self_attn.kv_scale' differs between heads",
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_what_their_layout_cannot_hold(name: str, tmp_path: Path) -> None:
    scheme, shape, extra, message = EXPORTS[name]
    source = open_checkpoint(artefact(tmp_path / "m", scheme, extra, **SHAPE | shape))
    spec = family(source.config).spec(source.config)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        export(source, scheme, spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_export_leaves_out_is_said(tmp_path: Path) -> None:
    scheme = Scheme(weights="w4a8-row", kv=KVScheme(bits=4, key_mean=True))
    means = {f"model.layers.{i}.self_attn.key_mean": torch.ones(2, 32).half() for i in (0, 1)}
    folder = artefact(tmp_path / "m", scheme, means, **SHAPE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.zero"] = tensors["model.layers.0.mlp.up_proj.zero"].float() * 1.0001
    save_file(tensors, folder / "model.safetensors")
    source = open_checkpoint(folder)
    spec = family(source.config).spec(source.config)
    view = export(source, scheme, spec, tmp_path / "out")
    assert view.notes == ("the means of keys have no place in QServe's layout and were left out",)
    assert view.rounded == {"model.layers.0.mlp.up_proj"}
    opened(tmp_path / "out")


Change = Callable[[dict[str, Tensor]], object]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def resize(name: str, *shape: int) -> Change:
    return lambda t: t.update({name: torch.zeros(shape, dtype=t[name].dtype)})


BAD: dict[str, tuple[str, Change, str]] = {
    "missing scale": ("w4a8-row", lambda t: t.pop(f"{Q}.s1_scales"), f"tensor '{Q}.s1_scales' is missing"),
    "missing codes": ("w4a8-g128", lambda t: t.pop(f"{Q}.qweight"), f"tensor '{Q}.qweight' is missing"),
    "missing linear": (
        "w8a8",
        lambda t: [t.pop(f"{Q}.{name}") for name in ("weight", "dequant_scale")],
        "2 tensors ('model.layers.0.self_attn.q_proj.codes', ",
    ),
    "both kinds": ("w4a8-g128", lambda t: t.update({f"{Q}.s1_szeros": torch.ones(128)}), "q_proj.s1_szeros' is no"),
    "group size 64": ("w4a8-g128", resize(f"{DOWN}.s2_scales", 4, 128), "s2_scales' has groups of 64 columns"),
    "groups of zeros": ("w4a8-g128", resize(f"{DOWN}.s2_zeros", 1, 128), "s2_zeros' has groups of 256 columns"),
    "short scales": ("w4a8-row", resize(f"{Q}.s1_scales", 64), "s1_scales' is torch.float16 [64]; expected"),
    "odd rows": ("w4a8-row", resize(f"{Q}.qweight", 120, 64), "q_proj.qweight' holds 120 x 128 weights"),
    "scale type": (
        "w8a8",
        lambda t: t.update({f"{Q}.dequant_scale": t[f"{Q}.dequant_scale"].to(torch.int32)}),
        "dequant_scale' is torch.int32",
    ),
    "one layer's KV scale": (
        "w8a8",
        lambda t: t.update({"model.layers.0.self_attn.kv_scale_quant_orig": torch.ones(2)}),
        "model.layers.1.self_attn.kv_scale_quant_orig' is missing",
    ),
    "KV scale 0": (
        "w8a8",
        lambda t: t.update({f"model.layers.{i}.self_attn.kv_scale_quant_orig": torch.zeros(2) for i in (0, 1)}),
        "holds scales that are not positive",
    ),
    "surplus": ("w8a8", lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)}), "extra.weight' is no part"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_published_files_that_are_refused(name: str, tmp_path: Path) -> None:
    form, change, message = BAD[name]
    folder, _ = published(tmp_path / "m", form)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        opened(folder)


@pytest.mark.parametrize(
    ("form", "bits", "group", "message"),
    [
        ("w4a8-row", 4, -1, None),
        ("w4a8-g128", 4, 128, None),
        ("w8a8", 8, -1, None),
        ("w4a8-g128", 4, -1, "wbits=4, group_size=-1, but the tensors of 'model.layers.0.mlp.down_proj' are w4a8-g128"),
        ("w4a8-g128", 4, 64, "group_size=64, but the tensors"),
        ("w8a8", 4, -1, "are w8a8"),
        ("w4a8-row", "four", [], "wbits='four'"),
    ],
)
def test_the_config_is_believed_and_verified(
    form: str, bits: object, group: object, message: str | None, tmp_path: Path
) -> None:
    block = {"quant_method": "qoq", "wbits": bits, "group_size": group}
    folder, _ = published(tmp_path / "m", form, block=block)
    if message is None:
        opened(folder)
        return
    with pytest.raises(CheckpointError, match=re.escape(message)):
        opened(folder)


def test_a_config_without_tensors_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", claims={"quantization_config": {"quant_method": "qoq", "wbits": 4}})
    with pytest.raises(CheckpointError, match="no linear holds QServe's tensors"):
        opened(folder)


def test_biases_and_norms_are_read_and_doubted(tmp_path: Path) -> None:
    folder, _ = published(tmp_path / "m", "w4a8-row", config={"attention_bias": True})
    source, _ = opened(folder)
    assert source.tensor(f"{Q}.bias").shape == (128,)
    assert len(source.notes) == 2
    assert source.notes[0].startswith("8 biases were read")
    assert "1 norm weights are not 1 (model.norm.weight)" in source.notes[1]
    eight, _ = opened(published(tmp_path / "n", "w8a8")[0])
    assert eight.notes == ()


def test_linears_in_16_bit_stay(tmp_path: Path) -> None:
    folder, _ = published(tmp_path / "m", "w4a8-g128")
    tensors = load_file(folder / "model.safetensors")
    for suffix in ("qweight", "s1_scales", "s2_scales", "s2_zeros"):
        tensors.pop(f"{DOWN}.{suffix}")
    tensors[f"{DOWN}.weight"] = torch.ones(128, 256).half()
    save_file(tensors, folder / "model.safetensors")
    source, _ = opened(folder)
    assert source.scheme.keep == (DOWN,)
    assert source.scheme.form(DOWN).name == "w16a16"


@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64, 96]), st.sampled_from([128, 256, 384]))
def test_packing_round_trips(seed: int, n: int, k: int) -> None:
    codes = numbers(n, k, seed=seed)
    assert torch.equal(unpack_tiles(pack_tiles(codes)), codes)
    scales = numbers(n, k // 128, top=256, seed=seed)
    assert torch.equal(natural_channels(permute_channels(scales)), scales)
