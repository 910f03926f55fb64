"""Runs the cases: compiles ahead in several processes, checks, measures."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any

import torch

from omniserve.base.errors import CapacityError, ConfigError
from omniserve.base.spec import ModelSpec
from omniserve.bench.kernels import pages
from omniserve.bench.kernels.cases import Calls, Case, Sizes, linears, rowwise
from omniserve.bench.kernels.limits import CARDS, Card
from omniserve.bench.kernels.timing import microseconds
from omniserve.formats.dummy import CONFIGS
from omniserve.models.families import family
from omniserve.ops.dispatch import load_kernels

DECODE = (
    (1, 1024), (1, 16384), (1, 65536), (1, 131072), (1, 262144), (8, 16384), (8, 65536), (64, 1280), (64, 4096),
    (256, 1280), (1024, 1280),
)  # fmt: skip
"""Rows and contexts of decode steps."""

PROMPTS = (
    (1024, 1024, None), (8192, 8192, None), (8192, 32768, None), (8192, 65536, None), (8192, 65536, 256),
    (8192, 65536, 8192),
)  # fmt: skip
"""Tokens, context and window of prompt chunks."""

TOLERANCE = 0.02
"""Relative error from which a result counts as wrong: 16-bit outputs and int8 codes stay far below."""


def spec_of(shape: str) -> ModelSpec:
    """Return the numbers of a published model."""
    return family(CONFIGS[shape]).spec(CONFIGS[shape])


def gpu_sizes(spec: ModelSpec, dtype: str, tokens: Sequence[int]) -> Sizes:
    """Return the sizes of the cases on the GPU here."""
    return Sizes(
        spec=spec,
        device=torch.device("cuda"),
        dtype=getattr(torch, dtype),
        tokens=tokens,
        decode=DECODE,
        prompts=PROMPTS,
    )


def cases(sizes: Sizes, only: Sequence[str]) -> Iterator[Case]:
    """Yield the cases whose title holds one of these words, or all."""
    for make in (pages.writes, rowwise, pages.selection, pages.decode, linears, pages.prompts):
        for case in make(sizes):
            if not only or any(word in case.title for word in only):
                yield case


def compile_ahead(spec: ModelSpec, dtype: str, tokens: Sequence[int], titles: Sequence[str], jobs: int) -> None:
    """Run each case once, shared by processes: what they compile lies in Triton's cache on the disk afterwards."""
    context = get_context("spawn")
    shares = [titles[place::jobs] for place in range(jobs)]
    running = [context.Process(target=_compile, args=(spec, dtype, tokens, share)) for share in shares if share]
    for process in running:
        process.start()
    for process in running:
        process.join()


def _compile(spec: ModelSpec, dtype: str, tokens: Sequence[int], titles: Sequence[str]) -> None:
    load_kernels("cuda")
    wanted = set(titles)
    for case in cases(gpu_sizes(spec, dtype, tokens), ()):
        if case.title in wanted:
            try:
                case.build(1).calls[0]()
                torch.cuda.synchronize()
            except Exception:  # the process that measures meets it again, and tells it
                pass
            torch.cuda.empty_cache()


def measure(
    case: Case, card: Card | None, *, replays: int, peers: dict[tuple[str, str, str], dict[str, Any]] | None
) -> dict[str, Any]:
    """Return a case's row: microseconds, limit and share of it, error, and the ratio of each peer's time to ours.

    peers  times by kind, `alike` and size, filled here; None: peers are left out
    """
    limit = None if card is None else case.work.microseconds(card)
    row: dict[str, Any] = {"kind": case.kind, "name": case.name, "size": case.size, "limit_us": limit}
    try:
        built = case.build(None)
        row["error"] = built.check()
        row["us"] = microseconds(built.calls, replays=replays)
        row["ok"] = row["error"] <= TOLERANCE
        row["share"] = None if limit is None else limit / row["us"]
        if peers is not None and built.peers:
            key = case.kind, case.alike, case.size
            if key not in peers:
                peers[key] = {name: _peer(make, replays) for name, make in built.peers.items()}
            row["peers"] = {
                name: one | ({"ratio": one["us"] / row["us"]} if "us" in one else {})
                for name, one in peers[key].items()
            }
    except (ConfigError, CapacityError, torch.OutOfMemoryError) as problem:
        row |= {"ok": False, "problem": " ".join(str(problem).split())[:200]}
    except RuntimeError as problem:
        if "CUDA error" in str(problem):
            raise
        row |= {"ok": False, "problem": " ".join(str(problem).split())[:200]}
    return row


def _peer(make: Callable[[], Calls], replays: int) -> dict[str, Any]:
    """Return a peer's time, or why it has none."""
    try:
        return {"us": microseconds(make(), replays=replays)}
    except RuntimeError as problem:
        if "CUDA error" in str(problem):
            raise
        return {"problem": " ".join(str(problem).split())[:120]}


def run(todo: Sequence[Case], *, replays: int, peers: bool, on_row: Callable[[dict[str, Any]], None]) -> None:
    """Measure the cases one after the other; weights are given back with the last case that shares them."""
    card, left = CARDS.get(torch.cuda.get_device_name()), deque(todo)
    known: dict[tuple[str, str, str], dict[str, Any]] | None = {} if peers else None
    while left:
        on_row(measure(left.popleft(), card, replays=replays, peers=known))
        torch.cuda.empty_cache()
