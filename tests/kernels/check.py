"""Compare the GPU kernels with their references, in a process of its own.

    TRITON_INTERPRET=1 python -m tests.kernels.check add_norm gemm_w8a8     on any machine, in Triton's interpreter
    python -m tests.kernels.check --device cuda                             all operations, on a GPU

Prints a line per case and exits with 1 if one failed. Memory that kernels allocate is poisoned first: what they do not
write shows.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omniserve.formats.kv import LayerPages
from omniserve.formats.table import weight_format
from omniserve.ops.act import ActFormat
from omniserve.ops.batch import Most, PageList, Reading, Rows, Visible, Workspace
from omniserve.ops.dispatch import TABLE, load_kernels
from omniserve.ops.pages import HeadGroup, cut_rows
from tests.parity.cases import CASES, filled
from tests.parity.compare import Args, problems, rebuilt, tensors


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `allocate` with NaN, or a pattern no kernel writes, in what it returns."""

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        made = allocate(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 0x5B)

    return poison


def main(names: list[str], device: str) -> int:
    torch.set_num_threads(1)
    assert weight_format("w4a8"), "imports every file that has an operation"
    load_kernels("cuda")
    failed = 0
    for name in names or sorted(name for name, operation in TABLE.items() if served(name)):
        operation = TABLE[name]
        for implementation in (one for one in operation.implementations if one.device == "cuda"):
            for case, args in variants(name, device):
                there = tuple(
                    rebuilt(arg, lambda t: (t.to_dense() if t.is_mkldnn else t).to(device), lambda d: d) for arg in args
                )
                torch.empty, before = poisoned(torch.empty), torch.empty
                try:
                    found = problems(implementation.function, operation, there)
                except Exception as error:  # one case's failure: the others are run as well
                    found = [f"{type(error).__name__}: {str(error)[-400:]}"]
                finally:
                    torch.empty = before
                failed += bool(found)
                print(f"{'FAILED' if found else 'ok'} {implementation.name}: {case}", *found, sep="; ", flush=True)
    return failed


def variants(name: str, device: str) -> Iterator[tuple[str, Args]]:
    """Yield an operation's cases; on a GPU those in fp16 in bf16 too, whose products the interpreter gets wrong."""
    for case, args in CASES[name]():
        yield case, args
        dtypes = {t.dtype for t in tensors(args).values()} | {arg for arg in args if isinstance(arg, torch.dtype)}
        if device != "cpu" and torch.float16 in dtypes:
            yield f"{case}, bf16", tuple(brain(arg) for arg in args)


def brain(arg: Any) -> Any:
    """Return an argument in bf16 where it is fp16; stored codes, scales and statistics keep their formats."""

    def half(dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype == torch.float16 else dtype

    if isinstance(arg, HeadGroup):
        return replace(arg, store=brain(arg.store))
    if isinstance(arg, tuple | list):
        return type(arg)(brain(one) for one in arg)
    if not isinstance(arg, LayerPages):
        return rebuilt(arg, lambda t: t.to(half(t.dtype)), half)
    if arg.format.quantized:
        return arg
    numbers = arg.pages.view(arg.format.element).to(half(arg.format.element))
    return replace(arg, pages=numbers.view(torch.uint8), format=replace(arg.format, element=numbers.dtype))


def tiles(device: str) -> int:
    """Every tile and every split of a product give the same bits, and a token the same ones alone as among others."""
    from omniserve.kernels.linear import product
    from omniserve.kernels.tiles import Tile

    failed = 0
    for case, args in CASES["gemm_w4a8_blocks"]():
        if case not in ("w4a8-row 17x200x130", "w4a8-g128 17x200x130", "w4a8-g128 3x130x1152"):
            continue
        args = tuple(rebuilt(arg, lambda t: t.to(device), lambda d: d) for arg in args)
        x, a, total, *weight = args
        expected = product(*args)
        cuts = ((16, 64, 1, 1), (32, 128, 1, 2), (16, 128, 1, 4))
        same = [torch.equal(product(*args, Tile(m, n, step, 4, 3, split)), expected) for m, n, step, split in cuts]
        alone = [
            product(x[at], a[at], None if total is None else total[at], *weight) for at in (slice(0, 1), slice(2, 3))
        ]
        same += [torch.equal(alone[0][0], expected[0]), torch.equal(alone[1][0], expected[2])]
        failed += not all(same)
        print(f"{'ok' if all(same) else 'FAILED'} tiles: {case}", same, flush=True)
    return failed


def replayed(problem: Any, w: Tensor, tile: Any) -> Tensor:
    """Return the product that a CUDA graph computes when it runs for the second time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem(w, tile)
        made = problem(w, tile)
    for _ in range(2):
        made.fill_(float("nan"))
        graph.replay()
    return made


def languages() -> int:
    """On a GPU: all tiles that the tuner would try, of both kernels, give the same bits, launch after launch."""
    from omniserve.kernels.device import architecture, processors
    from omniserve.kernels.tiles import KINDS
    from omniserve.kernels.tune import Problem, candidates, weights

    failed = 0
    for kind in KINDS:
        for m, n, k in ((5, 384, 512), (40, 4096, 1024), (130, 4096, 4096), (1100, 3200, 640)):
            problem, w = Problem(kind, m, n, k), weights(kind, n, k)
            first, *others = candidates(kind, m, n, k, architecture(), processors())
            expected = problem(w, first)
            wrong = [str(tile) for tile in others * 3 if not torch.equal(problem(w, tile), expected)]
            wrong += [f"replayed {tile}" for tile in others if not torch.equal(replayed(problem, w, tile), expected)]
            failed += bool(wrong)
            print(f"{'FAILED' if wrong else 'ok'} languages: {kind} {m}x{n}x{k}", *wrong, sep="; ", flush=True)
    return failed


def alone(device: str) -> int:
    """A produced position attends to the same bits alone as among others, whatever their lengths."""
    failed = 0
    for case, args in CASES["attend"]():
        if "produced Visible" not in case:
            continue
        q, (group,), rows, *_ = (rebuilt(arg, lambda t: t.to(device), lambda d: d) for arg in args)
        (reading,) = group.reads
        kernel = next(one for one in TABLE["attend"].implementations if one.device == "cuda").function

        def attended(at: slice, reads: Reading, of: Rows, q: Tensor = q, group: HeadGroup = group) -> Tensor:
            out = torch.full_like(q[at], float("nan"))
            kernel(q[at], (replace(group, reads=(reads,)),), of, out, Workspace(out=out), scale=0.125)  # noqa: B023
            return out

        together = attended(slice(None), reading, rows)
        same = []
        for row in range(rows.count):
            at = slice(row, row + 1)
            pages = replace(reading.pages, count=reading.pages.count[at], slots=reading.pages.slots[at])
            length = rows.seq_len[at]
            one = Rows(cu_q=rows.cu_q[:2], seq_len=length, singles=1, longest=int(length))
            lone = attended(at, replace(reading, rows=range(1), pages=pages), one)
            same.append(torch.equal(lone[0], together[row]))
        failed += not all(same)
        print(f"{'ok' if all(same) else 'FAILED'} alone: {case}", same, flush=True)
    return failed


def runs(device: str) -> int:
    """Programs that take runs of pieces give the bits of those that take pieces; a row that only pads disturbs none."""
    from omniserve.kernels import produced

    failed, lengths = 0, (2200, 65, 1)  # more than a run, one piece; a row that pads
    kernel = next(one for one in TABLE["attend"].implementations if one.device == "cuda").function
    for name in ("kv4", "kv8", "kv16"):
        store = rebuilt(filled(name, 1, 64, 40, torch.float16), lambda t: t.to(device), lambda d: d)
        order = torch.randperm(39, generator=torch.Generator().manual_seed(3)).to(torch.int32) + 1
        table = torch.stack((order[:36], order[3:39])).to(device)
        seq_len = torch.tensor(lengths, dtype=torch.int32, device=device)
        count, slots = (seq_len + 63) // 64, torch.tensor([0, 1, -1], device=device)
        pages = PageList(ids=table, index=None, count=count, slots=slots)
        group = HeadGroup(
            heads=slice(0, 2), to=None, reads=(Reading(rows=range(3), pages=pages, visible=Visible()),), store=store
        )
        rows = Rows(
            cu_q=torch.arange(4, dtype=torch.int32, device=device), seq_len=seq_len, singles=3, longest=2304,
            cuts=cut_rows(count),
        )  # fmt: skip
        q = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(5)).half().to(device)
        outs, full = [], produced.FULL
        for produced.FULL in (0, 1 << 20):
            out = torch.full_like(q, float("nan"))
            kernel(q, (group,), rows, out, Workspace(out=out), scale=0.125)
            outs.append(out[:2])
        produced.FULL = full
        same = [torch.equal(*outs), bool(torch.isfinite(outs[0]).all())]
        failed += not all(same)
        print(f"{'ok' if all(same) else 'FAILED'} runs: {name}", same, flush=True)
    return failed


def pairs(device: str) -> int:
    """Two head groups give the same bits in one launch as in two, however their pages are listed."""
    failed = 0
    kernel = next(one for one in TABLE["attend"].implementations if one.device == "cuda").function
    for name in ("kv4", "kv8", "kv16"):
        stores = [rebuilt(filled(name, h, 64, 40, torch.float16), lambda t: t.to(device), lambda d: d) for h in (1, 2)]
        seq_len = torch.tensor((2200, 300), dtype=torch.int32, device=device)
        order = torch.randperm(39, generator=torch.Generator().manual_seed(3)).to(torch.int32) + 1
        table = torch.stack((order[:36], order[3:39])).to(device)
        count = (seq_len + 63) // 64
        rows = Rows(
            cu_q=torch.arange(3, dtype=torch.int32, device=device), seq_len=seq_len, singles=2, longest=2304,
            cuts=cut_rows(count),
        )  # fmt: skip
        whole = PageList(ids=table, index=None, count=count, slots=torch.arange(2, device=device))
        index = torch.tensor(((0, 2, 32, 33, 34), (0, 1, 2, 3, 4)), dtype=torch.int32, device=device)
        some = PageList(ids=table.gather(1, index.long()), index=index, count=torch.full_like(count, 5), slots=None)
        to = torch.randperm(6, generator=torch.Generator().manual_seed(4)).to(device)
        q = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(5)).half().to(device)
        same = []
        for first in (whole, replace(some, count=torch.tensor((3, 5), dtype=torch.int32, device=device))):
            reads = (first, Visible()), (some, Visible(sink=64, local=190))
            groups = [
                HeadGroup(
                    heads=heads, to=to[heads], reads=(Reading(rows=range(2), pages=pages, visible=seen),), store=of
                )
                for heads, (pages, seen), of in zip((slice(0, 2), slice(2, 6)), reads, stores, strict=True)
            ]
            outs = []
            for calls in ((tuple(groups),), ((groups[0],), (groups[1],))):
                out = torch.full_like(q, float("nan"))
                for call in calls:
                    kernel(q, call, rows, out, Workspace(out=out), scale=0.125)
                outs.append(out)
            same += [torch.equal(*outs), bool(torch.isfinite(outs[0]).all())]
        failed += not all(same)
        print(f"{'ok' if all(same) else 'FAILED'} pairs: {name}", same, flush=True)
    return failed


def widths(device: str) -> int:
    """A row's list of pages depends neither on how many programs score them, nor on its mates, nor on what may come."""
    from omniserve.kernels import select

    failed = 0
    kernel = next(one for one in TABLE["select_pages"].implementations if one.device == "cuda").function
    draw = torch.Generator().manual_seed(7)
    for by, name in (("bounds", "kv4"), ("keys", "kv4"), ("keys", "kv16")):
        store = rebuilt(filled(name, 1, 64, 40, torch.float16), lambda t: t.to(device), lambda d: d)
        if by == "bounds":
            bounds = torch.randn(40, 1, 4, 2, 64, generator=draw).sort(3).values.half()
            store = replace(store, statistics=bounds.to(device))
        q = torch.randn(2, 3, 64, generator=draw).half().to(device)
        table = torch.randperm(40, generator=draw).to(torch.int32).view(2, 20).to(device)
        slots, lengths = torch.tensor((0, 1), device=device), torch.tensor((1200, 900), device=device)

        def lists(rows: slice, longest: int, crowd: int) -> list[Tensor]:
            """Return the lists of some rows, and what is remembered of them."""
            memo = torch.zeros(2, 1, 5, dtype=torch.int32, device=device)
            bits = store.format.bits if by == "keys" else 0  # noqa: B023
            select.CROWD[bits], before = crowd, select.CROWD[bits]
            try:
                ids, index, _ = kernel(
                    q[rows], store, table, slots[rows], lengths[rows] - 1, lengths[rows].int(), memo, 4, longest, by,  # noqa: B023
                    0.125,
                )  # fmt: skip
            finally:
                select.CROWD[bits] = before
            return [*ids, *index, *memo[slots[rows]]]  # noqa: B023

        whole, same = lists(slice(None), 1280, 4), []
        for crowd, longest in ((1, 1280), (3, 20 * 64 + 1), (40, 1 << 14)):
            same.append(all(map(torch.equal, lists(slice(None), longest, crowd), whole)))
        for row in (0, 1):
            same.append(all(map(torch.equal, lists(slice(row, row + 1), 1280, 4), whole[row::2])))
        failed += not all(same)
        print(f"{'ok' if all(same) else 'FAILED'} widths: {by} {name}", same, flush=True)
    return failed


def chunks(device: str) -> int:
    """A prompt attends to the same bits in one chunk as in several, and among other rows.

    On a GPU alone: the interpreter's products depend on a row's place in its tile.
    """
    failed = 0
    if device == "cpu":
        return failed
    for case, args in CASES["attend"]():
        if not case.startswith("long prompts Visible"):
            continue
        q, (group,), rows, *_ = (rebuilt(arg, lambda t: t.to(device), lambda d: d) for arg in args)
        (reading,) = group.reads
        kernel = next(one for one in TABLE["attend"].implementations if one.device == "cuda").function
        together = torch.full_like(q, float("nan"))
        kernel(q, (group,), rows, together, Workspace(out=together), scale=0.125)
        start, stop, same = rows.chunks[0].start, rows.chunks[0].stop, []
        for begin, end in ((start, start + 1), (start + 1, start + 150), (start + 150, stop)):
            at = slice(begin - start, end - start)
            length = torch.tensor([end], dtype=torch.int32, device=device)
            one = Rows(
                cu_q=torch.tensor([0, end - begin], dtype=torch.int32, device=device),
                seq_len=length,
                singles=0,
                longest=end,
                chunks=(range(begin, end),),
            )
            pages = replace(reading.pages, count=(length + 63) // 64, slots=reading.pages.slots[:1])
            lone, out = replace(reading, rows=range(1), pages=pages), torch.full_like(q[at], float("nan"))
            kernel(q[at], (replace(group, reads=(lone,)),), one, out, Workspace(out=out), scale=0.125)
            same.append(torch.equal(out, together[at]))
        failed += not all(same)
        print(f"{'ok' if all(same) else 'FAILED'} chunks: {case}", same, flush=True)
    return failed


def padded(device: str) -> int:
    """Prompts attend to the same bits in a launch that has room for more rows, tiles and pages than there are.

    Pages of 4 bits alone in the interpreter, which is slow.
    """
    failed = 0
    for case, args in CASES["attend"]():
        q, (group, *others), rows, *_ = (rebuilt(arg, lambda t: t.to(device), lambda d: d) for arg in args)
        (reading, *more) = group.reads
        left = device == "cpu" and not case.startswith("kv4")
        if left or others or more or not rows.chunks or rows.tiles or reading.pages.slots is None:
            continue
        kernel = next(one for one in TABLE["attend"].implementations if one.device == "cuda").function
        together = torch.full_like(q, float("nan"))
        kernel(q, (group,), rows, together, Workspace(out=together), scale=0.125)
        extra, tail = 5, 70
        pages = replace(
            reading.pages,
            count=torch.cat((reading.pages.count, reading.pages.count.new_zeros(extra))),
            slots=torch.cat((reading.pages.slots, reading.pages.slots[:1].expand(extra))),
        )
        wide = replace(
            rows,
            cu_q=torch.cat((rows.cu_q, rows.cu_q[-1:].expand(extra))),
            seq_len=torch.cat((rows.seq_len, rows.seq_len.new_zeros(extra))),
            chunks=(),
            most=Most(q.shape[0] - rows.singles + tail, sum(-(-c.stop // 64) for c in rows.chunks) + 11),
        )
        reads = (replace(reading, rows=range(wide.count), pages=pages),)
        out = torch.full((q.shape[0] + tail, *q.shape[1:]), float("nan"), dtype=q.dtype, device=device)
        asked = torch.cat((q, q.new_full((tail, *q.shape[1:]), float("nan"))))
        kernel(asked, (replace(group, reads=reads),), wide, out, Workspace(out=out), scale=0.125)
        same = [torch.equal(out[: q.shape[0]], together), bool(out[q.shape[0] :].isnan().all())]
        failed += not all(same)
        print(f"{'ok' if all(same) else 'FAILED'} padded: {case}", same, flush=True)
    return failed


def few(device: str) -> int:
    """Rows of SwiGLU and of page writes have the same bits among few as among many.

    On a GPU alone: only there have few rows launches of their own.
    """
    if device == "cpu":
        return 0
    product = torch.randn(40, 2 * 14336, device=device).half()
    swiglu = next(one for one in TABLE["swiglu"].implementations if one.device == "cuda").function
    together = tensors(swiglu(product, ActFormat.BOTH_SUM, torch.float16))
    same = []
    for at in (slice(0, 1), slice(7, 9), slice(3, 21), slice(39, 40)) * 3:
        alone = tensors(swiglu(product[at], ActFormat.BOTH_SUM, torch.float16))
        same.append(all(torch.equal(one, together[name][at]) for name, one in alone.items()))
    write = next(one for one in TABLE["rope_write"].implementations if one.device == "cuda").function
    for case, (qkv, positions, slots, stores, rope, heads) in CASES["rope_write"]():
        args = rebuilt((qkv, positions, slots, stores, rope), lambda t: t.to(device), lambda d: d)
        qkv, positions, slots, stores, rope = args
        if stores[0].format.bits == 32 or stores[0].statistics is not None:
            continue
        many = [
            args[0].repeat(9, 1, 1),
            positions.repeat(9),
            tuple(torch.cat([one, *[one * 0 - 1] * 8]) for one in slots),
        ]
        twice = [rebuilt(stores, torch.clone, lambda d: d) for _ in range(2)]
        q = write(*many, twice[0], rope, heads)[: qkv.shape[0]]
        equal = torch.equal(write(qkv, positions, slots, twice[1], rope, heads), q)
        equal &= all(torch.equal(one.pages, other.pages) for one, other in zip(*twice, strict=True))
        same.append(equal)
        if not equal:
            print(f"FAILED few: {case}", flush=True)
    print(f"{'ok' if all(same) else 'FAILED'} few", same, flush=True)
    return int(not all(same))


def served(name: str) -> bool:
    return any(one.device == "cuda" for one in TABLE[name].implementations)


if __name__ == "__main__":
    chosen = sys.argv[1:]
    where = "cpu"
    if "--device" in chosen:
        at = chosen.index("--device")
        where = chosen[at + 1]
        del chosen[at : at + 2]
    bits = {check.__name__: check for check in (tiles, alone, runs, pairs, widths, chunks, padded, few)}
    named = [name for name in chosen if name in bits]
    operations = [name for name in chosen if name not in bits]
    wrong = main(operations, where) if operations or not named else 0
    wrong += sum(bits[name](where) for name in (named if chosen else bits))
    wrong += languages() if where == "cuda" and not chosen else 0
    sys.exit(1 if wrong else 0)
