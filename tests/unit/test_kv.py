"""KV formats: sizes, the rule of codes, pages as views, and what writing and reading give back."""

import itertools

import pytest
import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.formats.kv import KVFormat, LayerPages, kv_format, pack_halves, unpack_halves

KV4, KV8, KV16, KV32 = (kv_format(name) for name in ("kv4", "kv8", "kv16", "kv32"))
STATIC = kv_format("kv8", static=True)
DYNAMIC = pytest.mark.parametrize("kv", [KV4, KV8], ids=["kv4", "kv8"])
ALL = pytest.mark.parametrize("kv", [KV4, KV8, STATIC, KV16, KV32], ids=["kv4", "kv8", "kv8 static", "kv16", "kv32"])
HEADS, DIM = 3, 64


def layer(kv: KVFormat, pages: int = 6, dim: int = DIM, fill: int = 0) -> LayerPages:
    memory = torch.full((pages, HEADS, kv.page_bytes(dim)), fill, dtype=torch.uint8)
    scale = torch.tensor([[0.05, 0.06, 0.07], [0.02, 0.03, 0.04]]) if kv.static else None
    return LayerPages(memory, kv, dim, scale)


def vectors(tokens: int, seed: int = 0, dim: int = DIM) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, tokens, HEADS, dim, generator=generator)
    return k + 2.0 * torch.randn(HEADS, dim, generator=generator), v


@pytest.mark.parametrize(
    ("kv", "dim", "size"),
    [
        (KV4, 128, 8704),
        (KV8, 128, 16896),
        (STATIC, 128, 16896),
        (KV16, 128, 32768),
        (KV32, 128, 65536),
        (KV4, 64, 4608),
        (KV8, 64, 8704),
        (KV16, 64, 16384),
        (KV4, 80, 5632),
    ],
)
def test_page_bytes(kv: KVFormat, dim: int, size: int) -> None:
    assert kv.page_bytes(dim) == size
    assert kv.token_bytes(3, dim, 30) * 64 == size * 3 * 30


def test_four_bits_take_little_more_than_a_quarter() -> None:
    assert KV4.page_bytes(64) / KV16.page_bytes(64) <= 0.29
    assert KV4.page_bytes(128) / KV16.page_bytes(128) <= 0.27


def test_sixteen_bits_hold_the_models_dtype() -> None:
    assert kv_format("kv16", dtype=torch.bfloat16).element == torch.bfloat16
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert kv_format("kv16", dtype=dtype).element == torch.float16
    assert kv_format("kv32", dtype=torch.float64).element == torch.float32
    assert [kv.name for kv in (KV4, KV8, KV16, KV32)] == ["kv4", "kv8", "kv16", "kv32"]


def test_nibbles_are_halves() -> None:
    codes = torch.randint(0, 16, (5, 3, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_halves(codes)
    assert int(packed[4, 2, 3]) == int(codes[4, 2, 3]) + 16 * int(codes[4, 2, 11])
    assert torch.equal(unpack_halves(packed), codes)


def hard_rows() -> dict[str, Tensor]:
    """formats.md section 10."""
    ramp = torch.linspace(0, 1, DIM)
    rows = {
        "zero": torch.zeros(DIM),
        "one": torch.ones(DIM),
        "constant": torch.full((DIM,), -7.3),
        "tiny": torch.full((DIM,), 1e-8),
        "outlier": torch.cat([torch.full((DIM - 1,), 0.01), torch.tensor([300.0])]),
        "negative outlier": torch.cat([torch.full((DIM - 1,), 0.01), torch.tensor([-300.0])]),
        "one-hot": torch.eye(DIM)[5],
        "1e4": ramp * 1e4,
        "fp16 maximum": torch.linspace(-65504, 65504, DIM),
        "fp16 maximum, constant": torch.full((DIM,), 65504.0),
    }
    for times, sign, size in itertools.product((32, 64, 257, 4400), (1, -1), (1e-3, 1.0, 13.0)):
        rows[f"offset {sign * times} x {size}"] = (ramp + sign * times) * size
    return rows


@DYNAMIC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_rows(kv: KVFormat, dtype: torch.dtype) -> None:
    for name, row in hard_rows().items():
        x = row.to(dtype)
        codes, params = kv.encode(x)
        assert params is not None
        assert torch.isfinite(params).all(), name
        whole = unpack_halves(codes) if kv.bits == 4 else codes
        assert int(whole.max()) <= kv.top, name
        back = kv.decode(codes, params, torch.float64)
        assert torch.isfinite(back).all(), name
        slack = 1e-6 * float(x.abs().max())  # x / s + z is rounded to the arithmetic's type
        assert float((back - x.double()).abs().max()) <= float(params[0]) / 2 + slack, name


@DYNAMIC
def test_the_rule_by_hand(kv: KVFormat) -> None:
    x = vectors(40, seed=3)[0]
    codes, params = kv.encode(x)
    assert params is not None
    low, high = x.amin(-1), x.amax(-1)
    s = torch.stack([(high - low) / kv.top, x.abs().amax(-1) / 1024, torch.full_like(low, 2**-14)]).amax(0).half()
    z = (-low / s.float()).half()
    expected = (x / s.float()[..., None] + z.float()[..., None]).round().clamp(0, kv.top).to(torch.uint8)
    assert torch.equal(params, torch.stack((s, z), -1))
    assert torch.equal(unpack_halves(codes) if kv.bits == 4 else codes, expected)
    back = kv.decode(codes, params, torch.float32)
    assert torch.equal(back, s.float()[..., None] * (expected.float() - z.float()[..., None]))


def test_larger_than_fp16_saturates() -> None:
    codes, params = KV4.encode(torch.linspace(-1e7, 1e7, DIM))
    assert torch.isfinite(KV4.decode(codes, params, torch.float32)).all()


def test_static_codes_are_symmetric_around_128() -> None:
    scale = torch.tensor([0.1])
    x = torch.linspace(-20, 20, 81)
    codes, params = STATIC.encode(x, scale)
    assert params is not None
    s = torch.tensor(0.1).half()
    assert params.tolist() == [s.item(), 128.0]
    assert torch.equal(codes.long(), (x / s.float()).round().clamp(-128, 127).long() + 128)
    assert torch.equal(STATIC.decode(codes, params, torch.float64), s.double() * (codes.double() - 128))


def test_static_scales_are_checked() -> None:
    pages = torch.zeros(2, HEADS, STATIC.page_bytes(DIM), dtype=torch.uint8)
    for bad in (0.0, -1.0, 1e9, 1e-9, float("nan")):
        scale = torch.ones(2, HEADS)
        scale[1, 2] = bad
        with pytest.raises(CheckpointError, match="static KV scale"):
            LayerPages(pages, STATIC, DIM, scale)
    with pytest.raises(AssertionError, match="static formats alone"):
        LayerPages(pages, STATIC, DIM, None)
    with pytest.raises(AssertionError, match="expected contiguous uint8"):
        LayerPages(pages, KV4, DIM, None)


@ALL
def test_views_share_the_memory_of_the_pages(kv: KVFormat) -> None:
    pages = layer(kv)
    assert pages.codes.data_ptr() == pages.pages.data_ptr()
    assert pages.codes.shape == (6, HEADS, 2, 64, DIM // 2 if kv.bits == 4 else DIM)
    pages.codes[3, 1, 1, 7] = 5
    raw = pages.pages[3, 1].numpy().tobytes()
    width = kv.code_bytes(DIM)
    at = (64 + 7) * width
    assert any(raw[at : at + width])
    assert not any(raw[:at])
    assert not any(raw[at + width :])
    if kv.quantized:
        assert pages.params.shape == (6, HEADS, 4, 64)
        pages.params[5, 2, 2, 63] = 1.5
        at = 2 * 64 * width + (2 * 64 + 63) * 2
        assert pages.pages[5, 2, at : at + 2].view(torch.float16).item() == 1.5
    else:
        assert pages.params.numel() == 0


def expected_read(kv: KVFormat, pages: LayerPages, x: Tensor, which: int) -> Tensor:
    """Keys (0) or values (1) [T, H, D] as they come back, in float64."""
    scale = None if pages.scale is None else pages.scale[which][:, None]
    return kv.decode(*kv.encode(x, scale), torch.float64)


@ALL
@pytest.mark.parametrize("tokens", [1, 8, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_what_is_written_is_read(kv: KVFormat, tokens: int, dtype: torch.dtype, dim: int) -> None:
    pages = layer(kv, dim=dim, fill=1)
    k, v = vectors(tokens, dim=dim)
    slots = torch.randperm(6 * 64, generator=torch.Generator().manual_seed(1))[:tokens]
    pages.write(slots, k.to(dtype), v.to(dtype))
    ids = torch.tensor([[4, 2, 0], [1, 3, 5]], dtype=torch.int32)
    read = pages.read(ids, dtype)
    assert all(t.shape == (2, HEADS, 192, dim) and t.dtype == dtype for t in read)
    for which, x in enumerate((k, v)):
        expected = expected_read(kv, pages, x.to(dtype), which)
        for token, slot in enumerate(slots.tolist()):
            row, place = (ids == slot // 64).nonzero()[0].tolist()
            got = read[which][row, :, place * 64 + slot % 64].double()
            assert torch.allclose(got, expected[token], rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-7)


@ALL
def test_writing_twice_is_writing_once_and_touches_nothing_else(kv: KVFormat) -> None:
    k, v = vectors(70)
    slots = torch.arange(100, 170)
    once, twice = layer(kv, fill=7), layer(kv, fill=7)
    once.write(slots, k, v)
    twice.write(slots, k, v)
    twice.write(slots, k, v)
    assert torch.equal(once.pages, twice.pages)
    untouched = torch.ones(6 * 64, dtype=torch.bool)
    untouched[slots] = False
    before = layer(kv, fill=7)
    for now, then in ((once.codes, before.codes), (once.params[..., None], before.params[..., None])):
        by_slot = (t.transpose(1, 3).flatten(0, 1).contiguous().view(torch.uint8) for t in (now, then))
        assert torch.equal(*(t[untouched] for t in by_slot))


@ALL
def test_one_by_one_is_all_at_once(kv: KVFormat) -> None:
    k, v = vectors(20)
    slots = torch.randperm(384, generator=torch.Generator().manual_seed(2))[:20]
    together, apart = layer(kv), layer(kv)
    together.write(slots, k, v)
    for token in range(20):
        apart.write(slots[token : token + 1], k[token : token + 1], v[token : token + 1])
    assert torch.equal(together.pages, apart.pages)


@ALL
def test_a_slot_of_minus_one_skips_the_token(kv: KVFormat) -> None:
    k, v = vectors(5)
    skipped, without = layer(kv), layer(kv)
    skipped.write(torch.tensor([3, -1, 64, -1, 200]), k, v)
    without.write(torch.tensor([3, 64, 200]), k[::2], v[::2])
    assert torch.equal(skipped.pages, without.pages)
    nothing = layer(kv)
    nothing.write(torch.full((5,), -1), k, v)
    nothing.write(torch.zeros(0, dtype=torch.int64), k[:0], v[:0])
    assert torch.equal(nothing.pages, layer(kv).pages)


@ALL
def test_pages_are_read_in_any_order_and_a_missing_id_is_harmless(kv: KVFormat) -> None:
    pages = layer(kv)
    k, v = vectors(384)
    pages.write(torch.arange(384), k, v)
    whole = pages.read(torch.arange(6)[None], torch.float32)
    some = pages.read(torch.tensor([[5, 0], [2, -1]]), torch.float32)
    for all_pages, listed in zip(whole, some, strict=True):
        assert torch.equal(listed[0, :, :64], all_pages[0, :, 320:])
        assert torch.equal(listed[0, :, 64:], all_pages[0, :, :64])
        assert torch.equal(listed[1, :, :64], all_pages[0, :, 128:192])


@ALL
def test_pages_of_one_layer_of_a_store(kv: KVFormat) -> None:
    memory = torch.zeros(2, 6, HEADS, kv.page_bytes(DIM), dtype=torch.uint8)
    scale = torch.ones(2, HEADS) if kv.static else None
    layers = [LayerPages(memory[number], kv, DIM, scale) for number in range(2)]
    k, v = vectors(10)
    layers[1].write(torch.arange(10), k, v)
    assert not memory[0].any()
    assert memory[1, 0].any()
    assert not memory[1, 1:].any()


@ALL
def test_bfloat16_models_read_bfloat16(kv: KVFormat) -> None:
    kv = kv_format("kv16", dtype=torch.bfloat16) if kv is KV16 else kv
    pages = layer(kv)
    k, v = (t.bfloat16() for t in vectors(64))
    pages.write(torch.arange(64), k, v)
    keys, _ = pages.read(torch.zeros(1, 1, dtype=torch.int32), torch.bfloat16)
    assert keys.dtype == torch.bfloat16
    if kv.bits >= 16:
        assert torch.equal(keys[0].transpose(0, 1), k)


@DYNAMIC
def test_no_zero_point_is_minus_zero(kv: KVFormat) -> None:
    """A row of zeros of both signs has one encoding: which of the two is the smaller, no device promises."""
    _, params = kv.encode(torch.tensor([[0.0, -0.0] * 4, [-0.0, 0.0] * 4, [0.0] * 8, [0.0] * 7 + [1.0]]))
    assert params is not None
    assert not params.signbit().any()
