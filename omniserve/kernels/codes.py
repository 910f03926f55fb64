"""Codes of keys and values as numbers, inside kernels."""

import triton
import triton.language as tl


@triton.jit
def low_codes(packed, like, ASM: tl.constexpr):
    """Return the low nibbles of bytes as floats: bytes become the mantissas of 1024 + n (fp16) or 128 + n (bf16)."""
    if ASM:
        if like == tl.float16:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 a, b, m; and.b32 a, $2, 0x0f0f0f0f; mov.b32 m, 0x64006400;
                prmt.b32 b, a, m, 0x5150; prmt.b32 a, a, m, 0x5352; sub.f16x2 $0, b, m; sub.f16x2 $1, a, m; }""",
                "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 a, b, m, o, n; and.b32 a, $2, 0x0f0f0f0f; mov.b32 m, 0x43004300;
                mov.b32 o, 0x3f803f80; mov.b32 n, 0xc300c300; prmt.b32 b, a, m, 0x5150; prmt.b32 a, a, m, 0x5352;
                fma.rn.bf16x2 $0, b, o, n; fma.rn.bf16x2 $1, a, o, n; }""",
                "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        return (packed & 0xF).to(like)


@triton.jit
def high_codes(packed, like, ASM: tl.constexpr):
    """Return the high nibbles of bytes as floats."""
    if ASM:
        if like == tl.float16:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 a, b, m; shr.u32 a, $2, 4; and.b32 a, a, 0x0f0f0f0f; mov.b32 m, 0x64006400;
                prmt.b32 b, a, m, 0x5150; prmt.b32 a, a, m, 0x5352; sub.f16x2 $0, b, m; sub.f16x2 $1, a, m; }""",
                "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 a, b, m, o, n; shr.u32 a, $2, 4; and.b32 a, a, 0x0f0f0f0f; mov.b32 m, 0x43004300;
                mov.b32 o, 0x3f803f80; mov.b32 n, 0xc300c300; prmt.b32 b, a, m, 0x5150; prmt.b32 a, a, m, 0x5352;
                fma.rn.bf16x2 $0, b, o, n; fma.rn.bf16x2 $1, a, o, n; }""",
                "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        return ((packed >> 4) & 0xF).to(like)


@triton.jit
def halves(codes, token, at, keep, D: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr, like, ASM: tl.constexpr):
    """Return both halves [tokens, D / 2 padded] of keys or values as numbers: codes as they are, or the values."""
    HALF: tl.constexpr = D // 2
    if BITS == 4:
        place = codes + token[:, None] * HALF + at[None, :]
        packed = tl.load(place) if WHOLE else tl.load(place, mask=keep, other=0)
        return low_codes(packed, like, ASM), high_codes(packed, like, ASM)
    else:
        place = codes + token[:, None] * D + at[None, :]
        low = tl.load(place) if WHOLE else tl.load(place, mask=keep, other=0)
        high = tl.load(place + HALF) if WHOLE else tl.load(place + HALF, mask=keep, other=0)
        return low.to(like), high.to(like)
