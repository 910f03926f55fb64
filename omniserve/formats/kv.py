"""What a KV precision is: bytes of a page, how keys and values become codes, and how pages are written and read.

A page is 64 tokens of one key head, contiguous: K codes, V codes, then fp16 k_scale, k_zero, v_scale, v_zero of 64
each (formats.md section 11). 16- and 32-bit pages hold plain numbers and no parameters.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from omniserve.base.config import KVName
from omniserve.base.errors import CheckpointError
from omniserve.base.types import PAGE

SMALLEST = 2.0**-14
"""Floor of dynamic scales: the smallest normal fp16."""

LARGEST = 65504.0
"""The largest fp16; ranges that need a larger scale saturate instead of becoming infinite."""

STATIC_ZERO = 128
"""Zero of static int8: codes -128..127 are stored as 0..255."""


LOGICAL = 16
"""Tokens of a logical page, the unit of statistics. It is the format, like the page."""


def _half_above(x: Tensor) -> Tensor:
    """Return the smallest fp16 that is not below x."""
    half = x.half()
    short = half.to(x.dtype) < x
    bits = half.view(torch.int16)
    # fp16 of one sign are ordered like their bits: up is one more for positive numbers, one less for negative ones.
    up = torch.where(bits < 0, torch.where(bits == -32768, 1, bits - 1), bits + 1)
    return torch.where(short, up, bits).to(torch.int16).view(torch.float16)


def pack_halves(codes: Tensor) -> Tensor:
    """Return codes 0..15 uint8 [..., D] as bytes [..., D / 2]: byte j holds dim j (low nibble) and j + D / 2 (high).

    The pair is the one that RoPE rotates. Writer, readers and kernels share this order through here alone.
    """
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def unpack_halves(packed: Tensor) -> Tensor:
    """Return the codes uint8 [..., D] of bytes [..., D / 2]; the inverse of `pack_halves`."""
    return torch.cat((packed & 15, packed >> 4), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """How the keys and values of a token and key head are stored.

    bits     4 or 8: codes with an fp16 scale and zero per token and head; 16 or 32: plain numbers
    element  type of what is stored: uint8 codes, or the numbers' own
    static   8 bits only: the scale is the layer's, given, symmetric
    """

    bits: Literal[4, 8, 16, 32]
    element: torch.dtype
    static: bool = False

    @property
    def name(self) -> str:
        """The word of `--precision`: kv4, kv8, kv16, kv32."""
        return f"kv{self.bits}"

    @property
    def quantized(self) -> bool:
        """True if pages hold codes, scales and zeros."""
        return self.bits < 16

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of one key or value of D numbers, without its scale and zero."""
        return head_dim * self.bits // 8

    def page_bytes(self, head_dim: int) -> int:
        """Bytes of a page: 64 tokens of one key head, keys and values."""
        return 2 * PAGE * self.code_bytes(head_dim) + (4 * PAGE * 2 if self.quantized else 0)

    def token_bytes(self, kv_heads: int, head_dim: int, layers: int) -> int:
        """Bytes that one token takes in all layers."""
        return self.page_bytes(head_dim) // PAGE * kv_heads * layers

    def encode(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return (codes [..., Db], params fp16 [..., 2]: scale and zero) of vectors x [..., D]; (x, None) if plain.

        scale  static formats: the given scales, shape [..., 1] against x

        Dynamic, n the largest code: s = fp16(max((hi - lo) / n, amax / 1024, 2^-14)), z = fp16(-lo / s) with the
        rounded s, code = clamp(rne(x / s + z), 0, n). The middle term keeps |z| <= 1024, where fp16 still resolves
        half a code. Static: s = fp16(scale), z = 128, the same code. fp32 arithmetic, fp64 if x is.
        Source: formats.md sections 10 and 11; the grid is QServe's (arXiv 2405.04532) with floors.
        """
        if not self.quantized:
            return x.to(self.element), None
        wide = x if x.dtype == torch.float64 else x.float()
        if self.static:
            assert scale is not None, "encode: a static format needs scales"
            s = scale.half().expand(*wide.shape[:-1], 1)
            z = torch.full_like(s, STATIC_ZERO)
        else:
            high, negative = wide.amax(-1, keepdim=True), wide.amin(-1, keepdim=True).neg_()
            amax = torch.maximum(high, negative)
            # Divided by a tensor: by a number, a GPU multiplies with its rounded reciprocal.
            step = high.add_(negative).div_(torch.full_like(high, self.top))
            s = torch.maximum(step, amax.div_(1024)).clamp_(SMALLEST, LARGEST).half()
            z = negative.div_(s).add_(0.0).half()  # never -0.0: which of two zeros is the smallest, nobody promises
        codes = (wide / s.to(wide.dtype)).add_(z).round_().clamp_(0, self.top).to(torch.uint8)
        return pack_halves(codes) if self.bits == 4 else codes, torch.cat((s, z), -1)

    def decode(self, codes: Tensor, params: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the vectors [..., D] in `dtype`: scale * (code - zero); fp32 arithmetic, fp64 if dtype is."""
        if params is None:
            return codes.to(dtype, memory_format=torch.contiguous_format)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        whole = unpack_halves(codes) if self.bits == 4 else codes
        scale, zero = params.to(wide).chunk(2, -1)
        return whole.to(wide, memory_format=torch.contiguous_format).sub_(zero).mul_(scale).to(dtype)


def kv_format(name: KVName, *, dtype: torch.dtype = torch.float16, static: bool = False) -> KVFormat:
    """Return the KV format of a precision's word.

    dtype   the model's: kv16 holds it if it is bf16, else fp16
    static  kv8 with the checkpoint's scales per layer
    """
    if name in ("kv4", "kv8"):
        assert name == "kv8" or not static, "kv_format: static scales exist for kv8 alone"
        return KVFormat(bits=4 if name == "kv4" else 8, element=torch.uint8, static=static)
    assert not static, f"kv_format: {name} has no scales"
    if name == "kv32":
        return KVFormat(bits=32, element=torch.float32)
    return KVFormat(bits=16, element=torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)


@dataclass(frozen=True, eq=False)
class LayerPages:
    """One layer's pages of one head group. `codes` and `params` are views of the memory of `pages`.

    pages     uint8 [pages, H, bytes], contiguous
    format, head_dim: what the bytes mean
    scale     [2, H] of K and V: given for static formats, else None
    statistics  fp16 [pages, H, 4, 2, D] or None: smallest and largest stored key, dim by dim, of each logical page of
              16 tokens; bounds are rounded outwards
    key_mean  [H, D] or None: is subtracted from the rotated keys before they are stored. Nothing is added back: all
              scores of a query shift alike, and softmax does not see it (qoq.md section 3, step 6)
    Raises CheckpointError if a static scale is not positive in fp16.
    """

    pages: Tensor
    format: KVFormat
    head_dim: int
    scale: Tensor | None = None
    key_mean: Tensor | None = None
    statistics: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes and make the views."""
        expected = self.format.page_bytes(self.head_dim)
        assert self.pages.dtype == torch.uint8 and self.pages.is_contiguous() and self.pages.shape[2] == expected, (
            f"LayerPages: pages is {self.pages.dtype} {list(self.pages.shape)}; "
            f"expected contiguous uint8 [pages, H, {expected}]"
        )
        mean = self.key_mean
        assert mean is None or mean.shape == (self.pages.shape[1], self.head_dim), (
            f"LayerPages: key_mean is {list(mean.shape)}; not [{self.pages.shape[1]}, {self.head_dim}]"
        )
        assert (self.scale is not None) == self.format.static, "LayerPages: scales belong to static formats alone"
        if self.scale is not None:
            heads = self.pages.shape[1]
            assert self.scale.shape == (2, heads), f"LayerPages: scale is {list(self.scale.shape)}; not [2, {heads}]"
            stored = self.scale.half()
            if not bool(((stored > 0) & torch.isfinite(stored)).all()):
                raise CheckpointError("a static KV scale is not a positive number that fp16 can hold")

    @property
    def heads(self) -> int:
        """Key heads of the group in this layer (H)."""
        return self.pages.shape[1]

    @cached_property
    def codes(self) -> Tensor:
        """[pages, H, 2, 64, Db] uint8, or D plain numbers: per token, K at 0 and V at 1."""
        pages, heads, _ = self.pages.shape
        region = self.pages[..., : self._split].view(self.format.element)
        return region.view(pages, heads, 2, PAGE, -1)

    @cached_property
    def params(self) -> Tensor:
        """Fp16 [pages, H, 4, 64]: k_scale, k_zero, v_scale, v_zero; [pages, H, 0, 64] for plain formats."""
        pages, heads, _ = self.pages.shape
        return self.pages[..., self._split :].view(torch.float16).view(pages, heads, -1, PAGE)

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k - key_mean, v [T, H, D] at slots int64 [T]: physical page * 64 + offset; -1 skips the token.

        Writing twice is the same as writing once. Looks at the slots from the host: free on the CPU; a GPU
        implementation skips in its kernel.
        """
        if slots.numel() and int(slots.amin()) < 0:
            keep = slots >= 0
            slots, k, v = slots[keep], k[keep], v[keep]
        at = (slots >> 6, slots & 63)
        if self.key_mean is not None:
            wide = torch.float64 if k.dtype == torch.float64 else torch.float32
            k, v = k.to(wide) - self.key_mean.to(wide), v.to(wide)
        codes, params = self.format.encode(torch.stack((k, v), 2), self._static)
        self._codes_by_slot.index_put_(at, codes)
        if params is not None:
            self._params_by_slot.index_put_(at, params.flatten(2))
        if self.statistics is not None and slots.numel():
            self._note(slots, torch.float64 if k.dtype == torch.float64 else torch.float32)

    def _note(self, slots: Tensor, dtype: torch.dtype) -> None:
        """Make the statistics of the logical pages that hold these slots anew, each up to its last slot among them.

        Keys of a sequence are written in the order of their positions, so what lies behind the last one is of a page's
        previous life. `dtype` is the one that `attend` reads in.
        """
        assert self.statistics is not None
        touched, inverse = torch.unique(slots // LOGICAL, return_inverse=True)
        last = torch.zeros_like(touched).scatter_reduce(0, inverse, slots % LOGICAL, "amax", include_self=False)
        page, part = touched // (PAGE // LOGICAL), touched % (PAGE // LOGICAL)
        within = torch.arange(LOGICAL, device=slots.device)
        place = (page[:, None], part[:, None] * LOGICAL + within)
        codes = self._codes_by_slot[(*place, slice(None), 0)]  # [touched, 16, H, Db]
        params = self._params_by_slot[(*place, slice(None), slice(0, 2))] if self.format.quantized else None
        keys = self.format.decode(codes, params, dtype)
        unused = (within > last[:, None])[..., None, None]
        low = keys.masked_fill(unused, float("inf")).amin(1)
        high = keys.masked_fill(unused, float("-inf")).amax(1)
        self.statistics[page, :, part] = torch.stack((-_half_above(-low), _half_above(high)), 2)

    def read(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys (less their mean) and values [R, H, P * 64, D] of pages ids [R, P] or [R, H, P], in `dtype`.

        An id below 0 (no page) reads page 0: the caller hides those keys, and unwritten places.
        """
        rows, listed = ids.shape[0], ids.shape[-1]
        heads = self.heads
        # Whole page-heads are gathered as bytes: ten times as fast as typed indexing.
        at = ids.view(rows, -1, listed).clamp(min=0).long().mul_(heads) + self._heads
        flat = self.pages.view(-1, self.pages.shape[2]).index_select(0, at.view(-1))
        shape = (rows, heads, listed, 2)
        codes = flat[:, : self._split].view(self.format.element).view(*shape, PAGE, -1).permute(3, 0, 1, 2, 4, 5)
        params = None
        if self.format.quantized:
            stored = flat[:, self._split :].view(torch.float16).view(*shape, 2, PAGE)
            params = stored.permute(3, 0, 1, 2, 5, 4)
        both = self.format.decode(codes, params, dtype).reshape(2, rows, heads, listed * PAGE, self.head_dim)
        return both[0], both[1]

    @cached_property
    def _split(self) -> int:
        """Bytes of codes, which the parameters follow."""
        return 2 * PAGE * self.format.code_bytes(self.head_dim)

    @cached_property
    def _codes_by_slot(self) -> Tensor:
        return self.codes.permute(0, 3, 1, 2, 4)

    @cached_property
    def _params_by_slot(self) -> Tensor:
        return self.params.permute(0, 3, 1, 2)

    @cached_property
    def _heads(self) -> Tensor:
        return torch.arange(self.pages.shape[1], device=self.pages.device)[:, None]

    @cached_property
    def _static(self) -> Tensor | None:
        return None if self.scale is None else self.scale.T[..., None].half()
