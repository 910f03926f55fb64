"""AWQ, GPTQ and compressed-tensors against packers of their own: loops over the published bit layouts."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.formats.artifact import read_linear
from omniserve.formats.checkpoint import open_checkpoint
from omniserve.formats.imports import translated
from omniserve.formats.imports.packed import keep_codes
from omniserve.formats.table import FORMATS
from omniserve.formats.translated import Translated, described_config
from omniserve.formats.w4a8 import W4A8, unpack_columns
from omniserve.models.families import check_tensors, family, linears
from tests.tiny import tiny_model

SHAPE: dict[str, object] = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 256, "tied": False}
Q, GATE, UP, DOWN = (
    f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Known:
    """A linear whose codes are known: w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = order[k]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor

    @property
    def dense(self) -> Tensor:
        return (self.codes.double() - self.zeros.double()[:, self.order]) * self.scales.double()[:, self.order]


def known(n: int, k: int, *, group: int, seed: int, zeros: str = "any", shuffled: bool = False, bits: int = 4) -> Known:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group < 0 else -(-k // group)
    top = 1 << bits
    middle = top // 2
    order = torch.zeros(k, dtype=torch.int64) if group < 0 else torch.arange(k) // group
    if shuffled:
        order = order[torch.randperm(k, generator=generator)]
    drawn = torch.randint(3, 13, (n, groups), generator=generator)
    return Known(
        codes=torch.randint(0, top, (n, k), generator=generator),
        scales=(0.01 * (1 + torch.rand(n, groups, generator=generator))).half(),
        zeros=drawn if zeros == "any" else torch.full((n, groups), middle),
        order=order,
    )


def word(nibbles: list[int], bits: int = 4) -> int:
    """The int32 of unsigned fields, the first one in the lowest bits."""
    value = sum(nibble << (bits * place) for place, nibble in enumerate(nibbles))
    return value - (1 << 32) if value >= 1 << 31 else value


def words_of_columns(x: Tensor, order: tuple[int, ...] = tuple(range(8)), bits: int = 4) -> Tensor:
    """[R, C] -> int32 [R, C * bits / 32]."""
    per = 32 // bits
    rows = []
    for row in x.tolist():
        row += [0] * (-len(row) % per)
        rows.append([word([row[j + place] for place in order[:per]], bits) for j in range(0, len(row), per)])
    return torch.tensor(rows, dtype=torch.int32)


def awq(linear: Known) -> dict[str, Tensor]:
    return {
        "qweight": words_of_columns(linear.codes.T, AWQ_ORDER),
        "qzeros": words_of_columns(linear.zeros.T, AWQ_ORDER),
        "scales": linear.scales.T.contiguous(),
    }


def gptq(linear: Known, *, first: bool = True) -> dict[str, Tensor]:
    return {
        "qweight": words_of_columns(linear.codes).T.contiguous(),
        "qzeros": words_of_columns(linear.zeros.T - (1 if first else 0)),
        "scales": linear.scales.T.contiguous(),
        "g_idx": linear.order.to(torch.int32),
    }


def compressed(linear: Known, *, bits: int = 4, zeros: bool = False, order: bool = False) -> dict[str, Tensor]:
    made = {
        "weight_packed": words_of_columns(linear.codes, bits=bits),
        "weight_scale": linear.scales.bfloat16(),
        "weight_shape": torch.tensor(linear.codes.shape, dtype=torch.int32),
    }
    if zeros:
        made["weight_zero_point"] = words_of_columns(linear.zeros.T, bits=bits).T.contiguous()
    if order:
        made["weight_g_idx"] = linear.order.to(torch.int32)
    return made


Pack = Callable[[Known], Mapping[str, Tensor]]


def packed(
    folder: Path,
    block: dict[str, object] | None,
    pack: Pack,
    *,
    group: int = 128,
    zeros: str = "any",
    bits: int = 4,
    shuffled: tuple[str, ...] = (),
    **shape: object,
) -> tuple[Path, dict[str, Known]]:
    """A tiny model whose linears have known codes, packed; `shuffled` ones have their columns in disorder."""
    tiny_model(folder, **SHAPE | shape)  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    if block is not None:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    tensors = load_file(folder / "model.safetensors")
    made = {}
    for seed, (module, (n, k)) in enumerate(linears(family(config).spec(config)).items()):
        tensors.pop(f"{module}.weight")
        mixed = module.endswith(shuffled) if shuffled else False
        made[module] = known(n, k, group=group, seed=seed, zeros=zeros, bits=bits, shuffled=mixed)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in pack(made[module]).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder, made


def opened(folder: Path) -> Translated:
    source = open_checkpoint(folder)
    spec = family(source.config).spec(source.config)
    found = translated(source, spec)
    assert isinstance(found, Translated)
    check_tensors(found, spec)
    return found


def dense(source: Translated, module: str) -> Tensor:
    return source.scheme.form(module).dense(read_linear(source, source.scheme, module), torch.float64)


def loss(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).pow(2).sum() / wanted.pow(2).sum())


AWQ: dict[str, object] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}


def weights(**changes: object) -> dict[str, object]:
    """A compressed-tensors block."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128} | changes
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


GROUPED: dict[str, tuple[dict[str, object], Pack, str]] = {
    "awq": (AWQ, awq, "any"),
    "gptq v1": (GPTQ, gptq, "any"),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda linear: gptq(linear, first=False), "any"),
    "gptq symmetric": (GPTQ | {"sym": True}, gptq, "middle"),
    "gptq symmetric, v2 called v1": (GPTQ | {"sym": True}, lambda linear: gptq(linear, first=False), "middle"),
    "compressed": (weights(), compressed, "middle"),
    "compressed, zeros": (weights(symmetric=False), lambda linear: compressed(linear, zeros=True), "any"),
}


@pytest.mark.parametrize("name", GROUPED)
def test_codes_of_groups_are_kept(name: str, tmp_path: Path) -> None:
    block, pack, zeros = GROUPED[name]
    folder, made = packed(tmp_path / "m", block, pack, zeros=zeros)
    source = opened(folder)
    assert source.scheme.weights == "w4a8-g128"
    assert source.rounded == ()
    assert source.scheme.calibrated
    assert source.scheme.precision.kv == "kv8"
    for module, linear in made.items():
        stored = read_linear(source, source.scheme, module)
        assert torch.equal(unpack_columns(stored["codes"]).long(), linear.codes), module
        scale, group_scale = stored["scale"].double()[:, None], stored["group_scale"].double()
        given = linear.scales.bfloat16() if "compressed" in name else linear.scales
        assert bool(((group_scale * scale - given.double()).abs() <= 0.5001 * scale).all()), module
        assert torch.equal(stored["group_zero"].long(), linear.zeros * stored["group_scale"].long())
        if "compressed" not in name:
            assert source.losses.get(module, 0.0) == pytest.approx(loss(dense(source, module), linear.dense), rel=1e-3)
            assert source.losses.get(module, 0.0) < 2e-3
    several = {module for module, linear in made.items() if linear.scales.shape[1] > 1}
    assert several <= source.losses.keys()
    described = described_config(source)["quantization_config"]
    assert isinstance(described, dict)
    assert described["made_by"]["relative_squared_error"].keys() == source.losses.keys()


CHANNEL: dict[str, tuple[dict[str, object], Pack, str]] = {
    "awq": (AWQ | {"group_size": -1}, awq, "any"),
    "gptq": (GPTQ | {"group_size": -1}, gptq, "any"),
    "compressed": (weights(strategy="channel", group_size=None), compressed, "middle"),
    "compressed, zeros": (
        weights(strategy="channel", group_size=None, symmetric=False),
        lambda linear: compressed(linear, zeros=True),
        "any",
    ),
}


@pytest.mark.parametrize("name", CHANNEL)
def test_one_scale_for_each_row_is_exact(name: str, tmp_path: Path) -> None:
    block, pack, zeros = CHANNEL[name]
    folder, made = packed(tmp_path / "m", block, pack, group=-1, zeros=zeros)
    source = opened(folder)
    assert source.scheme.weights == "w4a8-row"
    for module, linear in made.items():
        if "compressed" in name:
            linear.scales = linear.scales.bfloat16()
        assert torch.equal(dense(source, module), linear.dense), module
    assert source.losses == {}


def test_shapes_of_int64(tmp_path: Path) -> None:
    """What compressed-tensors really writes; the other tests take int32."""

    def pack(linear: Known) -> dict[str, Tensor]:
        return compressed(linear) | {"weight_shape": torch.tensor(linear.codes.shape)}

    folder, made = packed(tmp_path / "m", weights(), pack, zeros="middle")
    stored = read_linear(source := opened(folder), source.scheme, Q)
    assert torch.equal(unpack_columns(stored["codes"]).long(), made[Q].codes)


@pytest.mark.parametrize("plain", [False, True])
def test_eight_bits_for_each_row_are_exact(plain: bool, tmp_path: Path) -> None:
    block = weights(num_bits=8, strategy="channel", group_size=None)
    if plain:
        block["format"] = "int-quantized"

    def pack(linear: Known) -> dict[str, Tensor]:
        if not plain:
            return compressed(linear, bits=8)
        return {"weight": (linear.codes - 128).to(torch.int8), "weight_scale": linear.scales}

    folder, made = packed(tmp_path / "m", block, pack, group=-1, zeros="middle", bits=8)
    source = opened(folder)
    assert (source.scheme.weights, source.losses) == ("w8a8", {})
    for module, linear in made.items():
        codes = read_linear(source, source.scheme, module)["codes"]
        assert torch.equal(codes.long(), linear.codes - 128)


def test_a_tensor_wide_scale_is_one_for_each_row(tmp_path: Path) -> None:
    block = weights(num_bits=8, strategy="tensor", group_size=None) | {"format": "int-quantized"}
    folder, made = packed(
        tmp_path / "m",
        block,
        lambda linear: {
            "weight": (linear.codes - 128).to(torch.int8),
            "weight_scale": torch.tensor([0.02]),
            "input_scale": torch.tensor([0.5]),
        },
        group=-1,
        bits=8,
    )
    source = opened(folder)
    assert torch.equal(dense(source, Q), (made[Q].codes - 128).double() * torch.tensor(0.02).double())
    assert "14 tensors" in source.notes[0]
    assert "quantized dynamically" in source.notes[0]


@pytest.mark.parametrize("size", [32, 64])
def test_small_groups_are_rounded_again(size: int, tmp_path: Path) -> None:
    folder, made = packed(tmp_path / "m", AWQ | {"group_size": size}, awq, group=size)
    source = opened(folder)
    assert len(source.rounded) == len(made)
    assert f"{len(made)} of {len(made)} linears" in source.notes[0]
    assert not source.scheme.calibrated
    assert loss(dense(source, Q), made[Q].dense) == pytest.approx(source.losses[Q], rel=1e-3)
    assert 1e-4 < source.losses[Q] < 0.02


def test_larger_groups_are_split(tmp_path: Path) -> None:
    folder, made = packed(tmp_path / "m", AWQ | {"group_size": 256}, awq, group=256, hidden=256, head_dim=64)
    source = opened(folder)
    assert source.rounded == ()
    stored = read_linear(source, source.scheme, DOWN)
    assert torch.equal(unpack_columns(stored["codes"]).long(), made[DOWN].codes)
    assert torch.equal(stored["group_scale"][:, 0], stored["group_scale"][:, 1])


ORDERED = {
    "gptq": (GPTQ | {"desc_act": True}, gptq, "any"),
    "compressed": (weights(actorder="group"), lambda linear: compressed(linear, order=True), "middle"),
}


@pytest.mark.parametrize("name", ORDERED)
def test_act_order_of_down_folds_into_gate_and_up(name: str, tmp_path: Path) -> None:
    """Rows of gate and up are permuted with the columns of down: the product is what it was, codes are kept."""
    block, pack, zeros = ORDERED[name]
    folder, made = packed(tmp_path / "m", block, pack, zeros=zeros, shuffled=("down_proj",))
    source = opened(folder)
    assert source.rounded == ()
    order = torch.argsort(made[DOWN].order, stable=True)
    codes = {module: unpack_columns(read_linear(source, source.scheme, module)["codes"]).long() for module in made}
    assert torch.equal(codes[DOWN], made[DOWN].codes[:, order])
    for module in (GATE, UP):
        assert torch.equal(codes[module], made[module].codes[order])
    assert torch.equal(codes[Q], made[Q].codes)
    x = torch.randn(128, generator=torch.Generator().manual_seed(0)).double()
    wanted = made[DOWN].dense @ (torch.relu(made[GATE].dense @ x) * (made[UP].dense @ x))
    got = dense(source, DOWN) @ (torch.relu(dense(source, GATE) @ x) * (dense(source, UP) @ x))
    assert float((got - wanted).norm() / wanted.norm()) < 0.05


def test_act_order_of_experts_and_of_biased_and_plain_feeders(tmp_path: Path) -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    block = GPTQ | {"desc_act": True}
    folder, made = packed(tmp_path / "m", block, gptq, shuffled=("w2",), model_type="mixtral", config=experts)
    source = opened(folder)
    assert source.rounded == ()
    w2 = "model.layers.0.block_sparse_moe.experts.1.w2"
    order = torch.argsort(made[w2].order, stable=True)
    w3 = w2.replace("w2", "w3")
    stored = read_linear(source, source.scheme, w3)
    assert torch.equal(unpack_columns(stored["codes"]).long(), made[w3].codes[order])

    folder, made = packed(tmp_path / "n", block, gptq, shuffled=("down_proj",), config={"mlp_bias": True})
    tensors = load_file(folder / "model.safetensors")
    plain = torch.arange(256.0)[:, None].repeat(1, 128)
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"{GATE}.{suffix}")
    tensors[f"{GATE}.weight"] = plain
    tensors[f"{UP}.bias"] = torch.arange(256.0)
    save_file(tensors, folder / "model.safetensors")
    source = opened(folder)
    order = torch.argsort(made[DOWN].order, stable=True)
    assert torch.equal(source.tensor(f"{GATE}.weight")[:, 0], order.float())
    assert torch.equal(source.tensor(f"{UP}.bias"), order.float())
    assert source.scheme.keep == (GATE,)


def test_act_order_elsewhere_is_rounded_again(tmp_path: Path) -> None:
    folder, made = packed(tmp_path / "m", GPTQ | {"desc_act": True}, gptq, shuffled=("proj",), hidden=256, head_dim=64)
    source = opened(folder)
    kept = {module for module in made if module.endswith("down_proj")}
    assert set(source.rounded) == set(made) - kept
    assert f"{len(made) - 2} of {len(made)} linears" in source.notes[0]
    assert loss(dense(source, Q), made[Q].dense) == pytest.approx(source.losses[Q], rel=1e-3)
    order = torch.argsort(made[DOWN].order, stable=True)
    got, wanted = dense(source, GATE), made[GATE].dense[order]
    assert loss(got, wanted) == pytest.approx(source.losses[GATE], rel=1e-3)
    assert source.losses[GATE] < 0.02


def test_biases_of_zeros_that_no_model_wants_are_dropped(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path / "m", GPTQ, gptq)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"{DOWN}.bias": torch.zeros(128), f"{Q}.bias": torch.zeros(128)}, folder / "model.safetensors")
    assert not any(name.endswith(".bias") for name in opened(folder).names())
    save_file(tensors | {f"{DOWN}.bias": torch.ones(128)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj.bias' is no part of a llama model"):
        opened(folder)
    folder, _ = packed(tmp_path / "n", GPTQ, gptq, config={"attention_bias": True})
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"{Q}.bias": torch.zeros(128)}, folder / "model.safetensors")
    assert f"{Q}.bias" in opened(folder).names()


@pytest.mark.parametrize(
    ("name", "content", "pack"),
    [
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True}, awq),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "sym": False, "desc_act": False}, gptq),
    ],
)
def test_descriptions_of_early_tools(name: str, content: dict[str, object], pack: Pack, tmp_path: Path) -> None:
    folder, made = packed(tmp_path / "m", None, pack)
    with pytest.raises(CheckpointError, match=r"holds packed weights \(.qweight\), but config.json has no"):
        opened(folder)
    (folder / name).write_text(json.dumps(content))
    stored = read_linear(source := opened(folder), source.scheme, Q)
    assert torch.equal(unpack_columns(stored["codes"]).long(), made[Q].codes)


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({name: tensor})


def scale_of(value: float, name: str = f"{Q}.scales") -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    return change


PLAIN = weights(num_bits=8, strategy="channel", group_size=None) | {"format": "int-quantized"}
BAD: dict[str, tuple[dict[str, object], Pack, Callable[[dict[str, Tensor]], object] | None, str]] = {
    "bits": (AWQ | {"bits": 3}, awq, None, "quantization_config: bits=3: must be 4"),
    "gemv": (AWQ | {"version": "gemv"}, awq, None, "version='gemv': must be gemm"),
    "no zeros": (AWQ | {"zero_point": False}, awq, None, "zero_point=False: must be True"),
    "group type": (AWQ | {"group_size": "128"}, awq, None, "group_size='128': must be -1 or more"),
    "wrong group": (AWQ | {"group_size": 64}, awq, None, "has 2 groups for 256 columns, but quantization_config says"),
    "no scales": (AWQ, awq, drop(f"{Q}.scales"), f"tensor '{Q}.scales' is missing"),
    "NaN scale": (AWQ, awq, scale_of(float("nan")), f"tensor '{Q}.scales' holds scales that are not positive"),
    "scale 0": (GPTQ, gptq, scale_of(0.0), f"tensor '{Q}.scales' holds scales that are not positive"),
    "zeros' shape": (AWQ, awq, put(f"{Q}.qzeros", torch.zeros(1, 3, dtype=torch.int32)), "qzeros' is int32 [1, 3]"),
    "codes' type": (AWQ, awq, put(f"{Q}.qweight", torch.zeros(128, 16)), "qweight' is float32 [128, 16]; expected"),
    "head": (
        AWQ,
        awq,
        put("lm_head.qweight", torch.zeros(128, 8, dtype=torch.int32)),
        "'lm_head' is quantized, this version keeps it in 16 bit",
    ),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, gptq, None, "checkpoint_format='marlin': must be gptq or"),
    "unsymmetric": (GPTQ | {"sym": True}, gptq, None, "holds several zeros, although the config says sym=true"),
    "zero 15": (
        GPTQ,
        gptq,
        put(f"{Q}.qzeros", torch.full((1, 16), -1, dtype=torch.int32)),
        "holds the zero 15 of a v1 file, which means 0 to some readers and 16 to others",
    ),
    "group beyond": (
        GPTQ,
        gptq,
        put(f"{Q}.g_idx", torch.full((128,), 3, dtype=torch.int32)),
        f"tensor '{Q}.g_idx' names groups 3 to 3, there are 1",
    ),
    "fp8": (weights(type="float", num_bits=8), compressed, None, "weights of 8 bits, type 'float': must be int of 4"),
    "2 bits": (weights(num_bits=2), compressed, None, "weights of 2 bits"),
    "block": (weights(strategy="block"), compressed, None, "strategy='block', group_size=128: must be channel"),
    "format": (weights() | {"format": "marlin-24"}, compressed, None, "format='marlin-24': must be pack-quantized or"),
    "no groups": (weights() | {"config_groups": [1]}, compressed, None, "config_groups must be an object of objects"),
    "no weights": (weights() | {"config_groups": {"a": {}}}, compressed, None, "a.weights is missing"),
    "online": (
        weights() | {"transform_config": {"config_groups": {"R3": {"apply": [{"location": "attn_q"}]}}}},
        compressed,
        None,
        "transform 'R3' is applied at 'attn_q', while the model runs",
    ),
    "shape": (
        weights(),
        compressed,
        put(f"{Q}.weight_shape", torch.tensor([128, 1000], dtype=torch.int32)),
        "which packs no [128, 1000] of 4 or 8 bits",
    ),
    "zero point of int8": (
        PLAIN,
        lambda linear: {
            "weight": linear.codes.to(torch.int8),
            "weight_scale": torch.ones(len(linear.codes), 1),
            "weight_zero_point": torch.ones(len(linear.codes), 1, dtype=torch.int8),
        },
        None,
        "8-bit weights must be symmetric",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_refused(name: str, tmp_path: Path) -> None:
    block, pack, change, message = BAD[name]
    folder, _ = packed(tmp_path / "m", block, pack, group=-1 if pack is BAD["zero point of int8"][1] else 128)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        opened(folder).tensor(f"{Q}.codes")


def test_merged_rotations_need_nothing(tmp_path: Path) -> None:
    place = [{"location": "weight_input"}, {"location": "weight_output", "inverse": True}]
    block = weights() | {"transform_config": {"config_groups": {"R1": {"apply": place}}}}
    assert opened(packed(tmp_path / "m", block, compressed, zeros="middle")[0]).rounded == ()


def test_other_methods_are_refused(tmp_path: Path) -> None:
    for method in ("bitsandbytes", ["awq"], None):
        source = open_checkpoint(
            tiny_model(tmp_path / str(method), claims={"quantization_config": {"quant_method": method}})
        )
        spec = family(source.config).spec(source.config)
        if method is None:
            with pytest.raises(CheckpointError, match="quantized by None, this version reads omniserve"):
                check_tensors(translated(source, spec), spec)
            continue
        with pytest.raises(CheckpointError, match="this version reads omniserve, qoq, awq, gptq, compressed-tensors"):
            translated(source, spec)


def test_sixteen_bit_checkpoints_are_left_alone(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "m"))
    assert translated(source, family(source.config).spec(source.config)) is source


@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 128, 192, 384]), st.sampled_from([1.0, 0.1, 1e-4]))
def test_kept_codes_are_legal_and_near(seed: int, k: int, spread: float) -> None:
    """Whatever the zeros and however far the scales of a row lie apart: all codes decode into int8."""
    generator = torch.Generator().manual_seed(seed)
    n, groups = 4, -(-k // 128)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = 0.02 * spread ** torch.rand(n, groups, generator=generator)
    zeros = torch.randint(0, 16, (n, groups), generator=generator)
    stored = keep_codes(codes, scales, zeros)
    scale, zero = stored["group_scale"].int(), stored["group_zero"].int()
    assert int(scale.amin()) >= 1
    assert int(scale.amax()) <= 17
    assert bool(((zero <= 128) & (15 * scale - zero <= 127)).all())
    wide = (x.double().repeat_interleave(128, 1)[:, :k] for x in (zeros, scales))
    w = (codes.double() - next(wide)) * next(wide)
    got = W4A8(128).dense(stored, torch.float64)
    assert loss(got, w) < 0.02
    small = (scales / stored["scale"].float()[:, None] < 0.5).repeat_interleave(128, 1)[:, :k]
    assert torch.equal(unpack_columns(stored["codes"])[~small], codes[~small])
    step = stored["scale"].double()[:, None] * 0.5001
    assert bool(((got - w).abs() <= step)[small].all())


def test_keeping_codes_beats_rounding_again() -> None:
    """On top of the source's own error, which is what the first number is."""
    w = torch.randn(96, 512, generator=torch.Generator().manual_seed(0))
    w = w * torch.exp(0.3 * torch.randn(96, 4, generator=torch.Generator().manual_seed(1))).repeat_interleave(128, 1)
    grouped = w.view(96, 4, 128)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = (high - low) / 15
    zeros = (-low / scales).round().long()
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15).to(torch.uint8)
    source = ((codes - zeros[..., None]) * scales[..., None]).view(96, 512)
    g128 = FORMATS["w4a8-g128"]
    kept = g128.dense(keep_codes(codes.view(96, 512), scales, zeros))
    again = g128.dense(g128.from_dense(source))
    first, second, third = (float((x - w).pow(2).sum() / w.pow(2).sum()) for x in (source, kept, again))
    assert second < 1.08 * first
    assert third > 1.15 * first
