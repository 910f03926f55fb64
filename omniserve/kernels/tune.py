"""Measure which tile is fastest for a product on the card that is here, and write its table.

    python -m omniserve.kernels.tune --out tables            every shape of `SHAPES`
    python -m omniserve.kernels.tune --out tables --kinds row --shapes 4096x14336 --tokens 1 16

Each candidate must first give the bits of the default tile. A product has a row for tiles in CUDA C++, which need a
compiler at run time, and one for all others. Times are medians of CUDA-graph replays over weights that
do not fit in the L2 cache. Rows are written as soon as a shape is done; a row that is there stays unless a tile beats
it by 2 %. Candidates are compiled by many processes before anything is timed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.formats.blocks import BLOCK_BYTES, CODE_BYTES, SIDE
from omniserve.kernels import clusters
from omniserve.kernels.device import SHARED_BYTES, architecture, processors
from omniserve.kernels.hopper import lent
from omniserve.kernels.linear import product
from omniserve.kernels.tiles import KINDS, TABLES, Entry, Tile, default, entry_of

SHAPES = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),  # Llama-3-8B, Mistral-7B
    (12288, 4096), (22016, 4096), (4096, 11008),  # Llama-2-7B
    (15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824),  # Llama-2-13B
)  # fmt: skip
"""Weights [N, K] of the models that are measured: q|k|v, o, gate|up and down."""

HEADS = ((128256, 4096), (32000, 4096), (32000, 5120))
"""Output heads, which are held in 8 bits."""

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
"""Numbers of tokens that have a row."""

GAIN = 0.98
"""A new tile replaces a row's if it takes at most this share of the time that the row's takes in the same run."""

LIGHT = 112 * 1024
"""Bytes of shared memory of a program that leaves room for another."""

COLD = 150e6
"""Bytes of weights that a measurement passes over, so that none is in the L2 cache."""


def candidates(kind: str, tokens: int, rows: int, columns: int, arch: int, sms: int) -> Iterator[Tile]:
    """Yield the tiles to try, the default first."""
    yield default(tokens, rows, columns, kind, arch=arch, sms=sms)
    if arch != 90:
        yield from _triton(tokens, columns, kind)
        return
    yield from cuda_candidates(kind, tokens, rows, columns, sms)
    yield from _few(kind, tokens, rows, columns, sms)
    for tile in _gluon(kind, tokens):
        yield tile
        tiles = ceil_div(tokens, tile.tokens) * ceil_div(rows, tile.weights)
        if lent(tiles, ceil_div(columns, SIDE * tile.step), tile.step, sms):
            yield replace(tile, split=2)


def cuda_candidates(kind: str, tokens: int, rows: int, columns: int, sms: int) -> Iterator[Tile]:
    """Yield tiles in CUDA C++: one to four programs per multiprocessor, as many stages as its shared memory holds."""
    if tokens > clusters.TOKENS[-1] or kind == "w8a8" or not clusters.available():
        return
    bm = next(one for one in clusters.TOKENS if tokens <= one)
    blocks = ceil_div(columns, SIDE)
    # Weights, programs per multiprocessor, groups that take turns: those that were ever within 3 % of the fastest.
    for wide, programs, turns in ((64, 1, 2), (64, 2, 1), (64, 2, 2), (64, 3, 1), (64, 4, 1), (128, 1, 1), (128, 2, 1)):
        for step in (1, 2) if bm >= 32 else (2, 4):
            for split in (1, 2, 3, 4, 5, 6, 8):
                tiles = ceil_div(tokens, bm) * ceil_div(rows, wide) * split
                most = programs * sms
                fills = 0.7 * sms * max(1, programs - 1) <= tiles <= (2 if split <= 3 else 1) * most
                large = bm == 128 and programs * turns * wide > 128  # registers
                if not fills or large or blocks < (4 if step == 1 else 4 * step) * split:
                    continue
                tile = Tile(bm, wide, step, wide // 16 * turns + 1, 16, split, "cuda", programs=programs)
                tile = replace(tile, stages=_stages(tile, kind, ceil_div(blocks, step * split)))
                if tile.stages >= 3 or (tile.stages == 2 and step == 4):
                    yield tile


def _stages(tile: Tile, kind: str, steps: int) -> int:
    """Return how many stages fit into a tile's share of shared memory; groups that take turns have their own ones."""
    turns, room = clusters.turns(tile), SHARED_BYTES[90] // tile.programs - 1024
    for stages in range(min(ceil_div(steps, turns), 16 // turns) * turns, 0, -turns):
        tile = replace(tile, stages=stages)
        if clusters.shared_bytes(tile, torch.bfloat16, grouped=kind == "g128") + clusters.static_bytes(tile) <= room:
            return stages
    return 0


def _few(kind: str, tokens: int, rows: int, columns: int, sms: int) -> Iterator[Tile]:
    """Yield tiles of the kernel for few tokens: parts of K that give each multiprocessor one to four programs."""
    if tokens > 256:
        return
    sizes = {
        16: (
            (64, 2, 4, 6),
            (64, 4, 4, 3),
            (64, 4, 4, 4),
            (64, 4, 4, 6),
            (128, 2, 4, 5),
            (128, 2, 8, 5),
            (128, 4, 8, 3),
        ),
        32: ((64, 2, 4, 6), (64, 4, 4, 3), (64, 4, 4, 5), (128, 1, 8, 8), (128, 2, 8, 4)),
        64: ((64, 2, 4, 4), (64, 2, 4, 6), (64, 1, 4, 4), (128, 1, 4, 5), (128, 2, 8, 3), (128, 2, 4, 3)),
        128: ((64, 1, 4, 4), (128, 1, 8, 4)),
    }
    bm = next((one for one in (8, 16, 32, 64) if tokens <= one), 128)
    for most in (bm,) if bm <= 32 else (bm, bm // 2):
        for wide, step, warps, stages in sizes[max(most, 16)]:
            stage = step * (wide * (SIDE if kind == "w8a8" else SIDE // 2) + most * SIDE + 256 * (kind == "g128"))
            tiles = ceil_div(tokens, most) * ceil_div(rows, wide)
            for split in (1, 2, 3, 4, 6, 8) if most <= 32 else (1, 2, 3, 4):
                fills = split == 1 or 0.65 * sms <= tiles * split <= 4 * sms
                room = LIGHT if tiles * split > sms else 2 * LIGHT
                if fills and stage * stages <= room and ceil_div(columns, SIDE) >= 4 * split:
                    yield Tile(most, wide, step, warps, stages, split, "few")


def _gluon(kind: str, tokens: int) -> Iterator[Tile]:
    """Yield tiles of the kernel for 9.0: two to four groups of warps, as many stages as shared memory holds."""
    bm = 8 if tokens <= 8 else 16
    few = {"w8a8": ((bm, 64, 2, 17, 8), (bm, 128, 1, 9, 9), (bm, 128, 2, 17, 4))}.get(
        kind, ((bm, 64, 2, 9, 12), (bm, 64, 4, 17, 8), (bm, 128, 2, 17, 8), (bm, 256, 1, 9, 9))
    )
    some = (
        (64, 64, 2, 9, 6), (64, 64, 2, 13, 6), (64, 128, 1, 17, 10), (64, 256, 1, 17, 7), (64, 256, 1, 9, 7),
        (32, 128, 2, 17, 8), (32, 64, 2, 17, 12), (32, 64, 4, 17, 6),
    )  # fmt: skip
    more = (128, 64, 2, 9, 4), (128, 64, 1, 13, 6), (128, 128, 2, 9, 4), (128, 192, 2, 13, 3), (128, 256, 1, 17, 6)
    many = (128, 64, 1, 9, 8), (128, 128, 1, 9, 7), (128, 256, 1, 9, 4), (256, 128, 1, 9, 4), (128, 256, 1, 17, 4)
    if tokens <= 16:
        sizes = few
    elif tokens <= 32:
        sizes = ((32, 64, 2, 17, 12), (16, 64, 4, 17, 8), (32, 128, 2, 17, 8), (32, 256, 1, 17, 9), (32, 256, 1, 9, 8))
    elif tokens <= 64:
        sizes = some
    else:
        sizes = (*some[:5], *more, *many) if tokens <= 256 else many
    for bm, wide, step, warps, stages in sizes:
        for order in (8,) if tokens < 8192 else (4, 8, 16):
            yield Tile(bm, wide, step, warps, stages, language="gluon", order=order)


def _triton(tokens: int, columns: int, kind: str) -> Iterator[Tile]:
    blocks = ceil_div(columns, SIDE)
    if tokens <= 16:
        sizes = ((16, 64, 2, 4, 4), (16, 64, 1, 4, 5), (16, 128, 1, 4, 5), (16, 128, 2, 8, 3))
    elif tokens <= 64:
        sizes = ((64, 128, 1, 4, 4), (64, 64, 1, 4, 5), (32, 128, 1, 4, 4))
    else:
        sizes = ((128, 128, 1, 8, 4), (128, 128, 1, 4, 3), (128, 64, 1, 4, 4), (256, 128, 1, 8, 3))
    for size in sizes[: 3 if kind == "w8a8" else None]:
        for split in (1, 2, 4, 8) if tokens <= 256 else (1,):
            if blocks % (split * size[2]) == 0:
                yield Tile(*size, split=split)


def weights(kind: str, rows: int, columns: int) -> Tensor:
    """Return random weights of a kind as `bind` would lay them out."""
    if kind == "w8a8":
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
    size = (ceil_div(rows, SIDE), ceil_div(columns, SIDE), BLOCK_BYTES if kind == "g128" else CODE_BYTES)
    made = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
    if kind == "g128":
        made[..., CODE_BYTES : CODE_BYTES + SIDE].random_(1, 9)  # 15 * 8 + 120 fits a byte
        made[..., CODE_BYTES + SIDE :].random_(0, 121)
    return made


class Problem:
    """One product with random arguments."""

    def __init__(self, kind: str, tokens: int, rows: int, columns: int) -> None:
        self.kind = kind
        self.x = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, device="cuda")
        self.a = torch.rand(tokens, 1, device="cuda") * 1e-2
        self.total = self.x.sum(1, keepdim=True, dtype=torch.int32)
        self.scale, self.zero = torch.rand(2, rows, device="cuda") * 1e-3

    def __call__(self, w: Tensor, tile: Tile) -> Tensor:
        """Return the product with w, cut as `tile` says, in bf16."""
        row = self.kind == "row"
        return product(
            self.x, self.a, self.total if row else None, w, self.scale, self.zero if row else None, None,
            torch.bfloat16, tile,
        )  # fmt: skip


def replayed(function: Callable[[], object], repeat: int) -> float:
    """Return the median microseconds of a function's launches, replayed as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for turn in range(3 + repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def compile_all(wanted: Sequence[tuple[str, Tile]], processes: int) -> None:
    """Compile tiles by many processes; Triton's cache on disk then serves this one."""
    context = get_context("spawn")
    running = [context.Process(target=_compile, args=(wanted[at::processes],)) for at in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()


def _compile(wanted: Sequence[tuple[str, Tile]]) -> None:
    for kind, tile in wanted:
        problem, w = Problem(kind, 256, 1024, 1024), weights(kind, 1024, 1024)
        try:
            problem(w, tile)
        except Exception as error:  # a tile that this card cannot take: it is left out below
            say(f"{kind} {tile}: {type(error).__name__}: {str(error)[:120]}")


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def best(
    kind: str, tokens: int, rows: int, columns: int, held: Entry | None, ws: Sequence[Tensor], tiles: Iterable[Tile]
) -> Entry | None:
    """Return the entry of one product: the row that is there, or one of `tiles` that beats it."""
    problem = Problem(kind, tokens, rows, columns)
    known = [held.tile] if held else []
    found = list(dict.fromkeys((*tiles, *known)))
    expected = problem(ws[0], default(tokens, rows, columns, kind, arch=architecture(), sms=processors()))
    times: dict[Tile, float] = {}
    for tile in found:
        try:
            assert torch.equal(problem(ws[0], tile), expected), f"{kind} {tokens}x{rows}x{columns} {tile}: other bits"
            total = replayed(lambda tile=tile: [problem(w, tile) for w in ws], 20)  # type: ignore[misc]
        except (RuntimeError, triton.OutOfResources) as error:  # does not fit this card
            say(f"left out: {kind} {tokens}x{rows}x{columns} {tile}: {str(error)[:120]}")
            continue
        times[tile] = total / len(ws)
    if not times:
        return held
    fastest = min(times, key=lambda tile: times[tile])
    if held and held.tile in times and times[fastest] > GAIN * times[held.tile]:
        fastest = held.tile
    return Entry(kind, rows, columns, tokens, fastest, round(times[fastest], 2))


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write a table: one line per entry, in order."""
    head = {
        "card": torch.cuda.get_device_name(), "arch": architecture(), "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    ordered = sorted(entries, key=lambda one: (one.kind, one.n, one.k, one.m, one.tile.language))
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    rows = ",\n".join("  " + json.dumps(asdict(one)) for one in ordered)
    path.write_text("\n".join(["{", *lines, ' "entries": [', rows, " ]", "}", ""]))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure tiles of products on this card and write its table.")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the table")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="weights; all of the known models if not given")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--processes", type=int, default=8, help="that compile")
    parser.add_argument("--languages", nargs="+", choices=("cuda", "others"), default=("cuda", "others"))
    parser.add_argument("--seconds", type=float, default=1e9, help="no new shape is begun after that time")
    given = parser.parse_args()
    begun = time.monotonic()
    shapes = [tuple(map(int, one.split("x"))) for one in given.shapes] if given.shapes else (*SHAPES, *HEADS)
    path = given.out / (torch.cuda.get_device_name().lower().replace(" ", "-") + ".json")
    source = path if path.exists() else TABLES / path.name
    entries = {}
    if source.exists():
        held = map(entry_of, json.loads(source.read_text())["entries"])
        entries = {(e.kind, e.n, e.k, e.m, e.tile.language == "cuda"): e for e in held}
    jobs = [
        (kind, n, k) for kind in given.kinds for n, k in shapes
        if given.shapes or kind == "w8a8" or (n, k) not in HEADS
    ]  # fmt: skip

    def tiles(kind: str, m: int, n: int, k: int, cuda: bool) -> list[Tile]:
        every = candidates(kind, m, n, k, architecture(), processors())
        return [tile for tile in every if (tile.language == "cuda") == cuda]

    classes = [name == "cuda" for name in given.languages]
    wanted = {
        (kind, tile) for kind, n, k in jobs for m in given.tokens for c in classes for tile in tiles(kind, m, n, k, c)
    }
    wanted |= {(kind, e.tile) for (kind, *_, c), e in entries.items() if kind in given.kinds and c in classes}
    compile_all(sorted(wanted, key=str), given.processes)
    say(f"{len(wanted)} tiles compiled in {time.monotonic() - begun:.0f} s")
    given.out.mkdir(parents=True, exist_ok=True)
    for kind, n, k in jobs:
        if time.monotonic() - begun > given.seconds:
            say(f"time is over: {kind} {n}x{k} and what follows are not measured")
            break
        size = n * k // (1 if kind == "w8a8" else 2)
        ws = [weights(kind, n, k) for _ in range(max(1, int(COLD // size) + 1))]
        for m in given.tokens:
            for cuda in classes:
                key = (kind, n, k, m, cuda)
                found = best(kind, m, n, k, entries.get(key), ws if m <= 512 else ws[:2], tiles(kind, m, n, k, cuda))
                if found:
                    entries[key] = found
                    say(f"{kind} {n}x{k} {m}: {found.us} us {found.tile}")
        write(path, entries.values())


if __name__ == "__main__":
    main()
