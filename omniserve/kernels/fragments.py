"""What threads do with the operands and the sums of Hopper's products that they hold in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _low(p):
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", [p], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def _high(p):
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }",
        "=r,r",
        [p],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _second_level(q, scale, offset):
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mad.lo.u32 t, $1, $2, $6; xor.b32 $0, t, 0x80808080; }",
        "=r,r,r,r,r,r,r,r,r,r",
        [q, scale, offset],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.constexpr_function
def _piece(lines):
    """Return the layout [lines, 512] of sums of 4 warps: 16 bytes of a thread beside each other."""
    threads = [[0, 4 << bit] for bit in range(7)]
    held = [[1 << bit, 0] for bit in range(lines.bit_length() - 1)]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], *held], threads[:5], threads[5:], [], [lines, 512])


@gluon.jit
def _as_lines(acc):
    """Return sums [BN, BM] as lines of 512, 16 bytes of each thread beside each other: nothing moves."""
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    LINES: gl.constexpr = BN * BM // 512
    lines = acc.reshape([BN // 64, 4, 2, 8, BM // 8, 4, 2]).permute((0, 4, 1, 3, 5, 2, 6))
    return gl.convert_layout(lines.reshape([LINES, 512]), _piece(LINES))


@gluon.jit
def _as_tile(lines, BN: gl.constexpr, BM: gl.constexpr, out: gl.constexpr):
    """Return the sums [BN, BM] that `_as_lines` made lines of."""
    tile = lines.reshape([BN // 64, BM // 8, 4, 8, 4, 2, 2]).permute((0, 2, 5, 3, 1, 4, 6))
    return gl.convert_layout(tile.reshape([BN, BM]), out)


@gluon.jit
def _tokens(own, piece: gl.constexpr, PIECES: gl.constexpr, out: gl.constexpr):
    """Return one of several pieces [BN, tokens] of sums: registers of each thread, nothing moves."""
    BN: gl.constexpr = own.shape[0]
    T: gl.constexpr = own.shape[1] // PIECES
    pieces = own.reshape([BN, PIECES, T]).permute((1, 0, 2))
    which = gl.arange(0, PIECES, gl.SliceLayout(1, gl.SliceLayout(2, pieces.type.layout)))[:, None, None]
    return gl.convert_layout(gl.sum(gl.where(which == piece, pieces, 0), 0), out)
