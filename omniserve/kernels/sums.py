"""What a piece of a row comes to: scores, weighted sums of values, and how pieces add up, in one order everywhere.

Codes go into the products as they are stored. Keys: scores are (q . code - zero * sum(q)) * scale. Values: the weights
take the scale, relative to the largest of the page and times 2^15, so that small ones stay above fp16's smallest.
"""

import triton
import triton.language as tl

from omniserve.kernels.codes import signed_codes, small_codes

STEP = tl.constexpr(2.0**15)
"""The largest weight of a value: what the sums of weights and weighted values are in units of."""

_SMALL = tl.constexpr(2.0**24)
_CODES = tl.constexpr(32512.0)  # the largest 16-bit code whose upper byte is at most 127


@triton.jit
def queries(q, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BITS: tl.constexpr):
    """Return both halves of a key head's queries, beside 4-bit codes, or the whole twice."""
    R: tl.constexpr = 16 if BITS == 16 and N < 16 else N
    m = tl.arange(0, R)
    at = tl.arange(0, KP)
    some = (m < G)[:, None] & (at < (D // 2 if BITS == 4 else D))[None, :]
    place = q + m[:, None] * D + at[None, :]
    f0 = tl.load(place, mask=some, other=0.0)
    return f0, tl.load(place + D // 2, mask=some, other=0.0) if BITS == 4 else f0


@triton.jit
def query_codes(q0, q1, scale, N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Return the factors of both halves of a head's queries, the sums of their codes, and what a score counts for.

    Beside codes, queries become 16-bit codes: enough for any, and no row of the products stays empty.
    """
    if BITS == 16:
        total = tl.zeros((N,), tl.float32)
        return q0, q1, total, total + scale
    else:
        f0 = q0.to(tl.float32)
        most = tl.max(tl.abs(f0), 1)
        sound = tl.sum(f0, 1)
        f1 = f0
        if BITS == 4:
            f1 = q1.to(tl.float32)
            most = tl.maximum(most, tl.max(tl.abs(f1), 1))
            sound += tl.sum(f1, 1)
        most = tl.maximum(most, 1e-30)
        unit = most / _CODES + sound * 0.0  # what is not finite must not become a number
        to_code = (1.0 / most) * _CODES
        c0, total = _bytes(f0, to_code, N)
        c1 = c0
        if BITS == 4:
            c1, other = _bytes(f1, to_code, N)
            total += other
        return c0, c1, total.to(tl.float32), unit * scale


@triton.jit
def _bytes(f, to_code, N: tl.constexpr):
    """Return 16-bit codes of queries [2 N, ..], upper bytes in the first N rows, lower ones behind, and their sums."""
    code = tl.floor(f * to_code[:, None] + 0.5).to(tl.int32)
    upper = (code + 128) >> 8
    both = tl.permute(tl.join(upper.to(tl.int8), (code - upper * 256).to(tl.int8)), (2, 0, 1))
    return both.reshape(2 * N, f.shape[1]), tl.sum(code, 1)


@triton.jit
def scores_of(
    q0, q1, codes, token, N: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Return products of queries with keys as they are stored, [N, tokens]."""
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D
    at = tl.arange(0, KP)
    place = codes + (token[:, None] * BYTES + at[None, :])
    keys = tl.load(place) if KP == BYTES else tl.load(place, mask=(at < BYTES)[None, :], other=0)
    if BITS == 16:
        s = tl.dot(q0, keys.T)
        return tl.sum(s.reshape(s.shape[0] // N, N, s.shape[1]), 0)
    else:
        s = tl.dot(q0, signed_codes(keys, False, BITS, ASM).T, out_dtype=tl.int32)
        if BITS == 4:
            s = tl.dot(q1, signed_codes(keys, True, BITS, ASM).T, s, out_dtype=tl.int32)
        upper = tl.where(tl.arange(0, 2 * N) < N, 256, 1)
        return tl.sum((s * upper[:, None]).reshape(2, N, s.shape[1]), 0).to(tl.float32)


@triton.jit
def weighed(a, words, p, BYTE: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Return sums [VP, N] of one code of each word, moved on by one turn."""
    return tl.dot(small_codes(words, BYTE, HIGH, BITS, ASM), p, a)


@triton.jit
def dims(D: tl.constexpr, VP: tl.constexpr, BITS: tl.constexpr):
    """Return the dims of sums [N, 1 or 2, ..] in order, and which are there; codes of a byte are half a head apart."""
    if BITS == 4:
        at = tl.arange(0, VP * 4)[None, None, :]
        return tl.arange(0, 2)[None, :, None] * (D // 2) + at, at < D // 2
    else:
        at = tl.arange(0, VP if BITS == 16 else VP * 4)[None, None, :]
        return at, at < D


@triton.jit
def sums_of(a0, a1, a2, a3, a4, a5, a6, a7, lift, unit, VP: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    """Return a piece's sums of weighted values [N, 1 or 2, ..], their dims in order, without the weights' unit."""
    if BITS == 16:
        return a0.T.reshape(N, 1, VP)
    else:
        back = unit * (_SMALL / STEP)
        if BITS == 4:
            a = tl.join(
                tl.join(tl.join(a0, a4), tl.join(a2, a6)),
                tl.join(tl.join(a1, a5), tl.join(a3, a7)),
            )
            a = tl.permute(a, (1, 2, 0, 3, 4)).reshape(N, 2, VP * 4)
            back = tl.where(tl.arange(0, 2) == 0, back, back / 16)[None, :, None]
        else:
            a = tl.permute(tl.join(tl.join(a0, a2), tl.join(a1, a3)), (1, 0, 2, 3)).reshape(N, 1, VP * 4)
        return tl.fma(a, back, (lift * (-unit / STEP))[:, None, None])


@triton.jit
def rounded(best, unit_q):
    """Return a piece's largest scores, rounded as they are where they are written: fused with what follows, not so."""
    return tl.fma(best, unit_q, 0.0)


@triton.jit
def plain(weight, unit, BITS: tl.constexpr):
    """Return a piece's sums of weights without their unit."""
    return weight * (unit / STEP) if BITS < 16 else weight


@triton.jit
def add(sums, high, weight, rest, norms, valid, within, more, ASM: tl.constexpr):
    """Add a piece's sums to those that this program wrote of the pieces before, if `more`, and write them.

    `combine_kernel` adds up in the same way.
    """
    settle(0, ASM)
    high, weight, sums = joined(sums, high, weight, rest, norms, valid & more, within & more)
    tl.store(rest, sums, mask=within)
    tl.store(norms, high, mask=valid)
    tl.store(norms + 1, weight, mask=valid)


@triton.jit
def joined(sums, high, weight, rest, norms, valid, within):
    """Return largest score, weights and sums of a piece and those before it."""
    before = tl.load(rest, mask=within, other=0.0)
    weight_before = tl.load(norms + 1, mask=valid, other=0.0)
    high, old, new = shares(tl.load(norms, mask=valid, other=float("-inf")), high)
    sums = tl.fma(before, old[:, None, None], sums * new[:, None, None])
    return high, tl.fma(weight_before, old, weight * new), sums


@triton.jit
def shares(first, second):
    """Return the larger of two largest scores (log2), and what sums that go with each count for."""
    high = tl.maximum(first, second)
    base = tl.where(high == float("-inf"), 0.0, high)
    return high, tl.exp2(first - base), tl.exp2(second - base)


@triton.jit
def settle(nothing, ASM: tl.constexpr):
    """Make what a lane wrote visible to the others of its warp; there is one. A barrier would end the pipeline."""
    if ASM:
        tl.inline_asm_elementwise(
            "{ bar.warp.sync 0xffffffff; mov.b32 $0, $1; }", "=r,r", [nothing], dtype=tl.int32, is_pure=False, pack=1
        )
