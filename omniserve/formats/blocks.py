"""4-bit codes in the order in which a GPU reads them. `pack_blocks` packs, `unpack_blocks` unpacks, nothing else does.

A block is 128 rows by 128 columns of a weight:

    bytes 0..8191     rows of 64 bytes; byte j of a row holds column j (low nibble) and column j + 64 (high nibble)
    bytes 8192..8319  grouped weights only: scale of each row's group, uint8
    bytes 8320..8447  grouped weights only: 128 - zero of each row's group, uint8

The halves feed two products, against columns 0..63 and 64..127 of the activations, without a shuffle. Blocks of one
panel of 128 rows follow each other along K, so that a panel is read from front to back.
"""

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.numbers import align_up
from omniserve.formats.weight import padded

SIDE = 128
"""Rows and columns of a block, and the columns of a group."""

CODE_BYTES = SIDE * SIDE // 2
"""Bytes of a block without its groups' parameters."""

BLOCK_BYTES = CODE_BYTES + 2 * SIDE
"""Bytes of a block with them: a multiple of 16."""


def pack_blocks(codes: Tensor, group_scale: Tensor | None = None, group_zero: Tensor | None = None) -> Tensor:
    """Return codes 0..15 uint8 [N, K] as blocks uint8 [ceil(N / 128), ceil(K / 128), 8192], or 8448 with groups.

    group_scale, group_zero  uint8 [N, ceil(K / 128)], or None: w = codes * group_scale - group_zero
    Padding holds code 0, scale 0 and zero 0. Raises CheckpointError if a zero is above 128: then 128 - zero has no
    byte, and the carry-free product of four codes at once would be wrong.
    """
    n, k = codes.shape
    panels, along = align_up(n, SIDE) // SIDE, align_up(k, SIDE) // SIDE
    wide = padded(codes, (panels * SIDE, along * SIDE)).view(panels, SIDE, along, SIDE).transpose(1, 2)
    low, high = wide.chunk(2, -1)
    packed = (low | (high << 4)).flatten(2)
    if group_scale is None:
        return packed.contiguous()
    assert group_zero is not None, "pack_blocks: group_scale without group_zero"
    if group_zero.numel() and int(group_zero.amax()) > SIDE:
        raise CheckpointError(
            f"a group_zero of a w4a8-g128 weight is {int(group_zero.amax())}; GPU kernels take 0 to {SIDE}: "
            "quantize the model again with `omniserve quantize`"
        )
    offset = (SIDE - group_zero.to(torch.int16)).to(torch.uint8)
    parameters = [
        padded(p, (panels * SIDE, along)).view(panels, SIDE, along).transpose(1, 2) for p in (group_scale, offset)
    ]
    return torch.cat([packed, *parameters], -1)


def unpack_blocks(blocks: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (codes [N, K], group_scale, group_zero [N, ceil(K / 128)]) of blocks; the inverse of `pack_blocks`."""
    n, k = shape
    panels, along, size = blocks.shape
    packed = blocks[..., :CODE_BYTES].view(panels, along, SIDE, SIDE // 2)
    codes = torch.cat((packed & 15, packed >> 4), -1).transpose(1, 2).reshape(panels * SIDE, along * SIDE)[:n, :k]
    if size == CODE_BYTES:
        return codes, None, None
    scale, offset = (p.transpose(1, 2).reshape(panels * SIDE, along)[:n] for p in blocks[..., CODE_BYTES:].chunk(2, -1))
    return codes, scale, (SIDE - offset.to(torch.int16)).to(torch.uint8)
