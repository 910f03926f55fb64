"""`draw_filtered` without a sort: the last token that filters leave is found by parting the range of the logits.

Each level parts the range in which that token may lie and adds up the weights above every border, all rows and parts of
rows at once; what still lies in the range is then listed, and one program for a row finds the token among it. Weights
are whole numbers, so their sums have no order. A row in which more than a list holds lies in the last range (very many
equal logits, a top_k of thousands) is read over and over by its program: slower, but no other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.kernels.device import OUTPUTS, kernel_of, need
from omniserve.kernels.draw import parameters, uniform
from omniserve.kernels.pick import PART, logit_of, parts_kernel
from omniserve.ops.nucleus import LEAST, LOG2_E, POLYNOMIAL, UNITS
from omniserve.ops.sample import Chance, draw_filtered

LEVELS = 3
"""How often the range is parted, unless a list holds it before."""
BORDERS = 8
"""Into how many ranges."""
LIST = 4096
"""Tokens that the last range may hold to be listed."""
CHUNK = 1024
"""Tokens that the last program takes at once."""
WARPS = 8
"""Of each program."""
STATE = 16
"""Numbers of a row's state: see `_narrowed`; the last one counts the list."""

_LEAST, _LOG2_E, _ONE, _SHIFT = (tl.constexpr(one) for one in (LEAST, LOG2_E, 2.0**UNITS, UNITS - 30))
_DEPTH = tl.constexpr((UNITS + 1) / LOG2_E)
_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(factor) for factor in POLYNOMIAL)
_COUNT, _NUMBER, _WEIGHT = tl.constexpr(51), tl.constexpr(1 << 51), tl.constexpr((1 << 51) - 1)
"""A token's weight has a one at bit 51, so that a part's sum holds their number as well: 13 bits and 51."""
_STATE, _LIST, _CHUNK = tl.constexpr(STATE), tl.constexpr(LIST), tl.constexpr(CHUNK)
_LISTED = tl.constexpr(STATE - 1)

assert PART << UNITS < 1 << 51 and PART < 1 << 13

_ANYWHERE = ["rows", "seed", "position", "top_k", "temperature", "top_p", "min_p"]
_ANY = ["parts"]


@triton.jit
def _weight(x, largest, heat, least):
    """`ops.nucleus.weights` of logits fp32, 0 for those less than `least`."""
    power = (x - largest) * heat
    power = tl.where(power > _LEAST, power, _LEAST)
    whole = (power + 12582912.0) - 12582912.0  # rounds to the nearest whole number
    part = power - whole
    value = part * _C5 + _C4
    value = value * part + _C3
    value = value * part + _C2
    value = value * part + _C1
    value = value * part + _C0
    value = value * part + 1.0
    bits = (value * 1073741824.0).to(tl.int32).to(tl.int64)
    weight = (bits << _SHIFT) >> (-whole).to(tl.int32).to(tl.int64)
    return tl.where(weight >= least, weight, 0)


@triton.jit
def _ceiling(x):
    """Return fp64 numbers rounded up, int64."""
    whole = x.to(tl.int64)
    return whole + (whole.to(tl.float64) < x).to(tl.int64)


@triton.jit
def _ordered(x):
    """Return int32 numbers that are ordered like fp32 ones."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(ordered):
    """The reverse."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _row(keys, temperature, min_p, row, parts, PARTS: tl.constexpr):
    """Return a row's largest logit fp32, the factor that makes binary logarithms, and the least weight that stays."""
    each = tl.arange(0, PARTS)
    key = tl.max(tl.load(keys + row * parts + each, mask=each < parts, other=-0x8000000000000000), 0)
    heat = (tl.full((), _LOG2_E, tl.float64) / tl.load(temperature + row)).to(tl.float32)
    least = tl.maximum(_ceiling(tl.load(min_p + row) * _ONE), 1)
    return logit_of(key), heat, least


@triton.jit
def _limit(total, p):
    """`ops.nucleus._limit` of one row."""
    some = tl.maximum(_ceiling(p * total.to(tl.float64)), 1)
    return tl.where(p < 1.0, some, total)


@triton.jit
def _narrowed(state, sums, top_k, top_p, row, rows, parts, LEVEL: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr):
    """Return a row's range after `LEVEL` levels, from its state and sums at the level before.

    state int64 [levels + 1, S, STATE]: low, high, weight and number from low on, the same from high on, total weight,
    top_k, then the borders of the level. What lies from `high` on stays, what lies below `low` does not; both are
    `_ordered` logits.
    """
    before = state + ((LEVEL - 1) * rows + row) * _STATE
    low, high = tl.load(before), tl.load(before + 1)
    weight_high, number_high = tl.load(before + 4), tl.load(before + 5)
    each, border = tl.arange(0, PARTS), tl.arange(0, M)
    t = tl.load(sums + ((LEVEL - 1) * rows + row) * (parts + 1) * M + parts * M + border)
    place = ((LEVEL - 1) * rows + row) * (parts + 1) * M + each[:, None] * M + border[None, :]
    both = tl.load(sums + place, mask=each[:, None] < parts, other=0)
    weight = tl.sum(both & _WEIGHT, 0)
    number = tl.sum((both >> _COUNT) & 0x1FFF, 0)
    if LEVEL == 1:
        total, weight_low, number_low = tl.max(weight, 0), tl.max(weight, 0), tl.max(number, 0)
        k = tl.load(top_k + row)
        k = tl.where(k < number_low, k, 0)
        done = number_low < 0
    else:
        weight_low, number_low, total = tl.load(before + 2), tl.load(before + 3), tl.load(before + 6)
        k = tl.load(before + 7)
        done = number_low - number_high <= _LIST
    if not done:
        p = tl.load(top_p + row)
        among = tl.where(k > 0, tl.maximum(tl.max(tl.where(number <= k, weight, 0), 0), weight_high), total)
        limit = tl.where(p < 1.0, _limit(among, p), total)
        stay = ((k == 0) | (number <= k)) & (weight <= limit)
        go = tl.where(k > 0, number >= k, weight >= limit)
        high = tl.minimum(high, tl.min(tl.where(stay, t, 0x7FFFFFFFFFFF), 0))
        weight_high = tl.maximum(weight_high, tl.max(tl.where(stay, weight, 0), 0))
        number_high = tl.maximum(number_high, tl.max(tl.where(stay, number, 0), 0))
        low = tl.minimum(tl.maximum(low, tl.max(tl.where(go, t, -0x7FFFFFFFFFFF), 0)), high)
        weight_low = tl.minimum(weight_low, tl.min(tl.where(go, weight, 0x7FFFFFFFFFFFFFFF), 0))
        number_low = tl.minimum(number_low, tl.min(tl.where(go, number, 0x7FFFFFFFFFFF), 0))
    return low, high, weight_low, number_low, weight_high, number_high, total, k


@triton.jit
def _keep(state, row, rows, LEVEL: tl.constexpr, a, b, c, d, e, f, g, h):
    """Store the state of a row at a level."""
    at = state + (LEVEL * rows + row) * _STATE
    tl.store(at, a)
    tl.store(at + 1, b)
    tl.store(at + 2, c)
    tl.store(at + 3, d)
    tl.store(at + 4, e)
    tl.store(at + 5, f)
    tl.store(at + 6, g)
    tl.store(at + 7, h)


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def level_kernel(
    logits,
    rows,  # int64 [S]
    keys,  # of `parts_kernel`
    state,  # int64 [levels + 1, S, STATE]
    sums,  # int64 [levels, S, parts + 1, M]: of each part the weight and number above the borders; at last the borders
    temperature,  # fp64 [S]
    top_k,
    top_p,
    min_p,
    V,
    stride,
    parts,
    LEVEL: tl.constexpr,
    PARTS: tl.constexpr,  # parts, rounded up to a power of two
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part the range and add up what lies above each border."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    many = tl.num_programs(1)
    largest, heat, least = _row(keys, temperature, min_p, row, parts, PARTS)
    border = tl.arange(0, M)
    share = (border + 1).to(tl.float32) / M
    if LEVEL == 0:
        top, none = _ordered(largest).to(tl.int64), parts * 0
        deep = (tl.load(temperature + row) * _DEPTH).to(tl.float32)  # what lies below weighs nothing
        t = tl.minimum(_ordered(largest - share * share * deep).to(tl.int64), top)
        low, high = tl.min(t, 0), top + 1
        weight_low, number_low, weight_high, number_high, total, k = none, none, none, none, none, none
        done = part < 0
    else:
        low, high, weight_low, number_low, weight_high, number_high, total, k = _narrowed(
            state, sums, top_k, top_p, row, many, parts, LEVEL, PARTS, M
        )
        upper, lower = _value(high.to(tl.int32)), _value(low.to(tl.int32))
        t = _ordered(upper - (upper - lower) * share).to(tl.int64)
        t = tl.where(border == M - 1, low, tl.minimum(tl.maximum(t, low), high))
        done = number_low - number_high <= _LIST
    if part == 0:
        _keep(state, row, many, LEVEL, low, high, weight_low, number_low, weight_high, number_high, total, k)
        if LEVEL == 0:
            tl.store(state + row * _STATE + _LISTED, number_low)
    if done:
        return
    sums += (LEVEL * many + row) * (parts + 1) * M + border
    if part == 0:
        tl.store(sums + parts * M, t)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + tl.load(rows + row) * stride + at, mask=at < V, other=-float("inf")).to(tl.float32)
    weight = _weight(x, largest, heat, least)
    both = tl.where(weight > 0, weight + _NUMBER, 0)
    above = _ordered(x)[None, :] >= t.to(tl.int32)[:, None]
    tl.store(sums + part * M, tl.sum(tl.where(above, both[None, :], 0), 1))


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def list_kernel(
    logits, rows, keys, state, sums, sure, listed, temperature, top_k, top_p, min_p, V, stride, parts,
    LEVEL: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List what lies in the range; sure int64 [S, parts]: the weight of what lies above, listed int64 [S, LIST]."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    many = tl.num_programs(1)
    largest, heat, least = _row(keys, temperature, min_p, row, parts, PARTS)
    low, high, weight_low, number_low, weight_high, number_high, total, k = _narrowed(
        state, sums, top_k, top_p, row, many, parts, LEVEL, PARTS, M
    )
    if part == 0:
        _keep(state, row, many, LEVEL, low, high, weight_low, number_low, weight_high, number_high, total, k)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + tl.load(rows + row) * stride + at, mask=at < V, other=-float("inf")).to(tl.float32)
    weight = _weight(x, largest, heat, least)
    ordered = _ordered(x).to(tl.int64)
    tl.store(sure + row * parts + part, tl.sum(tl.where(ordered >= high, weight, 0), 0))
    inside = (ordered < high) & (ordered >= low) & (weight > 0)
    number = tl.sum(inside.to(tl.int32), 0)
    if (number > 0) & (number_low - number_high <= _LIST):
        first = tl.atomic_add(state + row * _STATE + _LISTED, number.to(tl.int64))
        place = first + tl.cumsum(inside.to(tl.int32), 0) - 1
        key = (ordered << 31) | (0x7FFFFFFF - at).to(tl.int64)
        tl.store(listed + row * _LIST + place, key, mask=inside & (place < _LIST))


@triton.jit
def _some(logits, listed, in_list, first, number, low, high, largest, heat, least):
    """Return keys and weights of tokens in the range, weight 0 beyond: those that are listed, or of the whole row."""
    at = first + tl.arange(0, _CHUNK)
    key = tl.load(listed + at, mask=in_list & (at < number), other=-0x8000000000000000)
    x = tl.load(logits + at, mask=(in_list == 0) & (at < number), other=-float("inf")).to(tl.float32)
    key = tl.where(in_list, key, (_ordered(x).to(tl.int64) << 31) | (0x7FFFFFFF - at).to(tl.int64))
    ordered = key >> 31
    weight = _weight(_value(ordered.to(tl.int32)), largest, heat, least)
    return key, tl.where((at < number) & (ordered < high) & (ordered >= low), weight, 0)


@triton.jit
def _last(
    logits, listed, in_list, number, low, high, largest, heat, least, base, others,
    limit, under, over, weight_under, number_under, weight_over, number_over, COUNT: tl.constexpr,
):  # fmt: skip
    """Return the key beyond which tokens stay, those that less than `limit` precede, and their weight and number.

    base, others  weight and number of the tokens above the range
    under, over   the key lies between them; with the weight and number of what lies beyond each
    COUNT         the limit is one of numbers
    """
    way = tl.arange(0, 8)
    if COUNT:
        none, every = number_over >= limit, number_under < limit
    else:
        none, every = weight_over >= limit, weight_under < limit
    under = tl.where(none, over, under)
    weight_under = tl.where(none, weight_over, weight_under)
    number_under = tl.where(none, number_over, number_under)
    number_over = tl.where(every, number_under, number_over)  # nothing is left to look for
    while (number_under - number_over > 1) & (over - under > 1):
        step = tl.maximum((over - under) >> 3, 1)
        t = tl.minimum(under + step * (way + 1), over)
        t = tl.where(way == 7, over, t)
        weights = tl.zeros((8,), tl.int64) + base
        numbers = tl.zeros((8,), tl.int64) + others
        for first in range(0, number, _CHUNK):
            key, weight = _some(logits, listed, in_list, first, number, low, high, largest, heat, least)
            beyond = key[None, :] > t[:, None]
            weights += tl.sum(tl.where(beyond, weight[None, :], 0), 1)
            numbers += tl.sum((beyond & (weight > 0)[None, :]).to(tl.int32), 1).to(tl.int64)
        out = numbers >= limit if COUNT else weights >= limit
        under = tl.maximum(under, tl.max(tl.where(out, t, -0x8000000000000000), 0))
        weight_under = tl.minimum(weight_under, tl.min(tl.where(out, weights, 0x7FFFFFFFFFFFFFFF), 0))
        number_under = tl.minimum(number_under, tl.min(tl.where(out, numbers, 0x7FFFFFFFFFFFFFFF), 0))
        over = tl.minimum(over, tl.min(tl.where(out, 0x7FFFFFFFFFFFFFFF, t), 0))
        weight_over = tl.maximum(weight_over, tl.max(tl.where(out, 0, weights), 0))
        number_over = tl.maximum(number_over, tl.max(tl.where(out, 0, numbers), 0))
    return under, weight_under, number_under


@triton.jit
def _beyond(cumulative, weight, target, at):
    """Return where the sum passes the target; 0 if it does not, which it does wherever anything may be drawn."""
    found = tl.min(tl.where((cumulative > target) & (weight > 0), at, 0x7FFFFFFF), 0)
    return tl.where(found == 0x7FFFFFFF, 0, found)


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def nucleus_kernel(
    logits, rows, keys, state, sure, listed, out, seed, position, temperature, top_p, min_p, V, stride, parts,
    LEVEL: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token that a row draws, from its last range and the list of what lies in it."""
    row = tl.program_id(0).to(tl.int64)
    many = tl.num_programs(0)
    largest, heat, least = _row(keys, temperature, min_p, row, parts, PARTS)
    at = state + (LEVEL * many + row) * _STATE
    low, high = tl.load(at), tl.load(at + 1)
    weight_low, number_low = tl.load(at + 2), tl.load(at + 3)
    weight_high, number_high = tl.load(at + 4), tl.load(at + 5)
    total, k, p = tl.load(at + 6), tl.load(at + 7), tl.load(top_p + row)
    u = uniform(tl.load(seed + row), tl.load(position + row))
    logits += tl.load(rows + row) * stride
    listed += row * _LIST
    sure += row * parts
    in_list = number_low - number_high <= _LIST
    number = tl.where(in_list, number_low - number_high, V).to(tl.int32)
    under, over = (low << 31) - 1, (high << 31) - 1
    weight, left = weight_low, number_low
    if k > 0:
        under, weight, left = _last(
            logits, listed, in_list, number, low, high, largest, heat, least, weight_high, number_high,
            k, under, over, weight, left, weight_high, number_high, True,
        )  # fmt: skip
        total = weight
    if p < 1.0:
        under, weight, left = _last(
            logits, listed, in_list, number, low, high, largest, heat, least, weight_high, number_high,
            _limit(total, p), under, over, weight, left, weight_high, number_high, False,
        )  # fmt: skip
    target = tl.minimum((u * weight.to(tl.float64)).to(tl.int64), weight - 1)
    each = tl.arange(0, PARTS)
    mass = tl.load(sure + each, mask=each < parts, other=0)
    for first in range(0, number, _CHUNK):
        key, one = _some(logits, listed, in_list, first, number, low, high, largest, heat, least)
        of = (0x7FFFFFFF - (key & 0x7FFFFFFF)) // BLOCK
        here = (each[:, None] == of[None, :]) & (key > under)[None, :]
        mass += tl.sum(tl.where(here, one[None, :], 0), 1)
    part = _beyond(tl.cumsum(mass, 0), mass, target, each)
    before = tl.sum(tl.where(each < part, mass, 0), 0)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + at, mask=at < V, other=-float("inf")).to(tl.float32)
    key = (_ordered(x).to(tl.int64) << 31) | (0x7FFFFFFF - at).to(tl.int64)
    one = tl.where(key > under, _weight(x, largest, heat, least), 0)
    token = _beyond(before + tl.cumsum(one, 0), one, target, at)
    tl.store(out + row, tl.minimum(token, V - 1).to(tl.int64))


@kernel_of(draw_filtered)
def draw_filtered_triton(logits: Tensor, chance: Chance) -> Tensor:
    """Six launches, whose grids depend on the number of rows alone."""
    need(logits.dtype in OUTPUTS, f"a draw from {logits.dtype} on a GPU: float16, bfloat16 and float32 are there")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    vocab, rows = logits.shape[1], chance.rows.shape[0]
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    parts = ceil_div(vocab, PART)
    sizes = (
        rows * parts, (LEVELS + 1) * rows * STATE, LEVELS * rows * (parts + 1) * BORDERS, rows * parts, rows * LIST,
    )  # fmt: skip
    keys, state, sums, sure, listed = torch.empty(sum(sizes), dtype=torch.int64, device=logits.device).split(sizes)
    where, seed, position, top_k, temperature, top_p, min_p = parameters(chance)
    stride, padded, grid = logits.stride(0), triton.next_power_of_2(parts), (parts, rows)
    filters = temperature, top_k, top_p, min_p, vocab, stride, parts
    parts_kernel[grid](logits, where, keys, vocab, stride, parts, True, PART, num_warps=8)
    for level in range(LEVELS):
        level_kernel[grid](
            logits, where, keys, state, sums, *filters, level, padded, BORDERS, PART,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    list_kernel[grid](
        logits, where, keys, state, sums, sure, listed, *filters, LEVELS, padded, BORDERS, PART,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    nucleus_kernel[(rows,)](
        logits, where, keys, state, sure, listed, out, seed, position, temperature, top_p, min_p, vocab, stride, parts,
        LEVELS, padded, PART, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
