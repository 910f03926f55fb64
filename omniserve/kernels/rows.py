"""Operations on whole rows of activations, one program per token: each ends in the format that the next linear wants.

Scale and codes follow the reference to the last rounding: correctly rounded quotients, rounding to nearest even, no
multiply-add that the compiler fused. Codes are taken from fp32 values that were never rounded to the model's dtype.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.kernels.device import INTERPRETED, OUTPUTS, kernel_of, need, pdl, processors
from omniserve.kernels.handover import handed_over
from omniserve.kernels.rounding import magnitude, nearest, quotient, reciprocal, share
from omniserve.ops.act import FLOOR, Act, ActFormat, Both, Int8, Plain, quantize
from omniserve.ops.glu import swiglu
from omniserve.ops.norm import add_norm

WIDEST = 32768
"""Columns that one program holds in its registers."""

_FLOOR = tl.constexpr(FLOOR)


@triton.jit
def _step(amax, ASM: tl.constexpr):
    """Return the scale of a row; NaN of NaN."""
    return share(tl.where(amax < _FLOOR, _FLOOR, amax), 127.0, ASM)


@triton.jit
def _emit(
    value, keep, place, row, plain, codes, scale, total,
    PLAIN: tl.constexpr, INT8: tl.constexpr, SUM: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Write fp32 values of a row (0 where not `keep`) as plain numbers, as int8 codes with a scale, or as both.

    A row with NaN gets the scale NaN. No code leaves -127..127: the largest number over its own scale is 127.
    """
    if PLAIN:
        tl.store(plain + place, value.to(plain.dtype.element_ty), mask=keep)
    if INT8:
        step = _step(tl.max(magnitude(value), 0).to(tl.float32, bitcast=True), ASM)
        code = nearest(quotient(value, step, ASM))
        tl.store(codes + place, code.to(tl.int8), mask=keep)
        tl.store(scale + row, step)
        if SUM:
            tl.store(total + row, tl.sum(code, 0))


@triton.jit
def quantize_kernel(
    x,  # [T, C], rows `x_stride` apart
    codes,
    scale,
    total,
    C,
    x_stride,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantize one row."""
    if PDL:
        handed_over()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    keep = at < C
    value = tl.load(x + row * x_stride + at, mask=keep, other=0.0).to(tl.float32)
    _emit(value, keep, row * C + at, row, codes, codes, scale, total, False, True, SUM, ASM)


@triton.jit
def add_norm_kernel(
    x,  # [T, C], rows `x_stride` apart
    delta,  # [T, C], rows `delta_stride` apart, read if DELTA
    weight,  # [C]
    residual,  # [T, C], written if DELTA
    plain,
    codes,
    scale,
    total,
    C,
    x_stride,
    delta_stride,
    eps,
    DELTA: tl.constexpr,
    PLAIN: tl.constexpr,
    INT8: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add, norm and emit one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    keep = at < C
    place = row * C + at
    EARLY: tl.constexpr = PDL and BLOCK <= 16384  # wider rows have no registers for it
    if EARLY:  # before the kernel before ends
        gain = tl.load(weight + at, mask=keep, other=0.0).to(tl.float32)
    if PDL:
        handed_over()
    value = tl.load(x + row * x_stride + at, mask=keep, other=0.0).to(tl.float32)
    if DELTA:
        value += tl.load(delta + row * delta_stride + at, mask=keep, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)  # the stream has the model's dtype, and so has what is normed
        tl.store(residual + place, rounded, mask=keep)
        value = rounded.to(tl.float32)
    mean = tl.div_rn(tl.sum(value * value, 0), 1.0 * C)
    value = value * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    if not EARLY:
        gain = tl.load(weight + at, mask=keep, other=0.0).to(tl.float32)
    value = value * gain
    _emit(value, keep, place, row, plain, codes, scale, total, PLAIN, INT8, SUM, ASM)


@triton.jit
def swiglu_kernel(
    x,  # [T, 2 C], rows `x_stride` apart: C columns of gate, then C of up
    plain,
    codes,
    scale,
    total,
    C,
    x_stride,
    PLAIN: tl.constexpr,
    INT8: tl.constexpr,
    SUM: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply silu(gate) by up and emit one row, chunk by chunk: the products stay in registers for both passes."""
    if PDL:
        handed_over()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNK)
    values = ()
    most = tl.zeros((CHUNK,), tl.int32)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + at
        keep = column < C
        gate = tl.load(x + row * x_stride + column, mask=keep, other=0.0).to(tl.float32)
        value = gate * reciprocal(1.0 + tl.exp(-gate), ASM)
        value = value * tl.load(x + row * x_stride + C + column, mask=keep, other=0.0).to(tl.float32)
        if PLAIN:
            tl.store(plain + row * C + column, value.to(plain.dtype.element_ty), mask=keep)
        most = tl.maximum(most, magnitude(value))
        values = values + (value,)  # noqa: RUF005  # Triton knows no unpacking
    if INT8:
        step = _step(tl.max(most, 0).to(tl.float32, bitcast=True), ASM)
        sums = tl.zeros((CHUNK,), tl.int32)
        for chunk in tl.static_range(CHUNKS):
            column = chunk * CHUNK + at
            code = nearest(quotient(values[chunk], step, ASM))
            tl.store(codes + row * C + column, code.to(tl.int8), mask=column < C)
            sums += code
        tl.store(scale + row, step)
        if SUM:
            tl.store(total + row, tl.sum(sums, 0))


@triton.jit
def _heard(board):
    """Return what other programs have written on the board, and see all that they wrote before."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b64 $0, [$1];", "=l,l", [board.to(tl.int64, bitcast=True)], tl.int64, False, 1
    )


@triton.jit(do_not_specialize=["parts"])
def swiglu_parts_kernel(
    x,  # [T, 2 C], rows `x_stride` apart
    plain,
    codes,
    scale,
    total,
    board,  # int64 [T or more, PARTS]: the number of a launch in the upper half, the largest magnitude in the lower
    C,
    x_stride,
    parts,
    PLAIN: tl.constexpr,
    SUM: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,  # parts, rounded up to a power of two
):
    """`swiglu_kernel` for few rows: CHUNK columns of a row; its programs tell each other their largest magnitudes.

    They wait for each other, so all programs of a launch must fit the card at once. What a program finds in its place
    tells it the number of the launch: nobody clears the board.
    """
    handed_over()
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = part * CHUNK + tl.arange(0, CHUNK)
    keep = column < C
    board += row * PARTS
    launch = (tl.load(board + part) >> 32).to(tl.int32) + 1
    if SUM and part == 0:
        tl.store(total + row, 0)  # before the others hear of this part
    gate = tl.load(x + row * x_stride + column, mask=keep, other=0.0).to(tl.float32)
    value = gate * reciprocal(1.0 + tl.exp(-gate), True)
    value = value * tl.load(x + row * x_stride + C + column, mask=keep, other=0.0).to(tl.float32)
    if PLAIN:
        tl.store(plain + row * C + column, value.to(plain.dtype.element_ty), mask=keep)
    most = tl.max(magnitude(value), 0)
    tl.atomic_xchg(board + part, (launch.to(tl.int64) << 32) | most.to(tl.int64), sem="release")
    each = tl.arange(0, PARTS)
    missing = 1
    while missing > 0:
        heard = _heard(board + each)
        missing = tl.max(((each < parts) & ((heard >> 32).to(tl.int32) != launch)).to(tl.int32), 0)
        most = tl.max(tl.where(each < parts, heard.to(tl.int32), 0), 0)
    step = _step(most.to(tl.float32, bitcast=True), True)
    code = nearest(quotient(value, step, True))
    tl.store(codes + row * C + column, code.to(tl.int8), mask=keep)
    if part == 0:
        tl.store(scale + row, step)
    if SUM:
        tl.atomic_add(total + row, tl.sum(code, 0), sem="relaxed")


def block_of(columns: int) -> tuple[int, int]:
    """Return (columns that a program covers, its warps)."""
    block = max(128, triton.next_power_of_2(columns))
    warps = max(min(block // 256, 4), block // 1024, 1)
    return block, min(warps, 32)


CHUNK_WARPS = 16
"""Warps of one program of `swiglu_kernel`; each of their threads takes 16 bytes of gate and of up at a time."""


def chunks_of(columns: int, element_bytes: int) -> tuple[int, int]:
    """Return (columns of a chunk, chunks of a row) of `swiglu_kernel`."""
    chunk = min(max(128, triton.next_power_of_2(columns)), CHUNK_WARPS * 32 * 16 // element_bytes)
    return chunk, triton.cdiv(columns, chunk)


PART, PART_WARPS = 2048, 8
"""Columns of one program of `swiglu_parts_kernel`, and its warps."""


@functools.cache
def _board(parts: int, device: torch.device) -> Tensor:
    """Return where the programs of a launch meet: one for every number of parts, since all parts of a row count alike.

    Launches follow each other: no two meet there at the same time.
    """
    return torch.zeros(processors() * triton.next_power_of_2(parts), dtype=torch.int64, device=device)


class _Result:
    """Memory of an activation in the wanted format; `plain` and the others stand in for each other where unused."""

    def __init__(self, rows: int, columns: int, wants: ActFormat, dtype: torch.dtype, device: torch.device) -> None:
        self.plain_wanted = wants in (ActFormat.PLAIN, ActFormat.BOTH, ActFormat.BOTH_SUM)
        self.int8_wanted = wants is not ActFormat.PLAIN
        self.sums = wants.sums
        self.dtype = dtype

        def new(width: int, kind: torch.dtype, wanted: bool) -> Tensor | None:
            return torch.empty(rows, width, dtype=kind, device=device) if wanted else None

        self.plain = new(columns, dtype, self.plain_wanted)
        self.codes = new(columns, torch.int8, self.int8_wanted)
        self.scale = new(1, torch.float32, self.int8_wanted)
        self.total = new(1, torch.int32, self.sums)

    def pointers(self, spare: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return plain, codes, scale, sum for a launch; `spare` stands for those that are not written."""
        return tuple(spare if t is None else t for t in (self.plain, self.codes, self.scale, self.total))

    def act(self) -> Act:
        """Return the activation."""
        if not self.int8_wanted:
            return Plain(self.plain)
        int8 = Int8(self.codes, self.scale, self.total, self.dtype)
        return Both(Plain(self.plain), int8) if self.plain_wanted else int8


def _checked(x: Tensor, columns: int, what: str) -> Tensor:
    """Return x with adjacent columns. Raises ConfigError if no kernel takes it."""
    need(x.dtype in OUTPUTS, f"{what} of {x.dtype} on a GPU: float16, bfloat16 and float32 are there")
    need(columns <= WIDEST, f"{what} of rows of {columns} on a GPU: up to {WIDEST} are there")
    return x if x.stride(1) == 1 else x.contiguous()


@kernel_of(quantize)
def quantize_triton(x: Tensor, wants: ActFormat) -> Act:
    """One launch; none where the activations stay as they are."""
    if wants is ActFormat.PLAIN:
        return Plain(x)
    rows, columns = x.shape
    x = _checked(x, columns, "quantize")
    result = _Result(rows, columns, ActFormat.INT8_SUM if wants.sums else ActFormat.INT8, x.dtype, x.device)
    block, warps = block_of(columns)
    if rows:
        _, codes, scale, total = result.pointers(x)
        quantize_kernel[(rows,)](
            x,
            codes,
            scale,
            total,
            columns,
            x.stride(0),
            result.sums,
            block,
            not INTERPRETED,
            pdl(),
            num_warps=warps,
            enable_fp_fusion=False,
            launch_pdl=pdl(),
        )
    act = result.act()
    return Both(Plain(x), act) if wants in (ActFormat.BOTH, ActFormat.BOTH_SUM) else act


@kernel_of(add_norm)
def add_norm_triton(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, wants: ActFormat
) -> tuple[Act, Tensor]:
    """Sum, norm and quantization in one launch."""
    rows, columns = x.shape
    need(delta is None or delta.dtype == x.dtype, f"add_norm of {x.dtype} and {delta is not None and delta.dtype}")
    x = _checked(x, columns, "add_norm")
    change = x if delta is None else _checked(delta, columns, "add_norm")
    residual = x if delta is None else torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    result = _Result(rows, columns, wants, x.dtype, x.device)
    block, warps = block_of(columns)
    if rows:
        add_norm_kernel[(rows,)](
            x, change, weight.contiguous(), residual, *result.pointers(residual), columns, x.stride(0),
            change.stride(0), eps, delta is not None, result.plain_wanted, result.int8_wanted, result.sums, block,
            not INTERPRETED, pdl(),
            num_warps=warps, enable_fp_fusion=False, launch_pdl=pdl(),
        )  # fmt: skip
    return result.act(), residual


@kernel_of(swiglu)
def swiglu_triton(product: Tensor, wants: ActFormat, dtype: torch.dtype) -> Act:
    """Product and quantization in one launch."""
    rows, columns = product.shape[0], product.shape[1] // 2
    product = _checked(product, columns, "swiglu")
    need(dtype in OUTPUTS, f"swiglu in {dtype} on a GPU: float16, bfloat16 and float32 are there")
    result = _Result(rows, columns, wants, dtype, product.device)
    parts = ceil_div(columns, PART)
    if pdl() and result.int8_wanted and parts > 1 and 0 < rows * parts <= processors():
        swiglu_parts_kernel[(parts, rows)](
            product, *result.pointers(product), _board(parts, product.device), columns, product.stride(0), parts,
            result.plain_wanted, result.sums, PART, triton.next_power_of_2(parts), num_warps=PART_WARPS,
            enable_fp_fusion=False, launch_pdl=True,
        )  # fmt: skip
    elif rows:
        swiglu_kernel[(rows,)](
            product, *result.pointers(product), columns, product.stride(0), result.plain_wanted, result.int8_wanted,
            result.sums, *chunks_of(columns, product.element_size()), not INTERPRETED, pdl(), num_warps=CHUNK_WARPS,
            enable_fp_fusion=False, launch_pdl=pdl(),
        )  # fmt: skip
    return result.act()
