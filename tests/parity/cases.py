"""Cases of every operation that has more than its reference: what implementations are compared on."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omniserve.base.config import KVName
from omniserve.base.spec import RopeSpec
from omniserve.base.types import PAGE
from omniserve.formats.kv import LayerPages, kv_format
from omniserve.formats.w4a8 import W4A8
from omniserve.formats.w16a16 import pack
from omniserve.ops.act import ActFormat
from omniserve.ops.batch import PageList, Reading, Rows, Visible, Workspace
from omniserve.ops.changes import PROMPT, Bias, Masked, Penalties
from omniserve.ops.pages import HeadGroup
from omniserve.ops.rope import Rope, make_rope
from omniserve.ops.sample import CORRUPTED, EXHAUSTED, Chance

Args = tuple[Any, ...]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int_matmul() -> Iterator[tuple[str, Args]]:
    """Ordinary, minimum, ragged and long sums; extreme operands."""
    for m, n, k in ((1, 1, 1), (1, 960, 576), (3, 5, 7), (33, 64, 1025), (2, 16, 9216), (8, 8, 14336)):
        x = torch.randint(-128, 128, (m, k), generator=_generator(m + k)).to(torch.int8)
        w = torch.randint(-128, 128, (n, k), generator=_generator(n + k)).to(torch.int8)
        yield f"random {m}x{n}x{k}", (x, w)
        yield f"extreme {m}x{n}x{k}", (torch.full_like(x, 127), torch.full_like(w, -128))


def gemm_w16a16() -> Iterator[tuple[str, Args]]:
    """Plain and packed weights, one token and many, with and without bias."""
    for m, n, k in ((1, 1, 1), (1, 960, 576), (5, 192, 64), (64, 128, 1536)):
        x = torch.randn(m, k, generator=_generator(m + k))
        w = torch.randn(n, k, generator=_generator(n + k))
        bias = torch.randn(n, generator=_generator(n))
        yield f"plain {m}x{n}x{k}", (x, w, None, torch.float32)
        yield f"packed {m}x{n}x{k}", (x, pack(w), bias, torch.float32)
        half = (x.half(), w.half(), bias.half())
        yield f"16 bit {m}x{n}x{k}", (*half, torch.float16)
        yield f"16 bit {m}x{n}x{k} to fp32", (*half, torch.float32)


SIZES = ((0, 16, 64), (1, 1, 2), (1, 192, 576), (5, 64, 128), (17, 200, 130), (70, 64, 256), (3, 130, 1152))
"""T, N, K: no token, one, ragged, more than a tile, short groups, several blocks."""


def _codes(m: int, k: int, kind: str) -> Tensor:
    """Activation codes whose rows lie further apart than their length."""
    wide = torch.randint(-127, 128, (m, 2 * k + 16), generator=_generator(m + k)).to(torch.int8)
    x = wide[:, 16 : 16 + k]
    return x.fill_(127 if kind == "extreme" else 0) if kind in ("extreme", "zero") else x


def gemm_w8a8() -> Iterator[tuple[str, Args]]:
    """Ordinary, ragged, empty and extreme; fp16 and fp32 results, with and without bias."""
    for number, (m, n, k) in enumerate(SIZES):
        w = torch.randint(-128, 128, (n, k), generator=_generator(n + k)).to(torch.int8)
        a, scale = torch.rand(m, 1, generator=_generator(m)) * 0.01, torch.rand(1, n, generator=_generator(n)) * 0.01
        bias = torch.randn(1, n, generator=_generator(n)) if number % 2 else None
        dtype = torch.float32 if number % 3 else torch.float16
        yield f"random {m}x{n}x{k}", (_codes(m, k, "random"), a, w, scale, bias, dtype)
    yield "extreme", (_codes(2, 1152, "extreme"), a[:2], torch.full_like(w, -128), scale, None, torch.float32)
    yield "zero", (_codes(2, 1152, "zero"), a[:2], w, scale, None, torch.float16)


def gemm_w4a8_blocks() -> Iterator[tuple[str, Args]]:
    """The same for weights per row and in groups, packed as `bind` packs them."""
    for form in (W4A8(None), W4A8(128)):
        for number, (m, n, k) in enumerate(SIZES):
            stored = form.from_dense(torch.randn(n, k, generator=_generator(n + k)))
            w = form.bind_blocks(stored, bias=None, dtype=torch.float32)
            x = _codes(m, k, "random")
            a = torch.rand(m, 1, generator=_generator(m)) * 0.01
            total = x.sum(1, keepdim=True, dtype=torch.int32) if form.group is None else None
            bias = torch.randn(1, n, generator=_generator(n)) if number % 2 else None
            dtype = torch.float32 if number % 3 else torch.float16
            yield f"{form.name} {m}x{n}x{k}", (x, a, total, w.blocks, w.scale, w.zero, bias, dtype)
        x = _codes(2, 1152, "extreme")
        total = x.sum(1, keepdim=True, dtype=torch.int32) if form.group is None else None
        yield f"{form.name} extreme", (x, a[:2], total, w.blocks, w.scale, w.zero, None, torch.float32)
    steep = {"codes": torch.full((4, 64), 0xFF, dtype=torch.uint8), "scale": torch.ones(4).half()}
    for scale, zero in ((17, 128), (8, 0), (1, 0), (17, 127)):
        ends = torch.where(torch.arange(64) % 2 == 0, (255 - (128 - zero)) // scale, 0).clamp(max=15).to(torch.uint8)
        steep["codes"] = (ends | (ends.roll(1) << 4)).expand(4, 64).contiguous()
        group = {"group_scale": torch.full((4, 1), scale), "group_zero": torch.full((4, 1), zero)}
        stored = steep | {name: t.to(torch.uint8) for name, t in group.items()}
        w = W4A8(128).bind_blocks(stored, bias=None, dtype=torch.float32)
        x = _codes(3, 128, "random")
        yield (
            f"ends of scale {scale}, zero {zero}",
            (x, torch.ones(3, 1), None, w.blocks, w.scale, None, None, torch.float32),
        )


ROWS = ((0, 64), (1, 1), (3, 100), (5, 576), (2, 1025))
"""T, C of operations on rows."""


def _rows(m: int, c: int, dtype: torch.dtype) -> Tensor:
    """Rows that lie apart: ordinary, zero, with an outlier, huge, tiny."""
    x = torch.randn(m, 2 * c + 8, generator=_generator(m + c))[:, 8 : 8 + c]
    for row, change in enumerate(
        (lambda r: r, lambda r: r * 0, lambda r: r.clone().index_fill_(0, torch.tensor([0]), 900.0))
    ):
        if row < m:
            x[row] = change(x[row])
    if m > 3:
        x[3] *= 6e3
        x[4] *= 1e-7
    return x.to(dtype)


def quantize() -> Iterator[tuple[str, Args]]:
    """Every kind of row in every wanted format."""
    for number, (m, c) in enumerate(ROWS):
        for place, wants in enumerate(ActFormat):
            dtype = (torch.float16, torch.float32)[(number + place) % 2]
            yield f"{m}x{c} {wants.value} {dtype}", (_rows(m, c, dtype), wants)
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]])
    yield "ties", (ties, ActFormat.INT8_SUM)


def add_norm() -> Iterator[tuple[str, Args]]:
    """With and without a sublayer's output, every wanted format, rows that lie apart."""
    for number, (m, c) in enumerate(ROWS):
        for place, wants in enumerate(ActFormat):
            dtype = (torch.float16, torch.float32)[(number + place) % 2]
            delta = torch.randn(m, 2 * c, generator=_generator(c))[:, ::2].to(dtype) if place % 2 else None
            weight = torch.rand(c, generator=_generator(c + 1)).to(dtype) + 0.5
            yield f"{m}x{c} {wants.value} {dtype}", (_rows(m, c, dtype), delta, weight, 1e-5, wants)


def swiglu() -> Iterator[tuple[str, Args]]:
    """fp32 products, and fp16 ones of 16-bit weights; every wanted format."""
    for number, (m, c) in enumerate(ROWS):
        for place, wants in enumerate(ActFormat):
            dtype = (torch.float16, torch.float32)[(number + place) % 2]
            product = torch.cat((_rows(m, c, torch.float32), _rows(m, c, torch.float32)), 1).clamp(-200, 200)
            product = product if number % 2 else product.half()
            yield f"{m}x{c} {wants.value} {dtype}", (product, wants, dtype)
    wide = torch.randn(6, 9000, generator=_generator(6)).half()  # more columns than one program has on a GPU
    wide[1], wide[2] = 0, wide[2] * 30
    yield "6x4500", (wide, ActFormat.INT8_SUM, torch.float16)
    yield "6x4500 both", (wide, ActFormat.BOTH, torch.float16)


def _pages(
    name: KVName, heads: int, dim: int, *, static: bool = False, mean: bool = False, statistics: bool = False
) -> LayerPages:
    """Six pages per head, full of bytes that nobody wrote."""
    form = kv_format(name, static=static)
    memory = torch.full((6, heads, form.page_bytes(dim)), 0xAB, dtype=torch.uint8)
    scale = torch.rand(2, heads, generator=_generator(heads)) * 0.05 + 0.01 if static else None
    means = torch.randn(heads, dim, generator=_generator(dim)) if mean else None
    bounds = torch.full((6, heads, 4, 2, dim), 7.0, dtype=torch.float16) if statistics else None
    return LayerPages(memory, form, dim, scale, means, bounds)


def rope_write() -> Iterator[tuple[str, Args]]:
    """Every KV format, two groups, uneven sizes, page boundaries, skipped tokens, no token, normed heads."""
    table = make_rope(RopeSpec(), head_dim=128, context=300, device=torch.device("cpu")).table
    formats: tuple[tuple[KVName, bool, bool], ...] = (
        ("kv4", False, False), ("kv4", False, True), ("kv8", False, False), ("kv8", True, True), ("kv16", False, True),
        ("kv16", False, False),
    )  # fmt: skip
    shapes = ((1, 9, (3,), 64), (5, 4, (1, 3), 80), (4, 8, (1,), 32), (0, 2, (2,), 16), (3, 2, (2,), 128))
    for number, (name, static, mean) in enumerate(formats):
        for place, (tokens, heads, kv, dim) in enumerate(shapes):
            total = sum(kv)
            qkv = torch.randn(tokens, heads + 2 * total, dim, generator=_generator(tokens + dim))
            if tokens > 3:
                qkv[1, -1] = 3.0  # a constant value
                qkv[2, heads:] = 0
                qkv[3, heads:] += 500  # far from zero
            qkv = qkv.to((torch.float16, torch.float32)[(number + place) % 2])
            positions = torch.tensor([0, 299, 63, 64, 7])[:tokens]
            slots = [torch.tensor([63, 64, -1, 5 * 64 + 63, 0])[:tokens], torch.tensor([1, -1, 200, 65, 64])[:tokens]]
            stores = [_pages(name, h, dim, static=static, mean=mean) for h in kv]
            turns = Rope(table.view(300, 2, -1)[..., : dim // 2].contiguous())
            yield (
                f"{name}{' static' * static}{' mean' * mean} {tokens} tokens, {heads} heads of {dim}, {kv} key heads",
                (qkv, positions, slots[: len(kv)], stores, turns, heads),
            )
    gains = [torch.rand(64, generator=_generator(seed)).half() + 0.5 for seed in (1, 2)]
    turns = Rope(table[..., :32].contiguous(), *gains, 1e-6)
    qkv = torch.randn(4, 4 + 2 * 2, 64, generator=_generator(5)).half()
    args = (torch.arange(4), [torch.arange(4) + 62], [_pages("kv8", 2, 64)], turns, 4)
    yield "normed heads", (qkv, *args)
    yield from _bounded(table)


def _bounded(table: Tensor) -> Iterator[tuple[str, Args]]:
    """Statistics: single tokens, whole prompts, a request whose tokens lie apart, keys beyond fp16, old bounds."""
    # Produced positions 100, 101 of a prompt that ends with 99, before its chunk; another request; nobody.
    apart = [100, 101, 70, -1, *range(90, 100)]
    order = {"apart": apart, "prompt": list(range(3, 140)), "tokens": [0, 79, 95, 128, 200], "nobody": [-1, -1]}
    formats: tuple[tuple[KVName, bool, bool], ...] = (
        ("kv4", False, True), ("kv8", False, False), ("kv8", True, False), ("kv16", False, True),
    )  # fmt: skip
    for number, (name, static, mean) in enumerate(formats):
        for place, (kind, slots) in enumerate(order.items()):
            kv, dim = ((1, 2), 64) if (number + place) % 2 else ((2,), 80)
            total, tokens = sum(kv), len(slots)
            qkv = torch.randn(tokens, 4 * total, dim, generator=_generator(tokens + dim))
            qkv[0, 2 * total :] *= 1000 if name == "kv16" else 1e5  # keys beyond fp16 where they can be stored
            qkv = qkv.to(torch.float16 if name == "kv16" else torch.float32)
            stores = [_pages(name, h, dim, static=static, mean=mean, statistics=not i) for i, h in enumerate(kv)]
            turns = Rope(table.view(300, 2, -1)[..., : dim // 2].contiguous())
            positions = torch.tensor(slots).clamp(min=0)
            every = [torch.tensor(slots) for _ in kv]
            yield f"statistics {name}{' static' * static} {kind}", (qkv, positions, every, stores, turns, 2 * total)


def filled(name: KVName, heads: int, dim: int, pages: int, dtype: torch.dtype) -> LayerPages:
    """Pages whose keys and values are all written, at offsets and ranges of their own."""
    form = kv_format(name, dtype=dtype)
    store = LayerPages(torch.zeros(pages, heads, form.page_bytes(dim), dtype=torch.uint8), form, dim)
    k, v = (torch.randn(pages * PAGE, heads, dim, generator=_generator(dim + s)) for s in (1, 2))
    v = v * torch.logspace(-2, 0.5, pages * PAGE)[:, None, None] + 0.3
    store.write(torch.arange(pages * PAGE), k.to(dtype), v.to(dtype))
    return store


def _rows_of(lengths: Sequence[int], tokens: Sequence[int]) -> Rows:
    """Rows whose last token stands at length - 1; those of one token come first and are produced positions."""
    singles = sum(1 for count in tokens if count == 1)
    cu_q = torch.tensor([0, *itertools.accumulate(tokens)], dtype=torch.int32)
    return Rows(
        cu_q=cu_q,
        seq_len=torch.tensor(lengths, dtype=torch.int32),
        singles=singles,
        longest=max(lengths),
        chunks=tuple(range(end - count, end) for end, count in zip(lengths[singles:], tokens[singles:], strict=True)),
    )


def _forget(store: LayerPages, ids: Tensor, lengths: Sequence[int]) -> None:
    """Fill what lies behind a row's end, and page 0, with NaN."""
    nothing = torch.tensor(float("nan"))
    for row, length in enumerate(lengths):
        end, offset = ids[row, (length - 1) // PAGE], (length - 1) % PAGE + 1
        if store.format.quantized:
            store.params[end, :, :, offset:] = nothing
        else:
            store.codes[end, :, :, offset:] = nothing
    (store.params if store.format.quantized else store.codes)[0] = nothing


def attend() -> Iterator[tuple[str, Args]]:
    """Produced positions and prompts, page boundaries, several pieces, sliding windows, lists, streaming, head maps."""
    shapes: tuple[tuple[KVName, int, int, int], ...] = (("kv4", 6, 2, 64), ("kv8", 4, 4, 80), ("kv16", 4, 1, 32))
    for number, (name, heads, kv, dim) in enumerate(shapes):
        dtype = torch.float16
        lengths = (1, 63, 64, 65, 600) if number == 0 else (64, 129)
        for kind, given, tokens in (
            ("produced", lengths, (1,) * len(lengths)),
            ("prompts", (70, 130), (70, 5)),
            ("both", (66, 40, 200), (1, 40, 2)),
        ):
            store, rows = filled(name, kv, dim, 24, dtype), _rows_of(given, tokens)
            table = torch.full((len(given) + 2, 12), -1, dtype=torch.int32)
            order = torch.randperm(23, generator=_generator(7)).to(torch.int32) + 1
            slots = torch.arange(len(given)).flip(0) + 1
            used = 0
            for row, length in enumerate(given):
                pages = -(-length // PAGE)
                table[slots[row], :pages] = order[used : used + pages]
                used += pages
            _forget(store, table[slots], given)
            q = torch.randn(sum(tokens), heads + 2, dim, generator=_generator(dim)).to(dtype)[:, :heads]
            every = range(len(given))
            count = (rows.seq_len + PAGE - 1) // PAGE
            listed = PageList(ids=table, index=None, count=count, slots=slots)
            for visible in (Visible(), Visible(local=70)) if number < 2 else (Visible(),):
                reading = Reading(rows=every, pages=listed, visible=visible)
                group = HeadGroup(heads=slice(0, heads), to=None, reads=(reading,), store=store)
                yield _attended(f"{name} {kind} {visible}", q, (group,), rows)
            if number == 0:
                yield _attended(f"{name} {kind} streaming", q, _streaming(store, table[slots], rows, heads), rows)

    yield from _long_prompts()
    given, tokens = (66, 200), (1, 3)
    rows = _rows_of(given, tokens)
    table = torch.tensor([[3, 1, 0, 0], [2, 6, 5, 4]], dtype=torch.int32)
    count = (rows.seq_len + PAGE - 1) // PAGE
    whole = Reading(
        rows=range(2), pages=PageList(ids=table, index=None, count=count, slots=torch.tensor([0, 1])), visible=Visible()
    )
    first, second = filled("kv8", 1, 32, 8, torch.float16), filled("kv8", 2, 32, 8, torch.float16)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    groups = (
        HeadGroup(heads=slice(0, 2), to=order[:2], reads=(whole,), store=first),
        replace(_streaming(second, table, rows, 4)[0], heads=slice(2, 6), to=order[2:]),
    )
    yield _attended("two groups of uneven size", torch.randn(4, 6, 32, generator=_generator(3)).half(), groups, rows)
    plain = replace(whole, visible=Visible(local=100))
    groups = (
        HeadGroup(heads=slice(0, 2), to=None, reads=(whole,), store=first),
        HeadGroup(heads=slice(2, 6), to=None, reads=(plain,), store=second),
    )
    yield _attended("two groups in order", torch.randn(4, 6, 32, generator=_generator(4)).half(), groups, rows)
    # A row alone with one key head: torch gives dims of one number any stride.
    index = torch.tensor([[[0, 2, 3, 0, 0, 0, 0]]], dtype=torch.int32)[..., :3]
    for tokens in (1, 3):
        rows = _rows_of((200,), (tokens,))
        ids = torch.gather(table[1:2, None], 2, index.long())
        listed = PageList(ids=ids, index=index, count=torch.tensor([3], dtype=torch.int32), slots=None)
        assert ids.stride() != index.stride()
        alone = Reading(rows=range(1), pages=listed, visible=Visible())
        group = HeadGroup(heads=slice(0, 2), to=None, reads=(alone,), store=first)
        q = torch.randn(tokens, 2, 32, generator=_generator(5)).half()
        yield _attended(f"one row, one head, {tokens} tokens, chosen pages", q, (group,), rows)


def cut_rows() -> Iterator[tuple[str, Args]]:
    """One row and more than a block of rows, pages about a piece, about the most pieces, and many."""
    yield "one row", (torch.tensor([20], dtype=torch.int32),)
    pages = [1, 7, 8, 9, 2047, 2048, 2049, 4096, 4097, 300000]
    yield "border cases", (torch.tensor(pages, dtype=torch.int32),)
    many = torch.randint(1, 5000, (1500,), generator=_generator(1), dtype=torch.int32)
    yield "many rows", (many,)


def produced() -> Iterator[tuple[str, Args]]:
    """One table and two, rows without a page, first and last places of pages, more rows than a program takes."""
    for count, tables in ((1, 1), (3, 2), (300, 2), (0, 1)):
        draw = _generator(count)
        slots = torch.randperm(max(count, 1) + 4, generator=draw)[:count]
        held = tuple(torch.randint(-1, 9000, (count + 8, 5), generator=draw, dtype=torch.int32) for _ in range(tables))
        positions = torch.randint(0, 5 * PAGE, (count,), generator=draw)
        positions[:3] = torch.tensor([PAGE - 1, PAGE, 0])[:count]
        last = torch.randint(0, 2**40, (count + 8,), generator=draw)
        yield f"{count} rows, {tables} tables", (last, positions, slots, held)


def window_pages() -> Iterator[tuple[str, Args]]:
    """Produced positions and prompts: shorter than the sink, at its border, behind it; lists longer than a program."""
    for sink, local, queries in ((128, 256, 1), (0, 100, 1), (100, 64, 1), (128, 256, 70), (64, 1, 500)):
        ends = [queries, 127, 128, 129, 383, 384, 385, 449, 2000, 5000]
        ends = [end for end in ends if end >= queries]
        rows, pages = len(ends), 80
        table = torch.randint(-1, 9000, (rows + 3, pages), generator=_generator(sink + local), dtype=torch.int32)
        cu_q = torch.arange(rows + 1, dtype=torch.int32) * queries
        slots, seq_len = torch.arange(rows) + 2, torch.tensor(ends, dtype=torch.int32)
        for width in (4 + (local + queries + PAGE) // PAGE, 1500):
            name = f"sink {sink}, window {local}, {queries} queries, {width} places"
            yield name, (table, slots, cu_q, seq_len, sink, local, width)


def _long_prompts() -> Iterator[tuple[str, Args]]:
    """Prompts of several tiles after earlier tokens; windows with edges in all places; pages chosen by tiles."""
    given, tokens = (640, 150), (270, 150)
    store, rows = filled("kv4", 1, 32, 14, torch.float16), _rows_of(given, tokens)
    table = torch.zeros(2, 10, dtype=torch.int32)
    table[0], table[1, :3] = torch.randperm(10, generator=_generator(5)) + 4, torch.tensor([2, 1, 3])
    count = (rows.seq_len + PAGE - 1) // PAGE
    pages = PageList(ids=table, index=None, count=count, slots=torch.arange(2))
    q = torch.randn(sum(tokens), 2, 32, generator=_generator(6)).half()
    for visible in (Visible(), Visible(local=200), Visible(sink=70, local=100), Visible(sink=5, local=1)):
        reading = Reading(rows=range(2), pages=pages, visible=visible)
        group = HeadGroup(heads=slice(0, 2), to=None, reads=(reading,), store=store)
        yield _attended(f"long prompts {visible}", q, (group,), rows)
    yield _attended("long prompts streaming", q, _streaming(store, table, rows, 2), rows)

    rows = _rows_of((640, 512), (128, 77))
    index = torch.tensor([[0, 3, 4, 8, 9], [2, 5, 6, 7, 0]], dtype=torch.int32)
    listed = PageList(
        ids=torch.gather(table[:1].expand(2, -1), 1, index.long())[:, None],
        index=index[:, None],
        count=torch.tensor([5, 4], dtype=torch.int32),
        slots=None,
    )
    reading = Reading(rows=range(2), pages=listed, visible=Visible())
    group = HeadGroup(heads=slice(0, 2), to=torch.tensor([1, 0]), reads=(reading,), store=store)
    yield _attended("tiles with pages of their own", q[:205], (group,), rows)
    for dim in (64, 80):
        yield _shared_tiles(dim)


def _shared_tiles(dim: int) -> tuple[str, Args]:
    """Tiles of two requests, enough of them that all pages of each are unpacked once, lists of odd lengths."""
    store, heads, draw = filled("kv4", 2, dim, 30, torch.float16), 2, _generator(dim)
    rows = replace(_rows_of((512, 640, 768, 256, 384), (128, 128, 77, 128, 128)), tiles=5, tiled=(3, 2))
    table, slots = torch.randperm(28, generator=draw).int().view(2, 14), torch.tensor([1, 1, 1, 0, 0])
    last = ((rows.seq_len - 1) // PAGE).tolist()
    lists = [
        [[0, *sorted(torch.randperm(end - 2, generator=draw)[:2].add(1).tolist()), end - 1, end] for _ in range(heads)]
        for end in last
    ]
    index = torch.zeros(5, heads, 7, dtype=torch.int32)
    for row, one in enumerate(lists):
        index[row, :, : len(one[0])] = torch.tensor(one)
    ids = torch.gather(table[slots][:, None].expand(-1, heads, -1), 2, index.long())
    count = torch.tensor([len(one[0]) for one in lists], dtype=torch.int32)
    pages = PageList(ids=ids, index=index, count=count, slots=None)
    reading = Reading(rows=range(5), pages=pages, visible=Visible(), every=(table, slots))
    q = torch.randn(int(rows.cu_q[-1]), 6, dim, generator=draw).half()
    group = HeadGroup(heads=slice(0, 4), to=torch.tensor([1, 0, 5, 3]), reads=(reading,), store=store)
    others = replace(group, heads=slice(4, 6), to=torch.tensor([2, 4]))
    return _attended(f"tiles of two requests whose pages are unpacked once, {dim} dims", q, (group, others), rows)


def _streaming(store: LayerPages, table: Tensor, rows: Rows, heads: int) -> tuple[HeadGroup, ...]:
    """Sink and window pages by row, produced positions and prompts apart, heads in another order in the result."""
    reads = []
    for run in (range(rows.singles), range(rows.singles, rows.count)):
        if not run:
            continue
        lists = []
        for row in run:
            begin = int(rows.seq_len[row]) - int(rows.cu_q[row + 1] - rows.cu_q[row])
            first = max(begin - 69, 0) // PAGE
            lists.append(sorted({0, *range(first, (int(rows.seq_len[row]) - 1) // PAGE + 1)}))
        index = torch.zeros(len(lists), max(map(len, lists)) + 1, dtype=torch.int32)
        for row, pages in enumerate(lists):
            index[row, : len(pages)] = torch.tensor(pages)
        ids = torch.gather(table[run.start : run.stop], 1, index.long())
        by_head = [t[:, None].expand(-1, store.heads, -1).contiguous() for t in (ids, index)]
        count = torch.tensor([len(pages) for pages in lists], dtype=torch.int32)
        ids, index = by_head if run.start else (ids, index)  # a list per head, or one for all
        pages = PageList(ids=ids, index=index, count=count, slots=None)
        reads.append(Reading(rows=run, pages=pages, visible=Visible(sink=5, local=70)))
    to = torch.arange(heads).flip(0)
    return (HeadGroup(heads=slice(0, heads), to=to, reads=tuple(reads), store=store),)


def _attended(name: str, q: Tensor, groups: tuple[HeadGroup, ...], rows: Rows) -> tuple[str, Args]:
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    return name, (q, groups, rows, out, Workspace(out=out), 0.125)


def select_pages() -> Iterator[tuple[str, Args]]:
    """Rows that choose, that keep, that are replayed; ties everywhere; below, at and above the budget; any group."""
    for number, (budget, interval, group, dim) in enumerate(
        ((2, 4, 4, 64), (4, 3, 3, 80), (7, 1, 1, 32), (4, 64, 8, 128), (5, 2, 20, 64))
    ):
        pages, heads = 37, 2
        asks = [(0, 500, position) for position in range(505, 512 + 6)]  # replayed, across a page
        asks += [(1, 100, 100), (2, 2000, 2000), (3, 2000, 2048), (4, 37 * 64 - 9, 37 * 64 - 8)]
        asks += [(5, 64 * budget - 2, 64 * budget + late) for late in (-1, 0, 1)]
        slots, prompts, positions = (torch.tensor(column) for column in zip(*asks, strict=True))
        draw = _generator(number)
        # Small whole numbers: products are exact in any order, and many scores are equal.
        q = torch.randint(-2, 3, (len(asks), 2 * heads * group, dim), generator=draw).half()[:, : heads * group]
        stores = {"bounds": _with_bounds(7 * pages, heads, dim, draw)}
        for name in ("kv4", "kv8", "kv16"):
            stores[f"{name} keys"] = _whole_keys(name, 7 * pages, heads, dim, draw)
        table = torch.randperm(7 * pages, generator=draw).to(torch.int32).view(7, pages)
        memo = torch.randint(0, 20, (7, heads, budget), generator=draw).sort(2).values.to(torch.int32)
        longest = int(positions.max()) + 1 if number % 2 else pages * PAGE
        for name, store in stores.items():
            yield (
                f"{budget} pages by {name} every {interval}, {group} heads of {dim}",
                (
                    q,
                    store,
                    table,
                    slots,
                    prompts,
                    (positions + 1).int(),
                    memo,
                    interval,
                    longest,
                    name.split()[-1],
                    0.03125,
                ),
            )


def select_tiles() -> Iterator[tuple[str, Args]]:
    """Tiles below, at and above the budget, whole and ended early, of several requests; equal and endless pages."""
    for number, (budget, group, dim, scale) in enumerate(
        ((4, 4, 64, 0.03), (9, 3, 80, 0.02), (70, 1, 32, 0.05), (20, 8, 128, 0.01))
    ):
        pages, heads, draw = 90, 2, _generator(number)
        tiles = [(1, 1280, 128), (0, 5120, 128), (0, 5248, 128), (2, 5632, 71), (3, 64 * budget // 128 * 128, 1)]
        tiles += [(1, 1408, 65), (4, 0, 128)]
        slots, starts, counts = (torch.tensor(column) for column in zip(*tiles, strict=True))
        cu_q = torch.cat((torch.tensor([7]), 7 + counts.cumsum(0))).int()
        # Whole numbers: products are exact in any order, so that equal pages have equal shares.
        q = torch.randint(-3, 4, (int(cu_q[-1]) + 3, 2 * heads * group, dim), generator=draw).half()[:, : heads * group]
        bounds = torch.randint(-9, 10, (5 * pages, heads, 4, 2, dim), generator=draw).sort(3).values.half()
        table = torch.randperm(5 * pages, generator=draw).to(torch.int32).view(5, pages)
        bounds[table[0, 20:50].long()] = bounds[table[0, 50:80].long()]  # equal ones: the earlier page is taken
        bounds[table[1, 11].long(), 1, 2, 1, 3], bounds[table[2, 33].long(), 0, 0, 0, 5] = float("inf"), float("-inf")
        form = kv_format("kv4")
        memory = torch.zeros(5 * pages, heads, form.page_bytes(dim), dtype=torch.uint8)
        store = LayerPages(memory, form, dim, statistics=bounds)
        longest = int((starts + counts).max()) if number % 2 else pages * PAGE
        yield (
            f"{budget} pages, {group} heads of {dim}",
            (q, store, table, slots, cu_q, (starts + counts).int(), budget, longest, scale),
        )


def keep_pages() -> Iterator[tuple[str, Args]]:
    """Rows below, at and above the budget, some with a page that began since."""
    for number, (budget, interval, heads) in enumerate(((2, 4, 3), (7, 3, 1), (64, 64, 12), (5, 2, 8))):
        pages, draw = 37, _generator(number)
        asks = [(1, 100, 101), (0, 64 * 3 - 1, 64 * 3), (3, 2000, 2049), (6, 2, 3)]
        asks += [(slot, 64 * budget - 2, 64 * budget + late) for slot, late in ((4, -1), (5, 0), (2, 1))]
        slots, prompts, positions = (torch.tensor(column) for column in zip(*asks, strict=True))
        positions = positions.clamp(max=64 * pages - 1)
        prompts = torch.where((positions - prompts) % interval == 0, prompts - 1, prompts)
        table = torch.randperm(7 * pages, generator=draw).to(torch.int32).view(7, pages)
        memo = torch.randint(0, 20, (7, heads, budget), generator=draw).sort(2).values.to(torch.int32)
        yield (
            f"{budget} pages every {interval}, {heads} heads",
            (table, slots, prompts, (positions + 1).int(), memo, interval),
        )


def _with_bounds(pages: int, heads: int, dim: int, draw: torch.Generator) -> LayerPages:
    """Pages whose statistics are small whole numbers; some are infinite."""
    form = kv_format("kv4")
    bounds = torch.randint(-4, 5, (pages, heads, 4, 2, dim), generator=draw).sort(3).values.half()
    bounds[5, 0, 1, 1, 3], bounds[9, 1, 2, 0, 7] = float("inf"), float("-inf")
    memory = torch.zeros(pages, heads, form.page_bytes(dim), dtype=torch.uint8)
    return LayerPages(memory, form, dim, statistics=bounds)


def _whole_keys(name: KVName, pages: int, heads: int, dim: int, draw: torch.Generator) -> LayerPages:
    """Pages whose keys are whole numbers or quarters; values are nothing."""
    form = kv_format(name)
    memory = torch.full((pages, heads, form.page_bytes(dim)), 0xFF, dtype=torch.uint8)
    store = LayerPages(memory, form, dim)
    codes = store.codes[:, :, 0]
    if form.quantized:
        codes.random_(0, 256, generator=draw)
        store.params[:, :, 0] = torch.randint(1, 5, (pages, heads, PAGE), generator=draw).half() / 4
        store.params[:, :, 1] = torch.randint(0, 12, (pages, heads, PAGE), generator=draw).half()
    else:
        codes.copy_(torch.randint(-8, 9, codes.shape, generator=draw))
    return store


def greedy() -> Iterator[tuple[str, Args]]:
    """Equals and NaN of either sign, infinities, no row, one token, more than a part, rows that lie apart."""
    for rows, vocab in ((0, 5), (3, 1), (2, 211), (3, 8192), (2, 20001)):
        x = torch.randn(rows, vocab + 8, generator=_generator(vocab))[:, 3 : 3 + vocab]
        yield f"{rows}x{vocab}", (x, CORRUPTED)
        yield f"{rows}x{vocab} fp16", (x.half(), CORRUPTED)
    odd = torch.randn(10, 9000, generator=_generator(10)) - 4
    odd[0] = -torch.inf
    odd[1, 8500], odd[2, 8999], odd[3, 3] = torch.nan, -torch.nan, torch.inf
    odd[4], odd[5], odd[6, ::2], odd[7] = 0.0, -0.0, 9.5, -3.5
    odd[5, 8700], odd[8, 100:], odd[9, 8600] = 0.0, -torch.inf, -torch.inf
    yield "odd rows", (odd, EXHAUSTED)
    yield "odd rows fp16", (odd.half(), EXHAUSTED)


def likeliest() -> Iterator[tuple[str, Args]]:
    """Equals everywhere, forbidden tokens, no row; few rows, because each takes Triton's interpreter seconds."""
    x = (torch.randn(1, 9001, generator=_generator(5)) * 2).round()
    yield "5 of 0x90", (x[:0, :90], 5)
    yield "64 of 1x9001, equals, most forbidden", (x.index_fill(1, torch.arange(8961), -torch.inf), 64)


def _chance(rows: Sequence[int], *, top_k: int, top_p: float = 1.0, min_p: float = 0.0) -> Chance:
    many = len(rows)
    return Chance(
        rows=torch.tensor(rows, dtype=torch.int64),
        seed=torch.arange(many) * 7919 - 3,
        position=torch.arange(many) * 13,
        temperature=torch.linspace(0.3, 1.7, many, dtype=torch.float64),
        top_k=torch.full((many,), top_k),
        top_p=torch.full((many,), top_p, dtype=torch.float64),
        min_p=torch.full((many,), min_p, dtype=torch.float64),
    )


def draw_narrow() -> Iterator[tuple[str, Args]]:
    """All filters together, forbidden tokens, no row; few rows, as above."""
    x = torch.randn(9, 9001, generator=_generator(6)) * 2
    x[3, 7:] = -torch.inf
    yield "filters", (x, _chance([8], top_k=40, top_p=0.9, min_p=0.02))
    yield "few left", (x, _chance([3], top_k=64, top_p=0.7))
    yield "no row", (x, _chance([], top_k=4))


def draw_whole() -> Iterator[tuple[str, Args]]:
    """Small and large vocabularies, forbidden tokens, rows in any order, no row."""
    for vocab in (1, 5, 211, 9001, 20001):
        x = torch.randn(9, vocab, generator=_generator(vocab)) * 2
        x[3, 1 : vocab // 2] = -torch.inf
        x[4, : vocab - 1] = -torch.inf
        yield f"{vocab}", (x, _chance([8, 4, 3, 0, 0] * 6, top_k=0))
    yield "no row", (x, _chance([], top_k=0))


def draw_filtered() -> Iterator[tuple[str, Args]]:
    """Peaked and flat rows, equals across every border, forbidden and broken logits, any filter, no row, one token."""
    for vocab in (1, 5, 211, 9001):
        x = torch.randn(9, vocab, generator=_generator(vocab)) * torch.linspace(0.1, 6, 9)[:, None]
        x[3, 1 : vocab // 2] = -torch.inf
        x[4, : vocab - 1] = -torch.inf
        yield f"{vocab} top_p", (x, _chance([8, 4, 3, 0, 0, 6], top_k=0, top_p=0.9))
    yield "min_p", (x, _chance([7, 2], top_k=0, min_p=0.05))
    yield "all filters", (x, _chance([5, 0], top_k=90, top_p=0.8, min_p=0.01))
    yield "all filters fp16", (x.half(), _chance([5, 1], top_k=1000, top_p=0.99, min_p=1e-6))
    yield "equals", (x.round(), _chance([1, 6, 8], top_k=2500, top_p=0.97))
    yield "equals everywhere", (x * 0 + 2, _chance([1], top_k=0, top_p=0.71))
    yield "a large top_k", (x, _chance([0], top_k=5000, top_p=0.99))
    broken = x[:3].clone()
    broken[0], broken[1, 77], broken[2, 5000] = -torch.inf, torch.inf, torch.nan
    yield "broken rows disturb none", (torch.cat([broken, x[8:]]), _chance([3], top_k=0, top_p=0.5))
    yield "no row", (x, _chance([], top_k=0, top_p=0.5))


def changed() -> Iterator[tuple[str, Args]]:
    """Each change alone, all of them on rows that share some, rows far apart, nothing, no row."""
    for vocab in (5, 2500):
        x = torch.randn(6, vocab + 3, generator=_generator(vocab))[:, 2 : 2 + vocab] * 5
        x[4, ::2] = -torch.inf
        table = torch.randn(4, vocab, generator=_generator(1))
        table[1, 1:] = -torch.inf
        bias = Bias(rows=torch.tensor([5, 0, 2]), slots=torch.tensor([1, 3, 0]), table=table)
        bits = torch.randint(-(2**31), 2**31, (2, -(-vocab // 32)), generator=_generator(2)).to(torch.int32)
        masked = Masked(rows=torch.tensor([2, 1]), bits=bits)
        counts = torch.randint(-3, 4, (4, vocab), generator=_generator(3)).clamp(min=0).to(torch.int32)
        counts[:, ::3] += PROMPT
        rows = torch.tensor([4, 5, 2])
        numbers = (torch.tensor(some, dtype=torch.float64) for some in ((1.3, 0.7, 0), (0.4, -0.3, 1), (0.1, 2, -0.6)))
        penalties = Penalties(
            rows=rows, slots=torch.tensor([2, 0, 1]), counts=counts,
            **dict(zip(("repetition", "presence", "frequency"), numbers, strict=True)),
        )  # fmt: skip
        yield f"{vocab} bias", (x, bias, None, None)
        yield f"{vocab} mask fp16", (x.half(), None, masked, None)
        yield f"{vocab} penalties", (x, None, None, penalties)
        yield f"{vocab} all", (x, bias, masked, penalties)
    yield "nothing", (x, None, None, None)
    yield "no row", (x[:0], None, None, None)


CASES: dict[str, Callable[[], Iterator[tuple[str, Args]]]] = {
    "int_matmul": int_matmul,
    "changed": changed,
    "draw_filtered": draw_filtered,
    "draw_narrow": draw_narrow,
    "draw_whole": draw_whole,
    "gemm_w16a16": gemm_w16a16,
    "greedy": greedy,
    "likeliest": likeliest,
    "gemm_w8a8": gemm_w8a8,
    "gemm_w4a8_blocks": gemm_w4a8_blocks,
    "quantize": quantize,
    "add_norm": add_norm,
    "swiglu": swiglu,
    "rope_write": rope_write,
    "attend": attend,
    "cut_rows": cut_rows,
    "produced": produced,
    "window_pages": window_pages,
    "keep_pages": keep_pages,
    "select_pages": select_pages,
    "select_tiles": select_tiles,
}
