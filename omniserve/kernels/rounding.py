"""Divisions and rounding that keep the bits of a reference and cost few instructions.

`tl.div_rn` takes some 20 instructions and a branch for each number; the kernels of rows would spend their time there
instead of waiting for memory. A quotient from a reciprocal, corrected once by its exact remainder, is the correctly
rounded one (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990) in three.
ASM is False in Triton's interpreter, which knows neither PTX nor a fused multiply-add: there the division is plain.
"""

import triton
import triton.language as tl

_WHOLE = tl.constexpr(12582912.0)
"""1.5 * 2^23: a sum with it has no bit left for fractions, so that it rounds to nearest even."""
_WHOLE_BITS = tl.constexpr(0x4B400000)


@triton.jit
def reciprocal(x, ASM: tl.constexpr):
    """Return 1 / x of fp32 numbers, off by at most one unit in the last place; 0 for infinity."""
    if ASM:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.div_rn(1.0, x)


@triton.jit
def quotient(value, step, ASM: tl.constexpr):
    """Return value / step of fp32 numbers, rounded to nearest; steps between 2^-100 and 2^100; -0.0 becomes 0.0."""
    if ASM:
        guess = reciprocal(step, ASM)
        inverse = tl.fma(guess, tl.fma(-step, guess, 1.0), guess)
        q = value * inverse
        return tl.fma(tl.fma(-q, step, value), inverse, q)
    else:
        return tl.div_rn(value, step) + 0.0


@triton.jit
def share(value, of: tl.constexpr, ASM: tl.constexpr):
    """Return value / of, rounded to nearest; `of` is a small whole number."""
    if ASM:
        INVERSE: tl.constexpr = 1.0 / of
        q = value * INVERSE
        return tl.fma(tl.fma(-q, of, value), INVERSE, q)
    else:
        return tl.div_rn(value, of)


@triton.jit
def nearest(value):
    """Return fp32 numbers up to 2^22 as int32, rounded to nearest even."""
    return (value + _WHOLE).to(tl.int32, bitcast=True) - _WHOLE_BITS


@triton.jit
def clamped(value, TOP: tl.constexpr):
    """Return `nearest` of fp32 numbers of any size, clamped to 0..TOP, a power of two less one."""
    whole = tl.minimum(tl.maximum(value + _WHOLE, _WHOLE), _WHOLE + TOP)
    return whole.to(tl.int32, bitcast=True) & TOP


@triton.jit
def magnitude(value):
    """Return the bits of fp32 numbers without their signs: larger for larger numbers, and NaN above all."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
