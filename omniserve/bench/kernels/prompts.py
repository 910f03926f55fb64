"""Attention of prompts: chunks after earlier tokens, and whole prompts chunk by chunk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omniserve.base.config import KVName
from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.bench.kernels import limits
from omniserve.bench.kernels.cases import Built, Case, Sizes, error
from omniserve.bench.kernels.limits import InTurn, Work
from omniserve.bench.kernels.pages import FORMS, SINK, listed, store_of
from omniserve.bench.kernels.peers import attention
from omniserve.formats.kv import LayerPages, kv_format
from omniserve.ops.batch import PageList, Reading, Rows, Visible, Workspace
from omniserve.ops.dispatch import force_reference
from omniserve.ops.pages import HeadGroup, attend

Window = int | None
"""Positions that a head sees at the end, beside the sink; None: it sees all."""

CHUNK = 8192
"""Tokens of a step that a whole prompt is cut into."""

CHECKED = 64
"""Positions that are compared with the reference: the first so many of a chunk, some in the middle, the last."""


def prompts(sizes: Sizes) -> Iterator[Case]:
    """Yield the last positions of a prompt: all heads dense, or all of them with a window."""
    for name in FORMS:
        for tokens, context, local in sizes.prompts:
            windows = (local,)
            title = f"{name}{'' if local is None else f' window {local}'}"
            build = _chunk(name, tokens, context, windows, sizes)
            work = _work(name, tokens, context, windows, sizes)
            yield Case(kind="prefill", name=title, size=f"{tokens} of {context}", work=work, build=build)


def wholes(sizes: Sizes) -> Iterator[Case]:
    """Yield whole prompts of kv4 in chunks: all heads dense, or half of them with a window as LServe has it."""
    for context in sizes.wholes:
        for windows in ((None,), (None, 256), (None, 8192)):
            title = "kv4" if len(windows) == 1 else f"kv4 half window {windows[1]}"
            ends = [*range(CHUNK, context, CHUNK), context]
            works = [_work("kv4", end - begin, end, windows, sizes) for begin, end in _spans(ends)]
            build = _whole(ends, windows, sizes)
            yield Case(kind="whole prompt", name=title, size=str(context), work=InTurn(tuple(works)), build=build)


def _spans(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip((0, *ends), ends, strict=False)


def _work(name: KVName, tokens: int, context: int, windows: Sequence[Window], sizes: Sizes) -> Work:
    """Return the work of T positions; the heads are shared equally by the windows, which are one launch."""
    spec, parts = sizes.spec, len(windows)
    size = kv_format(name, dtype=sizes.dtype).page_bytes(spec.head_dim)
    total = Work(bytes=0)
    for local in windows:
        seen = limits.pairs(tokens, context, sink=SINK, local=local)
        read = PAGE * len(listed(ceil_div(context, PAGE), context - tokens, local))
        total += limits.prompt(size, seen, tokens, read, spec.heads // parts, spec.kv_heads // parts, spec.head_dim)
    return total


class _Prompt:
    """A prompt whose keys and values are there, and what the queries of some of its positions read of them."""

    def __init__(self, name: KVName, context: int, windows: Sequence[Window], sizes: Sizes) -> None:
        spec, self.parts = sizes.spec, len(windows)
        self.sizes, self.windows, self.scale = sizes, windows, spec.head_dim**-0.5
        pages = ceil_div(context, PAGE)
        each = replace(sizes, spec=replace(spec, kv_heads=spec.kv_heads // self.parts))
        self.stores: list[LayerPages] = [store_of(name, pages, each) for _ in windows]
        self.table = torch.randperm(pages, device=sizes.device).int()

    def arguments(self, positions: range) -> tuple[tuple[HeadGroup, ...], Rows]:
        """Return what `attend` wants for these positions."""
        like: Any = {"device": self.sizes.device, "dtype": torch.int32}
        rows = Rows(
            cu_q=torch.tensor([0, len(positions)], **like),
            seq_len=torch.tensor([positions.stop], **like),
            singles=0,
            longest=positions.stop,
            chunks=(positions,),
        )
        each = self.sizes.spec.heads // self.parts
        groups = []
        for part, (local, store) in enumerate(zip(self.windows, self.stores, strict=True)):
            index = listed(ceil_div(positions.stop, PAGE), positions.start, local).to(self.sizes.device)
            pages = PageList(
                ids=self.table[index][None],
                index=None if local is None else index[None].int(),
                count=torch.tensor([len(index)], **like),
                slots=None,
            )
            visible = Visible() if local is None else Visible(SINK, local)
            reading = Reading(rows=range(1), pages=pages, visible=visible)
            heads = slice(part * each, (part + 1) * each)
            groups.append(HeadGroup(heads=heads, to=None, reads=(reading,), store=store))
        return tuple(groups), rows

    def call(self, q: Tensor, positions: range, out: Tensor) -> Callable[[], Tensor]:
        """Return a call of `attend` for these positions."""
        groups, rows = self.arguments(positions)

        def run() -> Tensor:
            attend(q, groups, rows, out, Workspace(out=out), scale=self.scale)
            return out

        return run

    def error(self, q: Tensor, positions: range, found: Tensor) -> float:
        """Return the largest error of some positions against the reference."""
        count = min(len(positions), CHECKED)
        worst = 0.0
        for first in {0, (len(positions) - count) // 2, len(positions) - count}:
            at = slice(first, first + count)
            with force_reference():
                expected = self.call(q[at], positions[at], torch.empty_like(q[at]))()
            worst = max(worst, error(found[at], expected))
        return worst


def _queries(tokens: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return queries, and a place for results that holds no number yet."""
    q = torch.randn(tokens, sizes.spec.heads, sizes.spec.head_dim, device=sizes.device, dtype=sizes.dtype)
    return q, torch.full_like(q, float("nan"))


def _chunk(
    name: KVName, tokens: int, context: int, windows: Sequence[Window], sizes: Sizes
) -> Callable[[int | None], Built]:
    def build(copies: int | None) -> Built:
        prompt, positions = _Prompt(name, context, windows, sizes), range(context - tokens, context)
        q, out = _queries(tokens, sizes)
        call = prompt.call(q, positions, out)
        peers = attention(1, tokens, context, sizes) if windows == (None,) else {}
        return Built(calls=[call], check=lambda: prompt.error(q, positions, call()), peers=peers)

    return build


def _whole(ends: Sequence[int], windows: Sequence[Window], sizes: Sizes) -> Callable[[int | None], Built]:
    def build(copies: int | None) -> Built:
        prompt = _Prompt("kv4", ends[-1], windows, sizes)
        spans = [range(begin, end) for begin, end in _spans(ends)]
        q, out = _queries(max(map(len, spans)), sizes)
        chunks = [prompt.call(q[: len(span)], span, out[: len(span)]) for span in spans]

        def call() -> None:
            for chunk in chunks:
                chunk()

        def check() -> float:
            call()
            return prompt.error(q[: len(spans[-1])], spans[-1], out[: len(spans[-1])])

        return Built(calls=[call], check=check)

    return build
