"""Whole models from quantized checkpoints: the same logits as rounding at load, bit for bit, whatever the layout."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniserve.base.config import DtypeName, Options
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.base.types import PAGE
from omniserve.engine.build import Built, build
from omniserve.formats.artifact import KVScheme, Scheme
from omniserve.formats.kv import KVFormat, LayerPages, kv_format
from omniserve.models.families import family, linears
from tests.model.test_transformers import SHAPES, greedy, score
from tests.tiny import tiny_model
from tests.unit.test_artifact import artefact, describe, rewrite
from tests.unit.test_imports import AWQ, GPTQ, awq, gptq, packed
from tests.unit.test_legacy import SHAPE, published

FAMILIES = ("gqa", "biases", "mha-untied", "mixtral", "qwen2", "qwen2-moe", "qwen3", "qwen3-moe")
FORMATS = {"w4a8-g128": ("w4a8", 128), "w4a8-row": ("w4a8", -1), "w8a8": ("w8a8", 128), "w16a16": ("w16a16", 128)}
IDS = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(2)).tolist()


def opened(path: Path, precision: str = "auto", dtype: DtypeName | None = None, group: int | None = None) -> Built:
    options = Options(precision=precision, group_size=group, max_num_batched_tokens=64, max_num_seqs=4)
    return build(path, options, dtype=dtype)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_artefact_is_rounding_at_load(name: str, form: str, tmp_path: Path) -> None:
    shape = dict(SHAPES[name])
    weight, group = FORMATS[form]
    bits = {"w4a8": 4, "w8a8": 8, "w16a16": 16}[weight]
    dense = tiny_model(tmp_path / "dense", **shape)  # type: ignore[arg-type]
    stored = artefact(tmp_path / "stored", Scheme(weights=form, kv=KVScheme(bits=bits)), **shape)  # type: ignore[arg-type]
    built = opened(stored)
    assert (built.config.precision.name, built.config.precision.group) == (f"{weight}kv{bits}", group)
    at_load = opened(dense, f"{weight}kv{bits}", group=group)
    assert torch.equal(score(built, IDS), score(at_load, IDS))
    assert built.plan.weight_bytes == at_load.plan.weight_bytes


@pytest.mark.parametrize("form", ["w4a8-g128", "w4a8-row", "w8a8"])
def test_a_published_folder_is_our_artefact(form: str, tmp_path: Path) -> None:
    theirs, stored = published(tmp_path / "theirs", form, config={"attention_bias": True})
    tensors = load_file(theirs / "model.safetensors")
    packed_names = {f"{module}.{suffix}" for module in stored for suffix in ("qweight", "weight", "dequant_scale")}
    plain = {name: t for name, t in tensors.items() if name not in packed_names and ".s1_" not in name}
    plain = {name: t for name, t in plain.items() if ".s2_" not in name}
    ours = {f"{module}.{name}": t for module, found in stored.items() for name, t in found.items()}
    folder = tiny_model(tmp_path / "ours", **SHAPE, config={"attention_bias": True})  # type: ignore[arg-type]
    save_file(plain | ours, folder / "model.safetensors")
    bits = 8 if form == "w8a8" else 4
    describe(folder, Scheme(weights=form, kv=KVScheme(bits=bits), made_by={"calibration": {"by": "us"}}))
    mine, yours = opened(folder), opened(theirs)
    assert torch.equal(score(yours, IDS), score(mine, IDS))
    assert yours.config.precision == mine.config.precision
    assert yours.plan.rounding == "calibrated"
    assert mine.warnings == ()
    assert len(yours.warnings) == (1 if form == "w8a8" else 2)


def test_static_scales_are_used_unless_other_kv_is_asked_for(tmp_path: Path) -> None:
    folder, _ = published(tmp_path / "m", "w8a8", static=True)
    for word, static in (("auto", True), ("w8a8kv8", True), ("w8a8kv4", False), ("w8a8kv16", False)):
        built = opened(folder, word)
        pages = built.runner.stores[0][0]
        assert isinstance(pages, LayerPages)
        assert pages.format.static == static
        assert len(greedy(built, [IDS[:70]], 4)[0]) == 4


@pytest.mark.parametrize(
    ("form", "wrong", "right"),
    [
        ("w4a8-row", ["w8a8kv4", "w16a16kv16"], ["w4a8kv8", "w4a8kv16", "w4a8"]),
        ("w8a8", ["w4a8kv4"], ["w8a8kv4", "w8a8kv16"]),
    ],
)
def test_users_change_kv_alone(form: str, wrong: list[str], right: list[str], tmp_path: Path) -> None:
    folder = artefact(tmp_path / "m", Scheme(weights=form, kv=KVScheme(bits=8)))
    for word in right:
        assert opened(folder, word).config.precision.group == FORMATS[form][1]
    for word in wrong:
        with pytest.raises(ConfigError, match="the checkpoint holds"):
            opened(folder, word)
    if form == "w4a8-row":
        return
    grouped = artefact(tmp_path / "g", Scheme(weights="w4a8-g128"))
    with pytest.raises(ConfigError, match="holds w4a8kv8 g128 weights, which cannot be served as w4a8kv4 per channel"):
        opened(grouped, "w4a8kv4", group=-1)
    row = artefact(tmp_path / "r", Scheme(weights="w4a8-row"))
    for word in ("auto", "w4a8kv4"):
        with pytest.raises(ConfigError, match="the checkpoint holds w4a8kv8 per channel weights"):
            opened(row, word, group=128)


def test_warnings_tell_calibrated_from_rounded(tmp_path: Path) -> None:
    rounded = Scheme(weights="w4a8-g128", kv=KVScheme(bits=4))
    made = replace(rounded, made_by={"calibration": {"tokens": 1}})
    first = opened(artefact(tmp_path / "a", rounded))
    assert [word for word in ("rounded to nearest without calibration", "fidelity") if word in first.warnings[0]]
    assert first.plan.rounding == "to nearest, stored"
    second = opened(artefact(tmp_path / "b", made))
    assert (second.warnings, second.plan.rounding) == ((), "calibrated")
    wide = artefact(tmp_path / "c", replace(made, weights="w8a8", kv=KVScheme(bits=8)))
    assert opened(wide).warnings == ()
    assert "4-bit KV without calibration" in opened(wide, "w8a8kv4").warnings[0]
    assert opened(tiny_model(tmp_path / "d"), "w8a8kv8").plan.rounding == "to nearest at load"


MIXED = Scheme(
    weights="w4a8-g128",
    overrides={"model.layers.0.mlp.down_proj": "w8a8", "model.layers.1.self_attn.o_proj": "w4a8-row"},
    keep=("model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
)


def test_formats_of_single_linears(tmp_path: Path) -> None:
    built = opened(artefact(tmp_path / "m", MIXED, tied=False), "w4a8kv16")
    first, second = built.runner.model.blocks
    assert [type(part).__name__ for part in (first.mlp.gate_up, first.mlp.down)] == ["DenseWeight", "Int8Weight"]  # type: ignore[union-attr]
    assert type(second.attention.out).__name__ == "Uint4Weight"
    exact = opened(tiny_model(tmp_path / "d", tied=False), "w16a16kv16")
    near = torch.corrcoef(torch.stack([score(built, IDS).flatten(), score(exact, IDS).flatten()]))[0, 1]
    assert near > 0.75


def test_fused_linears_share_a_format(tmp_path: Path) -> None:
    q = "model.layers.1.self_attn.q_proj"
    folder = artefact(tmp_path / "m", replace(MIXED, overrides={q: "w8a8"}))
    with pytest.raises(CheckpointError, match=rf"'{q}' is w8a8 and 'model.layers.1.self_attn.k_proj' is w4a8-g128"):
        opened(folder)


def test_experts_share_their_activations(tmp_path: Path) -> None:
    experts = "model.layers.0.block_sparse_moe.experts"
    shape = SHAPES["mixtral"]
    other = replace(MIXED, keep=(), overrides={f"{experts}.1.{name}": "w8a8" for name in ("w1", "w3")})
    assert score(opened(artefact(tmp_path / "m", other, **shape)), IDS[:9]).isfinite().all()  # type: ignore[arg-type]
    mixed = replace(other, overrides={f"{experts}.1.{name}": "w4a8-row" for name in ("w1", "w3")})
    folder = artefact(tmp_path / "n", mixed, **shape)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"the experts of {experts} want their input as int8 and as int8.sum"):
        opened(folder)


@pytest.mark.parametrize("tool", ["awq", "gptq"])
def test_other_tools_folders_are_served(tool: str, tmp_path: Path) -> None:
    """The logits are those of the weights that the file means, as near as A8 and g128 allow."""
    block, pack = {"awq": (AWQ, awq), "gptq": (GPTQ | {"desc_act": True}, gptq)}[tool]
    folder, made = packed(tmp_path / "m", block, pack, shuffled=("down_proj",) if tool == "gptq" else ())
    built = opened(folder, "w4a8kv16")
    assert built.config.precision.label == "w4a8kv16 g128"
    plain = tiny_model(tmp_path / "d", **SHAPE)  # type: ignore[arg-type]

    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {f"{module}.weight": linear.dense.float() for module, linear in made.items()}

    exact = opened(rewrite(plain, change), "w16a16kv16")
    near = torch.corrcoef(torch.stack([score(built, IDS).flatten(), score(exact, IDS).flatten()]))[0, 1]
    assert near > 0.99
    assert built.warnings == ()


def with_means(folder: Path, bits: int, offset: float, given: bool) -> Path:
    """A model whose keys have a mean that no rotation moves: its base is so large that angles vanish."""
    means = {f"model.layers.{i}.self_attn.key_mean": torch.full((2, 16), offset).half() for i in (0, 1)}
    scheme = Scheme(weights="w16a16" if bits == 16 else "w8a8", kv=KVScheme(bits=bits, key_mean=given))  # type: ignore[arg-type]
    config: dict[str, object] = {"attention_bias": True, "rope_theta": 1e30}
    path = artefact(folder, scheme, means if given else None, config=config)

    def change(tensors: dict[str, Tensor]) -> None:
        ramp = torch.linspace(0.5, 1.5, 16).repeat(2) * offset
        ramp[::8] = 0  # the one pair of dims that turns by a radian at each position
        for layer in (0, 1):
            tensors[f"model.layers.{layer}.self_attn.k_proj.bias"] = ramp.clone()
            if given:
                tensors[f"model.layers.{layer}.self_attn.key_mean"] = ramp.view(2, 16).half().clone()

    return rewrite(path, change)


def test_the_mean_of_keys_changes_no_attention(tmp_path: Path) -> None:
    """Softmax does not see a shift of all scores of a query: float64, pages of fp32 numbers."""
    plain = opened(with_means(tmp_path / "a", 16, 2.0, False), "w16a16kv32", dtype="float64")
    less = opened(with_means(tmp_path / "b", 16, 2.0, True), "w16a16kv32", dtype="float64")
    assert (score(plain, IDS) - score(less, IDS)).abs().max() < 1e-4
    assert greedy(plain, [IDS[:70]], 8) == greedy(less, [IDS[:70]], 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_mean_of_keys_spares_their_codes(bits: int, tmp_path: Path) -> None:
    exact = score(opened(with_means(tmp_path / "a", 8, 20.0, False), "w8a8kv16"), IDS)
    plain, less = (
        score(opened(with_means(tmp_path / name, bits, 20.0, given)), IDS)
        for name, given in (("b", False), ("c", True))
    )
    assert (less - exact).norm() < 0.7 * (plain - exact).norm()


@pytest.mark.parametrize("kv", [kv_format("kv4"), kv_format("kv8"), kv_format("kv8", static=True), kv_format("kv16")])
def test_pages_hold_keys_less_their_mean(kv: KVFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 80, 3, 64, generator=generator)
    mean = torch.randn(3, 64, generator=generator).half()
    scale = torch.full((2, 3), 0.05) if kv.static else None

    def pages(key_mean: Tensor | None) -> LayerPages:
        return LayerPages(torch.zeros(3, 3, kv.page_bytes(64), dtype=torch.uint8), kv, 64, scale, key_mean)

    less, plain = pages(mean), pages(None)
    slots = torch.arange(80)
    less.write(slots, k, v)
    plain.write(slots, k - mean.float(), v)
    assert torch.equal(less.pages, plain.pages)
    less.write(slots, k.bfloat16(), v.bfloat16())
    plain.write(slots, k.bfloat16().float() - mean.float(), v.bfloat16().float())
    assert torch.equal(less.pages, plain.pages)
    with pytest.raises(AssertionError, match=r"key_mean is \[64\]; not \[3, 64\]"):
        pages(mean[0])


def test_a_head_of_its_own_wins_over_the_config(tmp_path: Path) -> None:
    """A rotated model has one, whatever `tie_word_embeddings` says."""
    folder = artefact(tmp_path / "m", Scheme(weights="w8a8"), tied=False)
    untied = score(opened(folder), IDS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(score(opened(folder), IDS), untied)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    assert not torch.equal(score(opened(folder), IDS), untied)


def test_the_description_names_what_is_there(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "m", Scheme(weights="w4a8-row"))
    spec = family(json.loads((folder / "config.json").read_text())).spec(
        json.loads((folder / "config.json").read_text())
    )
    assert len(linears(spec)) == 14
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.zero"))
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.1.mlp.up_proj.zero' is missing"):
        opened(folder)
    assert PAGE == 64
