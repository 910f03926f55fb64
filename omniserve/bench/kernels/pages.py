"""What is measured of the pages in a decode step: writing them, reading them, choosing them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omniserve.base.config import KVName, PageScores
from omniserve.base.numbers import ceil_div
from omniserve.base.spec import ModelSpec
from omniserve.base.types import PAGE
from omniserve.bench.kernels import limits
from omniserve.bench.kernels.cases import Built, Calls, Case, Sizes, cold, error
from omniserve.bench.kernels.limits import Work
from omniserve.bench.kernels.peers import attention as peers_of
from omniserve.formats.kv import LOGICAL, LayerPages, kv_format
from omniserve.ops.batch import PageList, Reading, Rows, Visible, Workspace
from omniserve.ops.dispatch import force_reference
from omniserve.ops.pages import HeadGroup, attend, cut_rows, rope_write
from omniserve.ops.rope import Rope
from omniserve.ops.select import Chosen, select_pages

FORMS: tuple[KVName, ...] = ("kv4", "kv8", "kv16")

SINK, LOCAL = 128, 256
"""Positions that streaming heads see: the first ones, and the last."""

CHOSEN = 64
"""Pages that a head reads: 4,096 tokens."""

CHECKED = 2e9
"""Bytes of keys and values in 32 bit that the reference of a check may make."""


def store_of(name: KVName, pages: int, sizes: Sizes, *, statistics: bool = False) -> LayerPages:
    """Return pages of random keys and values."""
    form, spec = kv_format(name, dtype=sizes.dtype), sizes.spec
    shape = (pages, spec.kv_heads, form.page_bytes(spec.head_dim))
    made = LayerPages(
        pages=torch.randint(0, 256, shape, dtype=torch.uint8, device=sizes.device),
        format=form,
        head_dim=spec.head_dim,
        statistics=_bounds(pages, sizes) if statistics else None,
    )
    if form.quantized:
        made.params.copy_(torch.rand(made.params.shape, device=sizes.device) * (8 / form.top))
    else:
        made.codes.copy_(torch.randn(made.codes.shape, device=sizes.device))
    return made


def _bounds(pages: int, sizes: Sizes) -> Tensor:
    shape = (pages, sizes.spec.kv_heads, PAGE // LOGICAL, 1, sizes.spec.head_dim)
    low = torch.randn(shape, device=sizes.device) - 1
    return torch.cat((low, low + 2), 3).half()


def decode(sizes: Sizes) -> Iterator[Case]:
    """Yield produced positions that read everything."""
    spec = sizes.spec
    for name in FORMS:
        size = kv_format(name, dtype=sizes.dtype).page_bytes(spec.head_dim)
        for rows, context in sizes.decode:
            work = limits.decode(size, rows, context, spec.heads, spec.kv_heads, spec.head_dim)
            build = _decode(name, rows, context, sizes, work.bytes)
            yield Case(kind="decode", name=name, size=f"{rows} x {context}", work=work, build=build)


def lserve(sizes: Sizes) -> Iterator[Case]:
    """Yield produced positions of LServe: half of the heads read chosen pages, the others sink and window."""
    spec = sizes.spec
    for name in FORMS:
        size = kv_format(name, dtype=sizes.dtype).page_bytes(spec.head_dim)
        for rows, context in _chosen(sizes):
            read = PAGE * (CHOSEN + len(listed(ceil_div(context, PAGE), context - 1, LOCAL)))
            work = limits.decode(size, rows, read, spec.heads // 2, spec.kv_heads // 2, spec.head_dim)
            build = _lserve(name, rows, context, sizes, work.bytes)
            yield Case(kind="decode", name=f"{name} lserve", size=f"{rows} x {context}", work=work, build=build)


def listed(pages: int, first: int, local: int | None) -> Tensor:
    """Return the logical pages that positions from `first` on read: all, or those of the sink and of the window."""
    if local is None:
        return torch.arange(pages)
    opening = max(first - local + 1, 0) // PAGE
    return torch.tensor([*range(min(opening, ceil_div(SINK, PAGE))), *range(opening, pages)])


def _lserve(name: KVName, rows: int, context: int, sizes: Sizes, nbytes: float) -> Callable[[int | None], Built]:
    spec, per = sizes.spec, ceil_div(context, PAGE)
    half, like = _half(spec), _ints(sizes)
    window = listed(per, context - 1, LOCAL)

    def one() -> Callable[[], Tensor]:
        store = store_of(name, rows * per, replace(sizes, spec=half))
        table = torch.randperm(rows * per, device=sizes.device).int().view(rows, per)
        drawn = torch.rand(rows, half.kv_heads, per, device=sizes.device)
        drawn[..., 0] = drawn[..., -1] = 2  # these two are always read
        chosen = drawn.topk(CHOSEN).indices.sort(-1).values
        places = torch.randperm(spec.heads, device=sizes.device)
        seen = window.to(sizes.device).expand(rows, -1)
        lists = (chosen, Visible()), (seen, Visible(SINK, LOCAL))
        groups = []
        for part, (index, visible) in enumerate(lists):
            pages = PageList(
                ids=torch.gather(table[:, None].expand(-1, half.kv_heads, -1), 2, index)
                if index.dim() == 3
                else table.gather(1, index),
                index=index.int(),
                count=torch.full((rows,), index.shape[-1], **like),
                slots=None,
            )
            heads = slice(part * half.heads, (part + 1) * half.heads)
            reading = Reading(rows=range(rows), pages=pages, visible=visible)
            groups.append(HeadGroup(heads=heads, to=places[heads], reads=(reading,), store=store))
        q = torch.randn(rows, spec.heads, spec.head_dim, device=sizes.device, dtype=sizes.dtype)
        out = torch.full_like(q, float("nan"))
        whole = Rows(
            cu_q=torch.arange(rows + 1, **like),
            seq_len=torch.full((rows,), context, **like),
            singles=rows,
            longest=context,
            cuts=cut_rows(torch.full((rows,), per, **like)),
        )

        def call() -> Tensor:
            attend(q, tuple(groups), whole, out, Workspace(out=out), scale=spec.head_dim**-0.5)
            return out

        return call

    def build(copies: int | None) -> Built:
        calls: Calls = [one() for _ in range(cold(nbytes, copies, most=48))]

        def check() -> float:
            found = calls[0]().clone()
            with force_reference():
                return error(found, calls[0]())

        return Built(calls=calls, check=check)

    return build


def _decode(name: KVName, rows: int, context: int, sizes: Sizes, nbytes: float) -> Callable[[int | None], Built]:
    spec = sizes.spec

    def one() -> tuple[Callable[[], Tensor], Callable[[int], Tensor]]:
        per = ceil_div(context, PAGE)
        store = store_of(name, rows * per, sizes)
        ids = torch.randperm(rows * per, device=sizes.device).int().view(rows, per)
        q = torch.randn(rows, spec.heads, spec.head_dim, device=sizes.device, dtype=sizes.dtype)
        out = torch.full_like(q, float("nan"))

        def run(count: int = rows) -> Tensor:
            attend(q[:count], groups(count), lengths(count), out[:count], Workspace(out=out), scale=spec.head_dim**-0.5)
            return out[:count]

        def lengths(count: int) -> Rows:
            return Rows(
                cu_q=torch.arange(count + 1, device=q.device, dtype=torch.int32),
                seq_len=torch.full((count,), context, device=q.device, dtype=torch.int32),
                singles=count,
                longest=context,
                cuts=cut_rows(torch.full((count,), per, device=q.device, dtype=torch.int32)),
            )

        def groups(count: int) -> tuple[HeadGroup, ...]:
            used = torch.full((count,), per, device=q.device, dtype=torch.int32)
            pages = PageList(ids=ids[:count], index=None, count=used, slots=None)
            reading = Reading(rows=range(count), pages=pages, visible=Visible())
            return (HeadGroup(heads=slice(0, spec.heads), to=None, reads=(reading,), store=store),)

        whole, every = lengths(rows), groups(rows)

        def call() -> Tensor:
            attend(q, every, whole, out, Workspace(out=out), scale=spec.head_dim**-0.5)
            return out

        return call, run

    def build(copies: int | None) -> Built:
        made = [one() for _ in range(cold(nbytes, copies))]

        def check() -> float:
            count = max(1, min(rows, int(CHECKED / (8 * context * spec.kv_heads * spec.head_dim))))
            found = made[0][0]()[:count].clone()
            with force_reference():
                return error(found, made[0][1](count))

        return Built(calls=[call for call, _ in made], check=check, peers=peers_of(rows, 1, context, sizes))

    return build


def writes(sizes: Sizes) -> Iterator[Case]:
    """Yield rotation, quantization and writing of keys and values, one token in each page as in a decode step."""
    spec = sizes.spec
    wide = spec.heads + 2 * spec.kv_heads
    for name in FORMS:
        form = kv_format(name, dtype=sizes.dtype)
        each = 2 * (wide + spec.heads) * spec.head_dim + spec.kv_heads * form.page_bytes(spec.head_dim) // PAGE
        for tokens in sizes.tokens:
            build = _write(name, tokens, tokens * each, sizes)
            yield Case(kind="rope_write", name=name, size=str(tokens), work=Work(bytes=tokens * each), build=build)


def _write(name: KVName, tokens: int, nbytes: int, sizes: Sizes) -> Callable[[int | None], Built]:
    spec = sizes.spec

    def one() -> tuple[Callable[[], Any], LayerPages]:
        pages = tokens if tokens <= 1024 else ceil_div(tokens, PAGE)  # a step of many tokens is a prompt's
        store = store_of(name, pages, sizes)
        wide = spec.heads + 2 * spec.kv_heads
        qkv = torch.randn(tokens, wide, spec.head_dim, device=sizes.device, dtype=sizes.dtype)
        positions = torch.arange(tokens, device=sizes.device) % 1024
        rope = Rope(torch.rand(1024, 2, spec.head_dim // 2, device=sizes.device), None, None, spec.norm_eps)
        slots = positions * PAGE + positions % PAGE if tokens <= 1024 else torch.arange(tokens, device=sizes.device)
        return (lambda: rope_write(qkv, positions, (slots,), (store,), rope, spec.heads)), store

    def build(copies: int | None) -> Built:
        made = [one() for _ in range(cold(nbytes, copies, most=16))]
        call, store = made[0]

        def check() -> float:
            mine = call().clone()
            written = store.pages.clone()
            with force_reference():
                away = error(mine, call())
            return max(away, float((written != store.pages).float().mean()))

        return Built(calls=[call for call, _ in made], check=check)

    return build


def selection(sizes: Sizes) -> Iterator[Case]:
    """Yield the choice of 64 pages for half of the heads at produced positions that all choose: by keys, by bounds."""
    sizes = replace(sizes, spec=_half(sizes.spec))
    spec = sizes.spec
    choices: tuple[tuple[PageScores, KVName], ...] = (("keys", "kv4"), ("keys", "kv8"), ("bounds", "kv4"))
    for by, name in choices:
        key = kv_format(name, dtype=sizes.dtype).page_bytes(spec.head_dim) / 2
        each = key if by == "keys" else (PAGE // LOGICAL) * 2 * spec.head_dim * 2
        for rows, context in _chosen(sizes):
            moved = rows * ceil_div(context, PAGE) * spec.kv_heads * each
            title = f"{by} {name}" if by == "keys" else by
            build = _select(by, name, rows, context, moved, sizes)
            yield Case(kind="select", name=title, size=f"{rows} x {context}", work=Work(bytes=moved), build=build)


def _ints(sizes: Sizes) -> Any:
    return {"device": sizes.device, "dtype": torch.int32}


def _half(spec: ModelSpec) -> ModelSpec:
    return replace(spec, heads=spec.heads // 2, kv_heads=spec.kv_heads // 2)


def _chosen(sizes: Sizes) -> list[tuple[int, int]]:
    """Return rows and contexts at which choosing pages leaves some out, and whose statistics fit."""
    return [
        (rows, context) for rows, context in sizes.decode if context >= 2 * CHOSEN * PAGE and rows * context <= 1 << 20
    ]


def _select(
    by: PageScores, name: KVName, rows: int, context: int, nbytes: float, sizes: Sizes
) -> Callable[[int | None], Built]:
    spec, per = sizes.spec, ceil_div(context, PAGE)
    scale = spec.head_dim**-0.5

    def one() -> Callable[[], Chosen]:
        store = store_of(name, rows * per, sizes, statistics=by == "bounds")
        table = torch.randperm(rows * per, device=sizes.device).int().view(rows, per)
        q = torch.randn(rows, spec.heads, spec.head_dim, device=sizes.device, dtype=sizes.dtype)
        slots = torch.arange(rows, device=sizes.device)
        prompts = torch.full_like(slots, context - 1)
        seq_len = torch.full_like(slots, context, dtype=torch.int32)
        memo = torch.zeros(rows, spec.kv_heads, CHOSEN, dtype=torch.int32, device=sizes.device)
        return lambda: select_pages(q, store, table, slots, prompts, seq_len, memo, 4, context, by, scale)

    def build(copies: int | None) -> Built:
        calls: Calls = [one() for _ in range(cold(nbytes, copies, most=48))]

        def check() -> float:
            found = calls[0]()
            with force_reference():
                return other_pages(found, calls[0]())

        return Built(calls=calls, check=check)

    return build


def other_pages(found: Chosen, expected: Chosen) -> float:
    """Return the share of listed pages that differ; 1 if the lists have other lengths."""
    if not torch.equal(found[2], expected[2]):
        return 1.0
    width = int(expected[2].max())
    mine, theirs = (one[0][..., :width].long() << 32 | one[1][..., :width].long() for one in (found, expected))
    return 1.0 - float((mine[..., :, None] == theirs[..., None, :]).any(-1).float().mean())
