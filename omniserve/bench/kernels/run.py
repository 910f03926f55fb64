"""Runs the cases: compiles ahead in several processes, checks, measures."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from omniserve.base.spec import ModelSpec
from omniserve.bench.kernels import milestones, pages, prompts
from omniserve.bench.kernels.cases import Calls, Case, Sizes, linears, products, rowwise
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


WHOLES = (65536,)
"""Tokens of whole prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked for, as another process can be told it.

    tokens   of a step
    suite    True: the sizes and cases that the milestones ask for, and no others
    only     parts of titles; none: all
    """

    spec: ModelSpec
    dtype: str
    tokens: Sequence[int]
    suite: bool = False
    only: Sequence[str] = ()


def gpu_sizes(wanted: Wanted) -> Sizes:
    """Return the sizes of the cases on the GPU here."""
    return Sizes(
        spec=wanted.spec,
        device=torch.device("cuda"),
        dtype=getattr(torch, wanted.dtype),
        tokens=wanted.tokens,
        decode=milestones.DECODE if wanted.suite else DECODE,
        prompts=milestones.PROMPTS if wanted.suite else PROMPTS,
        wholes=milestones.WHOLES if wanted.suite else WHOLES,
    )


def cases(sizes: Sizes, only: Sequence[str], *, suite: bool = False) -> Iterator[Case]:
    """Yield the cases whose title holds one of these words, or all; of a suite those that a milestone needs."""
    makers = (
        pages.writes, rowwise, pages.selection, pages.lserve, linears, products, pages.decode, prompts.prompts,
        prompts.wholes,
    )  # fmt: skip
    for make in makers:
        for case in make(sizes):
            if suite and not milestones.needed(case.kind, case.name, case.size):
                continue
            if not only or any(word in case.title for word in only):
                yield case


def compile_ahead(wanted: Wanted, titles: Sequence[str], jobs: int) -> None:
    """Run each case once, shared by processes: what they compile lies in Triton's cache on the disk afterwards."""
    context = get_context("spawn")
    shares = [titles[place::jobs] for place in range(jobs)]
    running = [context.Process(target=_compile, args=(wanted, share)) for share in shares if share]
    for process in running:
        process.start()
    for process in running:
        process.join()


def _compile(wanted: Wanted, titles: Sequence[str]) -> None:
    load_kernels("cuda")
    mine = set(titles)
    for case in cases(gpu_sizes(wanted), (), suite=wanted.suite):
        if case.title in mine:
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
    except Exception as problem:  # kernels raise what they like: the row tells it, and the next case runs
        row |= {"ok": False, "problem": _words(problem)}
    return row


def _peer(make: Callable[[], Calls], replays: int) -> dict[str, Any]:
    """Return a peer's time, or why it has none."""
    try:
        return {"us": microseconds(make(), replays=replays)}
    except Exception as problem:  # as above
        return {"problem": _words(problem)}


def _words(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:200]


def _answers() -> bool:
    """Whether the device still does, which it does not after an illegal access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run(left: deque[Case], *, replays: int, peers: bool, on_row: Callable[[dict[str, Any]], None]) -> None:
    """Measure the cases one after the other and take them away; weights go with the last case that shares them.

    Those stay that were not measured because the device answered no more.
    """
    card = CARDS.get(torch.cuda.get_device_name())
    known: dict[tuple[str, str, str], dict[str, Any]] | None = {} if peers else None
    while left:
        row = measure(left.popleft(), card, replays=replays, peers=known)
        on_row(row)
        failed = "problem" in row or any("problem" in one for one in row.get("peers", {}).values())
        if failed and not _answers():
            return
        torch.cuda.empty_cache()
