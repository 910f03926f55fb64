"""Weight formats: what is stored, what it means, and products against the dense weights in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.formats.table import FORMATS, weight_format
from omniserve.formats.w4a8 import GROUP, W4A8, expand, group_grid, pack_columns, unpack_columns
from omniserve.formats.w16a16 import gemm_w16a16, onednn_works, pack
from omniserve.formats.weight import WeightFormat
from omniserve.ops.act import Act, ActFormat, Both, Int8, Plain, quantize
from omniserve.ops.dispatch import force_reference
from omniserve.ops.glu import silu_mul
from omniserve.ops.integer import int_matmul

ALL = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
QUANTIZED = pytest.mark.parametrize("form", [f for f in FORMATS.values() if f.name != "w16a16"], ids=lambda f: f.name)
ROW, G128 = W4A8(None), W4A8(128)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(n: int, k: int, seed: int = 0) -> Tensor:
    """Weights with rows of different size and outliers, as models have them."""
    w = random(n, k, seed=seed).float() * torch.linspace(0.01, 0.2, n)[:, None]
    w[:, k // 3] *= 4
    return w


def values(x: Act) -> Tensor:
    """What quantized activations mean, in float64."""
    return x.x.double() if isinstance(x, Plain) else x.codes.double() * x.scale.double()


def with_dtype(x: Act, dtype: torch.dtype) -> Act:
    return x.of(dtype) if isinstance(x, Int8) else Plain(x.x.to(dtype))


@pytest.fixture(params=["chosen", "reference"])
def both_paths(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "chosen":
        yield
    else:
        with force_reference():
            yield


def test_formats_by_precision() -> None:
    assert [weight_format("w4a8", group).name for group in (128, -1)] == ["w4a8-g128", "w4a8-row"]
    assert weight_format("w8a8").wants is ActFormat.INT8
    assert weight_format("w16a16", -1).wants is ActFormat.PLAIN
    assert (ROW.wants, G128.wants) == (ActFormat.INT8_SUM, ActFormat.INT8)
    with pytest.raises(ConfigError, match="group size 64"):
        weight_format("w4a8", 64)
    with pytest.raises(ConfigError, match="w3a8"):
        weight_format("w3a8")


@ALL
@pytest.mark.parametrize(("n", "k"), [(192, 576), (5, 64), (33, 1536), (7, 130), (1, 2)])
def test_stored_tensors_are_those_of_fields(form: WeightFormat, n: int, k: int) -> None:
    stored = form.from_dense(weights(n, k))
    fields = form.fields(n, k)
    assert stored.keys() == fields.keys()
    for name, field in fields.items():
        assert tuple(stored[name].shape) == field.shape
        assert stored[name].dtype in (field.dtype, *field.also)


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_taken(form: WeightFormat, dtype: torch.dtype) -> None:
    w = weights(16, 192).to(dtype)
    dense = form.dense(form.from_dense(w))
    assert dense.dtype == torch.float32
    limit = {"w16a16": 1e-7, "w8a8": 0.02, "w4a8-row": 0.2, "w4a8-g128": 0.18}[form.name]
    assert float((dense - w.float()).norm() / w.float().norm()) < limit


@QUANTIZED
def test_error_is_within_half_a_step(form: WeightFormat) -> None:
    """Of w8a8 everywhere; of 4 bits where the search did not clip."""
    w = weights(64, 576)
    stored = form.from_dense(w)
    error = (form.dense(stored, torch.float64) - w.double()).abs()
    step = stored["scale"].double()[:, None]
    codes = stored["codes"] if form.name == "w8a8" else unpack_columns(stored["codes"])
    inner = torch.ones_like(w, dtype=torch.bool) if form.name == "w8a8" else (codes > 0) & (codes < 15)
    if form.name == "w4a8-g128":
        step = step * (stored["group_scale"].double().repeat_interleave(GROUP, 1)[:, :576])
    assert (error <= 0.5001 * step)[inner].all()


@QUANTIZED
def test_degenerate_rows(form: WeightFormat) -> None:
    w = torch.zeros(6, 192)
    w[1] = 0.25
    w[2] = -0.25
    w[3, 7] = 1.0
    w[4] = 1e-9
    w[5] = torch.linspace(1.0, 1.001, 192)
    stored = form.from_dense(w)
    dense = form.dense(stored, torch.float64)
    assert torch.isfinite(dense).all()
    assert (stored["scale"] > 0).all()
    assert not dense[0].any()
    assert float((dense - w.double()).abs().max()) < 0.01


@QUANTIZED
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(form: WeightFormat, bad: float) -> None:
    w = weights(4, 64)
    w[2, 5] = bad
    with pytest.raises(CheckpointError, match="NaN, infinity"):
        form.from_dense(w)


@pytest.mark.parametrize("form", [ROW, G128], ids=lambda f: f.name)
def test_the_search_never_loses_to_plain_rounding(form: W4A8, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(48, 704)
    searched = (form.dense(form.from_dense(w)) - w).pow(2)
    monkeypatch.setattr("omniserve.formats.w4a8.RATIOS", (1.0,))
    plain = (form.dense(form.from_dense(w)) - w).pow(2)
    if form is G128:
        plain, searched = (e[:, :640].unflatten(1, (5, 128)) for e in (plain, searched))
    before, after = plain.sum(-1), searched.sum(-1)
    assert (after <= before * 1.0001 + 1e-9).all()
    assert float(after.sum()) < 0.95 * float(before.sum())


def test_rows_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(20, 320)
    for form in (ROW, G128):
        whole = form.from_dense(w)
        monkeypatch.setattr("omniserve.formats.w4a8.CHUNK", 640)
        for name, tensor in form.from_dense(w).items():
            assert torch.equal(tensor, whole[name]), name
        monkeypatch.undo()


def test_a_short_last_group_is_searched_over_its_own_columns() -> None:
    w = weights(8, 576)
    w[:, 512:] = w[:, 512:].abs() + 0.1  # all positive: zeros appended to it would have errors of their own
    doubled = torch.cat([w, w[:, 512:]], 1)  # the same columns as a full group
    short, full = G128.from_dense(w), G128.from_dense(doubled)
    assert short["group_scale"].shape == (8, 5)
    for name in ("scale", "group_scale", "group_zero"):
        assert torch.equal(short[name], full[name]), name


def test_nibbles() -> None:
    codes = torch.randint(0, 16, (6, 34), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_columns(codes)
    assert packed.shape == (6, 17)
    assert int(packed[2, 3]) == int(codes[2, 6]) + 16 * int(codes[2, 7])
    assert torch.equal(unpack_columns(packed), codes)


def decoded_ends(limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, zero and the values of codes 0 and 15 for all ranges in steps of 1/8 within ±limit that include 0."""
    high = torch.arange(0, limit * 8 + 1, dtype=torch.float64) / 8
    scale, zero = group_grid(*torch.broadcast_tensors(-high[:, None], high))
    return scale, zero, -zero, 15 * scale - zero


def test_all_codes_of_every_group_decode_into_int8() -> None:
    """qoq.md section 5, item 4."""
    scale, zero, lowest, highest = decoded_ends(119)
    assert (int(zero.min()), int(zero.max())) == (0, 119)
    assert int(scale.min()) == 1
    assert int(scale.max()) * 15 <= 255
    assert int(scale.max()) <= 17
    assert int(lowest.min()) >= -128
    assert int(highest.max()) <= 127
    # At 120 the law breaks: this is why level-1 values are kept within 119.
    assert int(decoded_ends(120)[3].max()) == 128


def test_eight_bit_wraparound_equals_wide_arithmetic() -> None:
    """Kernels compute (q * s2 - z2) mod 256; for all legal (q, s2, z2) that is the int8 of the wide value."""
    q, s, z = torch.meshgrid(torch.arange(16), torch.arange(1, 18), torch.arange(129), indexing="ij")
    wide = q * s - z
    legal = (15 * s - z <= 127) & (z <= 128)
    narrow = (q.to(torch.uint8) * s.to(torch.uint8) - z.to(torch.uint8)).view(torch.int8)
    assert torch.equal(narrow[legal].long(), wide[legal])


def test_groups_expand_to_the_level_one_values() -> None:
    stored = G128.from_dense(weights(24, 576))
    codes = unpack_columns(stored["codes"]).double()
    scale, zero = (stored[f"group_{p}"].double().repeat_interleave(128, 1)[:, :576] for p in ("scale", "zero"))
    level1 = expand(unpack_columns(stored["codes"]), stored["group_scale"], stored["group_zero"])
    assert torch.equal(level1.double(), codes * scale - zero)
    assert torch.equal(G128.dense(stored, torch.float64), level1.double() * stored["scale"].double()[:, None])
    assert torch.equal(G128.dense(stored).double(), G128.dense(stored, torch.float64))  # 8 + 11 bits: exact in fp32


def test_groups_that_leave_int8_are_refused() -> None:
    stored = G128.from_dense(weights(4, 128))
    stored["group_scale"][1, 0], stored["group_zero"][1, 0] = 17, 0
    with pytest.raises(CheckpointError, match="range of int8"):
        G128.bind(stored, bias=None, dtype=torch.float32)


@ALL
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("both_paths")
def test_product_equals_that_of_the_dense_weights(form: WeightFormat, bias: bool, dtype: torch.dtype) -> None:
    n, k = 192, 576
    stored = form.from_dense(weights(n, k))
    b = random(n, seed=2).float() if bias else None
    bound = form.bind(stored, bias=b, dtype=dtype)
    assert bound.shape == (n, k)
    assert bound.wants is form.wants
    for tokens in (1, 2, 7, 70):
        x = with_dtype(quantize(random(tokens, k, seed=tokens).to(dtype), form.wants), dtype)
        y = bound.gemm(x)
        assert y.shape == (tokens, n)
        assert y.dtype == dtype
        dense = form.dense(stored, torch.float64)
        if form.name == "w16a16":
            dense, b = dense.to(dtype).double(), None if b is None else b.to(dtype)
        exact = values(x) @ dense.T + (0 if b is None else b.double())
        size = values(x).abs() @ dense.abs().T + 1
        limit = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}[dtype]
        assert float(((y.double() - exact).abs() / size).max()) < limit


@ALL
@pytest.mark.parametrize(("n", "k"), [(192, 64), (576, 576), (192, 1536), (50, 130)])
@pytest.mark.usefixtures("both_paths")
def test_padding_is_invisible(form: WeightFormat, n: int, k: int) -> None:
    stored = form.from_dense(weights(n, k))
    bias = random(n, seed=3).float()
    plain = form.bind(stored, bias=bias, dtype=torch.float32)
    padded = form.bind(stored, bias=bias, dtype=torch.float32, align=128)
    assert padded.shape == plain.shape == (n, k)
    x = quantize(random(5, k, seed=4).float(), form.wants)
    got, expected = padded.gemm(x), plain.gemm(x)
    assert got.shape == (5, n)
    if form.name == "w16a16":  # float sums over 576 and 640 columns may differ in their order
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, expected)


@ALL
def test_nan_beside_the_real_columns_is_never_seen(form: WeightFormat) -> None:
    """Padded columns of the producer's buffer hold NaN before it ran; sums and products do not know them."""
    stored = form.from_dense(weights(192, 576))
    bound = form.bind(stored, bias=None, dtype=torch.float32, align=128)
    buffer = torch.full((3, 640), float("nan"))
    buffer[:, :576] = random(3, 576).float()
    got = bound.gemm(quantize(buffer[:, :576], form.wants))
    assert torch.equal(got, bound.gemm(quantize(buffer[:, :576].contiguous(), form.wants)))
    assert torch.isfinite(got).all()


@QUANTIZED
@pytest.mark.usefixtures("both_paths")
def test_a_token_does_not_depend_on_its_batch(form: WeightFormat) -> None:
    bound = form.bind(form.from_dense(weights(96, 1536)), bias=random(96).float(), dtype=torch.float32)
    x = random(33, 1536).float()
    whole = bound.gemm(quantize(x, form.wants))
    for token in range(33):
        assert torch.equal(bound.gemm(quantize(x[token : token + 1], form.wants)), whole[token : token + 1])


@ALL
def test_concatenated_linears_give_the_concatenated_outputs(form: WeightFormat) -> None:
    parts = [form.from_dense(weights(n, 192, seed=n)) for n in (64, 10, 33)]
    x = quantize(random(3, 192).float(), form.wants)
    fused = form.bind(form.concat(parts), bias=None, dtype=torch.float32)
    assert fused.shape == (107, 192)
    separate = torch.cat([form.bind(p, bias=None, dtype=torch.float32).gemm(x) for p in parts], 1)
    assert torch.allclose(fused.gemm(x), separate, rtol=1e-5, atol=1e-6)


@ALL
@pytest.mark.parametrize("wants", list(ActFormat))
@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gate_up_silu(form: WeightFormat, wants: ActFormat, align: int, dtype: torch.dtype) -> None:
    """codes come from silu * up of the product as computed, before any rounding to the model's dtype."""
    stored = form.from_dense(weights(2 * 100, 192))
    bound = form.bind(stored, bias=None, dtype=dtype, align=align)
    x = with_dtype(quantize(random(4, 192).to(dtype), form.wants), dtype)
    expected = silu_mul(bound.gemm(x))
    got = bound.gate_up_silu(x, wants)
    assert got.dtype == dtype
    if wants is ActFormat.PLAIN:
        assert isinstance(got, Plain)
        assert torch.equal(got.x, expected.to(dtype))
        return
    codes = quantize(expected, wants)
    if isinstance(got, Both):
        assert isinstance(codes, Both)
        assert torch.equal(got.plain.x, expected.to(dtype))
        got, codes = got.int8, codes.int8
    assert isinstance(got, Int8)
    assert isinstance(codes, Int8)
    assert got.codes.shape == (4, 100)
    assert torch.equal(got.codes, codes.codes)
    assert torch.equal(got.scale, codes.scale)
    assert (got.sum is None) == (not wants.sums)


def test_silu_mul() -> None:
    x = random(3, 20)
    gate, up = x[:, :10], x[:, 10:]
    assert torch.allclose(silu_mul(x), gate / (1 + torch.exp(-gate)) * up, rtol=1e-14)
    assert silu_mul(x.bfloat16()).dtype == torch.float32


def test_row_form_multiplies_unsigned_codes_and_subtracts_the_zero_times_the_sum() -> None:
    stored = ROW.from_dense(weights(16, 64))
    x = quantize(random(2, 64).float(), ActFormat.INT8_SUM)
    assert isinstance(x, Int8)
    assert x.sum is not None
    acc = int_matmul(x.codes, unpack_columns(stored["codes"]).to(torch.int8)).double()
    a, scale, zero = x.scale.double(), stored["scale"].double(), stored["zero"].double()
    y = acc * scale * a - zero * (a * x.sum)
    assert torch.allclose(ROW.bind(stored, bias=None, dtype=torch.float64).gemm(x.of(torch.float64)), y, rtol=1e-12)


def test_activations_of_another_kind_or_size_are_a_programmers_mistake() -> None:
    row = ROW.bind(ROW.from_dense(weights(8, 64)), bias=None, dtype=torch.float32)
    with pytest.raises(AssertionError, match="no sums"):
        row.gemm(quantize(torch.zeros(1, 64), ActFormat.INT8))
    with pytest.raises(AssertionError, match="Plain"):
        row.gemm(Plain(torch.zeros(1, 64)))
    with pytest.raises(AssertionError, match=r"\[T, 64\]"):
        row.gemm(quantize(torch.zeros(1, 66), ActFormat.INT8_SUM))


@ALL
def test_bytes_held(form: WeightFormat) -> None:
    """4-bit codes take a byte on the CPU, and say so."""
    bound = form.bind(form.from_dense(weights(128, 256)), bias=torch.zeros(128), dtype=torch.float32)
    per_row = {"w16a16": 1, "w8a8": 2, "w4a8-row": 3, "w4a8-g128": 2}[form.name]
    assert bound.nbytes == 128 * 256 * (4 if form.name == "w16a16" else 1) + 128 * 4 * per_row


@QUANTIZED
def test_foreign_tensors_are_refused_with_their_names(form: WeightFormat) -> None:
    good = form.from_dense(weights(8, 256))

    def refused(t: dict[str, Tensor], match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            form.bind(t, bias=None, dtype=torch.float32)

    refused({k: v for k, v in good.items() if k != "scale"}, "without scale")
    refused(good | {"zeros": good["scale"]}, "unknown zeros")
    refused({k: v for k, v in good.items() if k != "codes"}, "codes")
    refused(good | {"scale": good["scale"][:-1]}, r"scale .*\[7\]; expected .*\[8\]")
    refused(good | {"codes": good["codes"].float()}, "codes .*float32")


def test_an_odd_number_of_columns_does_not_fit_four_bits() -> None:
    for form in (ROW, G128):
        with pytest.raises(CheckpointError, match="65 columns"):
            form.from_dense(weights(4, 65))


def test_packed_dense_weights_multiply_as_plain_ones() -> None:
    w, bias = random(300, 200).float(), random(300, seed=1).float()
    packed = pack(w)
    assert packed.is_mkldnn == onednn_works()
    for tokens in (0, 1, 2, 5, 9, 64, 200):
        x = random(tokens, 400, seed=tokens).float()[:, ::2]
        expected = x.double() @ w.double().T + bias.double()
        for form in (w, packed):
            assert torch.allclose(gemm_w16a16(x, form, bias, x.dtype).double(), expected, atol=1e-4, rtol=1e-5)
            with force_reference():
                assert torch.allclose(gemm_w16a16(x, form, bias, x.dtype).double(), expected, atol=1e-4, rtol=1e-5)
    assert not pack(w.double()).is_mkldnn
