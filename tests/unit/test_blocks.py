"""4-bit codes in blocks: where each nibble lies, and the way back."""

import pytest
import torch

from omniserve.base.errors import CheckpointError
from omniserve.formats.blocks import BLOCK_BYTES, CODE_BYTES, pack_blocks, unpack_blocks
from omniserve.formats.w4a8 import W4A8, expand, unpack_columns
from omniserve.ops.act import ActFormat, quantize


def codes(n: int, k: int) -> torch.Tensor:
    return torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(n + k)).to(torch.uint8)


@pytest.mark.parametrize(("n", "k"), [(1, 2), (128, 128), (192, 576), (130, 1152), (256, 64)])
def test_there_and_back(n: int, k: int) -> None:
    c = codes(n, k)
    scale, zero = codes(n, -(-k // 128)) + 1, codes(n, -(-k // 128)) * 8
    blocks = pack_blocks(c)
    assert blocks.shape == (-(-n // 128), -(-k // 128), CODE_BYTES)
    assert torch.equal(unpack_blocks(blocks, (n, k))[0], c)
    grouped = pack_blocks(c, scale, zero)
    assert grouped.shape[2] == BLOCK_BYTES
    assert grouped.is_contiguous()
    back = unpack_blocks(grouped, (n, k))
    assert all(torch.equal(a, b) for a, b in zip(back, (c, scale, zero), strict=True))


def test_where_each_code_lies() -> None:
    """Row 130 is row 2 of panel 1; column 200 is column 72 of block 1: the high nibble of byte 8 of that row."""
    c = torch.zeros(256, 256, dtype=torch.uint8)
    c[130, 200] = 9
    c[130, 136] = 5
    blocks = pack_blocks(c, torch.full((256, 2), 3, dtype=torch.uint8), torch.full((256, 2), 40, dtype=torch.uint8))
    assert int(blocks[1, 1, 2 * 64 + 8]) == 9 << 4 | 5
    assert int((blocks[..., :CODE_BYTES] != 0).sum()) == 1
    assert bool((blocks[..., CODE_BYTES : CODE_BYTES + 128] == 3).all())
    assert bool((blocks[..., CODE_BYTES + 128 :] == 88).all())


def test_a_zero_that_has_no_byte_is_refused() -> None:
    one = torch.ones(1, 1, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="group_zero of a w4a8-g128 weight is 129; GPU kernels take 0 to 128"):
        pack_blocks(codes(1, 128), one, one * 129)


@pytest.mark.parametrize("form", [W4A8(None), W4A8(128)], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_in_blocks_multiply_like_those_of_the_cpu(form: W4A8, dtype: torch.dtype) -> None:
    """The same stored tensors, bound both ways: the same product to the last bit."""
    generator = torch.Generator().manual_seed(0)
    stored = form.from_dense(torch.randn(130, 200, generator=generator))
    bias = torch.randn(130, generator=generator)
    x = quantize(torch.randn(3, 200, generator=generator, dtype=dtype), form.wants)
    blocks, plain = form.bind_blocks(stored, bias=bias, dtype=dtype), form.bind(stored, bias=bias, dtype=dtype)
    assert blocks.wants is plain.wants
    assert blocks.shape == plain.shape
    assert torch.equal(blocks.gemm(x), plain.gemm(x))
    assert blocks.nbytes < plain.nbytes * 2  # padded to 128 rows and 256 columns, two codes a byte
    x = quantize(torch.randn(3, 200, generator=generator, dtype=dtype), form.wants)
    a, b = (w.gate_up_silu(x, ActFormat.INT8_SUM) for w in (blocks, plain))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.sum, b.sum)


def test_blocks_hold_the_stored_codes() -> None:
    stored = W4A8(128).from_dense(torch.randn(64, 192, generator=torch.Generator().manual_seed(1)))
    bound = W4A8(128).bind_blocks(stored, bias=None, dtype=torch.float32)
    c, scale, zero = unpack_blocks(bound.blocks, bound.shape)
    assert torch.equal(c, unpack_columns(stored["codes"]))
    assert torch.equal(expand(c, scale, zero), expand(c, stored["group_scale"], stored["group_zero"]))
