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


@triton.jit
def signed_codes(packed, HIGH: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Return bytes as int8 factors of a product: low or high nibbles, 0..15, or whole codes less 128."""
    if BITS == 8:
        if ASM:
            return tl.inline_asm_elementwise(
                "xor.b32 $0, $1, 0x80808080;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            return (packed.to(tl.int16) - 128).to(tl.int8)
    elif HIGH:
        if ASM:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }",
                "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return (packed >> 4).to(tl.int8)
    else:
        if ASM:
            return tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            return (packed & 15).to(tl.int8)


@triton.jit
def tiny_codes(packed, HIGH: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Return bytes, or one of their nibbles, as fp16 times 2^-24 (high ones 2^-20): a code's bits are the number's."""
    if ASM:
        mask: tl.constexpr = "0xffffffff" if BITS == 8 else "0xf0f0f0f0" if HIGH else "0x0f0f0f0f"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, z; mov.b32 z, 0; and.b32 t, $2, " + mask + "; prmt.b32 $0, t, z, 0x4140; "
            "prmt.b32 $1, t, z, 0x4342; }",
            "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    elif BITS == 8:
        return (packed.to(tl.float32) * 2.0**-24).to(tl.float16)
    elif HIGH:
        return ((packed >> 4).to(tl.float32) * 2.0**-20).to(tl.float16)
    else:
        return ((packed & 15).to(tl.float32) * 2.0**-24).to(tl.float16)


@triton.jit
def small_codes(words, BYTE: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Return one code of each word as fp16: low or high nibble of one byte, or the byte, times 2^-24 (2^-20 if high).

    These are fp16's numbers below the smallest normal one: the code's bits are the number's, and a mask makes them.
    Two words are taken at once: those of two tokens that share a register of the product.
    """
    if ASM:
        take: tl.constexpr = "0x5410" if BYTE < 2 else "0x7632"
        if BITS == 8:
            place: tl.constexpr = "0x4240" if BYTE % 2 == 0 else "0x4341"
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t, z; mov.b32 z, 0; prmt.b32 t, $1, $2, " + take + "; prmt.b32 $0, t, z, " + place + "; }",
                "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            shift: tl.constexpr = "shr.u32 t, t, 8;" if BYTE % 2 else ""
            mask: tl.constexpr = "0x00f000f0" if HIGH else "0x000f000f"
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; prmt.b32 t, $1, $2, " + take + "; " + shift + " and.b32 $0, t, " + mask + "; }",
                "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    elif BITS == 8:
        return (((words >> (8 * BYTE)) & 255).to(tl.float32) * 2.0**-24).to(tl.float16)
    elif HIGH:
        return (((words >> (8 * BYTE + 4)) & 15).to(tl.float32) * 2.0**-20).to(tl.float16)
    else:
        return (((words >> (8 * BYTE)) & 15).to(tl.float32) * 2.0**-24).to(tl.float16)
