"""Laws of the stored formats over random shapes and values."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniserve.formats.kv import kv_format, pack_halves, unpack_halves
from omniserve.formats.table import FORMATS
from omniserve.formats.w4a8 import W4A8, group_grid, nearest, pack_columns, unpack_columns
from omniserve.formats.weight import WeightFormat
from omniserve.ops.act import ActFormat, Int8, quantize
from omniserve.ops.integer import int_matmul

seeds = st.integers(0, 2**31)
forms = st.sampled_from(list(FORMATS.values()))
kv_names = st.sampled_from(["kv4", "kv8"])
scales = st.sampled_from([1e-6, 1e-3, 1.0, 40.0, 3000.0])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@given(seed=seeds, rows=st.integers(1, 9), half=st.integers(1, 90))
def test_packing_is_reversible(seed: int, rows: int, half: int) -> None:
    codes = integers(seed, 0, 16, rows, 2 * half).to(torch.uint8)
    for pack, unpack in ((pack_columns, unpack_columns), (pack_halves, unpack_halves)):
        assert torch.equal(unpack(pack(codes)), codes)
    octets = integers(seed, 0, 256, rows, half).to(torch.uint8)
    for pack, unpack in ((pack_columns, unpack_columns), (pack_halves, unpack_halves)):
        assert torch.equal(pack(unpack(octets)), octets)


@given(seed=seeds, m=st.integers(1, 9), n=st.integers(1, 40), k=st.integers(2, 3000))
def test_integer_products_are_exact(seed: int, m: int, n: int, k: int) -> None:
    x = integers(seed, -128, 128, m, k).to(torch.int8)
    w = integers(seed + 1, -128, 128, n, k).to(torch.int8)
    expected = (x.double() @ w.double().T).to(torch.int32)
    assert torch.equal(int_matmul(x, w), expected)
    assert torch.equal(int_matmul.reference(x, w), expected)


@given(name=kv_names, seed=seeds, s=st.floats(2**-14, 60000, width=16), z=st.floats(-1024, 1024, width=16))
def test_kv_codes_survive_decoding(name: str, seed: int, s: float, z: float) -> None:
    """encode(decode(c)) = c with the same scale and zero."""
    kv = kv_format(name)  # type: ignore[arg-type]
    codes = integers(seed, 0, kv.top + 1, 64).to(torch.uint8)
    params = torch.tensor([s, z], dtype=torch.float16)
    stored = pack_halves(codes) if kv.bits == 4 else codes
    x = kv.decode(stored, params, torch.float64)
    again = (x / params[0].double() + params[1].double()).round().clamp(0, kv.top).to(torch.uint8)
    assert torch.equal(again, codes)


@given(name=kv_names, seed=seeds)
def test_kv_codes_that_span_the_range_survive_a_whole_round(name: str, seed: int) -> None:
    """With a scale that is a power of two and a whole zero, encoding chooses the same scale, zero and codes again."""
    kv = kv_format(name)  # type: ignore[arg-type]
    codes = integers(seed, 0, kv.top + 1, 7, 64)
    codes[:, 0], codes[:, -1] = 0, kv.top
    zero = integers(seed + 1, 0, 2 * kv.top, 7, 1)
    step = 2.0 ** integers(seed + 2, -8, 5, 7, 1).double()
    stored, params = kv.encode(step * (codes - zero))
    assert params is not None
    assert torch.equal(params.double(), torch.cat((step, zero.double()), 1))
    assert torch.equal(unpack_halves(stored) if kv.bits == 4 else stored, codes.to(torch.uint8))


@given(name=kv_names, seed=seeds, size=scales, offset=st.floats(-50000, 50000), dim=st.sampled_from([2, 64, 80, 128]))
def test_kv_error_is_at_most_half_a_step(name: str, seed: int, size: float, offset: float, dim: int) -> None:
    kv = kv_format(name)  # type: ignore[arg-type]
    x = normal(seed, 11, dim) * size + offset
    codes, params = kv.encode(x)
    assert params is not None
    back = kv.decode(codes, params, torch.float64)
    assert torch.isfinite(back).all()
    slack = 1e-6 * x.abs().amax(-1, keepdim=True).double()
    assert ((back - x.double()).abs() <= params[:, :1].double() / 2 + slack).all()
    whole = unpack_halves(codes) if kv.bits == 4 else codes
    assert int(whole.max()) <= kv.top


@given(low=st.floats(-119, 0), high=st.floats(0, 119))
def test_group_codes_stay_in_int8_and_survive_decoding(low: float, high: float) -> None:
    scale, zero = group_grid(torch.tensor([low]), torch.tensor([high]))
    codes = torch.arange(16)
    values = codes * scale - zero
    assert -128 <= float(values.min()) <= float(values.max()) <= 127
    assert 1 <= float(scale) <= 17
    assert 0 <= float(zero) <= 119
    assert torch.equal(nearest(values, scale, zero).long(), codes)


@given(form=forms, seed=seeds, n=st.integers(1, 40), half=st.integers(1, 200), size=st.sampled_from([1e-3, 0.05, 30.0]))
def test_the_error_of_a_row_is_that_of_its_grid(form: WeightFormat, seed: int, n: int, half: int, size: float) -> None:
    """Root mean square error at most half a step; a group adds its rounded scale and zero, half a level each."""
    w = normal(seed, n, 2 * half) * size
    dense = form.dense(form.from_dense(w))
    assert torch.isfinite(dense).all()
    amax = w.abs().amax(1)
    span = w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)
    half_step = {"w16a16": 0 * span, "w8a8": amax / 254, "w4a8-row": span / 30, "w4a8-g128": span / 30 + amax / 119}
    fp16 = 1e-3 * amax + 1e-6
    assert ((dense - w).pow(2).mean(1).sqrt() <= half_step[form.name] + fp16).all()


@given(seed=seeds, n=st.integers(1, 40), k=st.integers(1, 300), size=scales)
def test_rounding_eight_bits_again_changes_nothing(seed: int, n: int, k: int, size: float) -> None:
    form = FORMATS["w8a8"]
    stored = form.from_dense(normal(seed, n, k) * size)
    again = form.from_dense(form.dense(stored))
    assert torch.equal(again["codes"], stored["codes"])
    assert torch.allclose(again["scale"], stored["scale"], rtol=1e-6)


@given(
    form=forms, seed=seeds, tokens=st.integers(1, 6), n=st.integers(1, 60), half=st.integers(1, 160), bias=st.booleans()
)
def test_products_equal_those_of_dense_weights(
    form: WeightFormat, seed: int, tokens: int, n: int, half: int, bias: bool
) -> None:
    """Padded or not, in float64."""
    k = 2 * half
    stored = form.from_dense(normal(seed, n, k) * 0.1)
    b = normal(seed + 1, n).double() if bias else None
    x = quantize(normal(seed + 2, tokens, k).double(), form.wants)
    held = x.codes.double() * x.scale.double() if isinstance(x, Int8) else x.x
    dense = form.dense(stored, torch.float64)
    expected = held @ dense.T + (0 if b is None else b)
    for align in (1, 128):
        got = form.bind(stored, bias=b, dtype=torch.float64, align=align).gemm(x)
        assert got.shape == (tokens, n)
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10)


@given(seed=seeds, n=st.integers(1, 20), groups=st.integers(1, 4), short=st.sampled_from([0, 2, 64, 126]))
def test_groups_obey_the_writers_rules(seed: int, n: int, groups: int, short: int) -> None:
    """qoq.md section 4: 1 <= s2 <= 17, z2 <= 128, 15 s2 - z2 <= 127, scales positive and finite."""
    stored = W4A8(128).from_dense(normal(seed, n, groups * 128 + short).exp() - 1)
    scale, zero = stored["group_scale"].long(), stored["group_zero"].long()
    assert scale.shape == (n, groups + (short > 0))
    assert 1 <= int(scale.min()) <= int(scale.max()) <= 17
    assert int(zero.max()) <= 128
    assert int((15 * scale - zero).max()) <= 127
    assert torch.isfinite(stored["scale"]).all()
    assert (stored["scale"] > 0).all()


@given(seed=seeds, tokens=st.integers(1, 5), k=st.integers(1, 300), size=scales)
def test_activations_are_within_half_a_step(seed: int, tokens: int, k: int, size: float) -> None:
    x = normal(seed, tokens, k) * size
    act = quantize(x, ActFormat.INT8_SUM)
    assert isinstance(act, Int8)
    assert act.sum is not None
    error = (act.codes.double() * act.scale.double() - x.double()).abs()
    assert (error <= act.scale.double() * 0.5001).all()
    assert torch.equal(act.sum.long(), act.codes.long().sum(1, keepdim=True))
